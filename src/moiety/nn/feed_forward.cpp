#include "moiety/nn/feed_forward.h"

#include <torch/torch.h>

#include "moiety/nn/beside.h"
#include "moiety/nn/packed_gated.h"

namespace moiety {

FeedForward::FeedForward(Linear g, Linear u, Linear d, Activation act) : act_(act) {
  if (!g.is_empty()) gate = register_module("gate_proj", std::move(g));
  up = register_module("up_proj", std::move(u));
  down = register_module("down_proj", std::move(d));
}

torch::Tensor FeedForward::apply(const torch::Tensor& x, Pass& pass) {
  if (gate.is_empty()) return project(down, act_(project(up, x, pass)), pass);
  // All of it packed, without biases and alone: the layer in two rounds of products.
  const auto bare = [](const Linear& m) { return !m->bias.defined() && m->attached().empty(); };
  const bool plain = bare(gate) && bare(up) && bare(down);
  const PackedMatrix* packed = plain ? gate->packed_for(x) : nullptr;
  if (packed != nullptr && up->packed_for(x) != nullptr && down->packed_for(x) != nullptr) {
    const auto flat = x.reshape({-1, x.size(-1)}).to(torch::kFloat32).contiguous();
    const PackedGated one{packed, up->packed_for(x), down->packed_for(x)};
    const int64_t count = flat.size(0);
    const auto y = packed_gated(flat, {&one, 1}, {&count, 1}, nullptr,
                                [&](torch::Tensor g, torch::Tensor u) { return act_times(act_, g, u); });
    return y.view(x.sizes()).to(x.scalar_type());
  }
  const auto halves = project({gate, up}, x, pass);
  return project(down, act_(halves[0]) * halves[1], pass);
}

}  // namespace moiety
