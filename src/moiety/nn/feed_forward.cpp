#include "moiety/nn/feed_forward.h"

#include <torch/torch.h>

#include "moiety/nn/packed_gated.h"

namespace moiety {

FeedForward::FeedForward(Linear g, Linear u, Linear d, Activation act) : act_(act) {
  if (!g.is_empty()) gate = register_module("gate_proj", std::move(g));
  up = register_module("up_proj", std::move(u));
  down = register_module("down_proj", std::move(d));
}

torch::Tensor FeedForward::apply(const torch::Tensor& x) {
  if (gate.is_empty()) return down(act_(up(x)));
  // All of it packed and without biases: the layer in two rounds of products.
  const bool plain = !gate->bias.defined() && !up->bias.defined() && !down->bias.defined();
  const PackedMatrix* packed = plain ? gate->packed_for(x) : nullptr;
  if (packed != nullptr && up->packed_for(x) != nullptr && down->packed_for(x) != nullptr) {
    const auto flat = x.reshape({-1, x.size(-1)}).to(torch::kFloat32).contiguous();
    const PackedGated one{packed, up->packed_for(x), down->packed_for(x)};
    const int64_t count = flat.size(0);
    const auto y = packed_gated(flat, {&one, 1}, {&count, 1}, nullptr,
                                [&](torch::Tensor g, torch::Tensor u) { return act_times(act_, g, u); });
    return y.view(x.sizes()).to(x.scalar_type());
  }
  return down(act_(gate(x)) * up(x));
}

}  // namespace moiety
