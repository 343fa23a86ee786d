#include "moiety/moe/experts.h"

#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {

GatedExperts::GatedExperts(LinearStack g, LinearStack u, LinearStack d, Activation act) : act_(act) {
  check(g->count() == u->count() && g->count() == d->count(),
        "experts need as many gate ({}) as up ({}) and down ({}) matrices", g->count(), u->count(), d->count());
  gate = register_module("gate_proj", std::move(g));
  up = register_module("up_proj", std::move(u));
  down = register_module("down_proj", std::move(d));
}

torch::Tensor GatedExperts::forward(const torch::Tensor& x, const std::vector<int64_t>& counts) {
  std::vector<torch::Tensor> pieces;
  int64_t begin = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(counts.size()); ++e) {
    if (counts[e] == 0) continue;
    const auto rows = x.narrow(0, begin, counts[e]);
    pieces.push_back(down->forward(e, combine(gate->forward(e, rows), up->forward(e, rows))));
    begin += counts[e];
  }
  return pieces.empty() ? x.new_zeros({0, down->out()}) : torch::cat(pieces);
}

ClampedExperts::ClampedExperts(LinearStack g, LinearStack u, LinearStack d, double alpha, double limit)
    : GatedExperts(std::move(g), std::move(u), std::move(d), nullptr), alpha_(alpha), limit_(limit) {}

torch::Tensor ClampedExperts::combine(const torch::Tensor& g, const torch::Tensor& u) {
  const auto cut = g.clamp_max(limit_);
  return (u.clamp(-limit_, limit_) + 1.0) * (cut * torch::sigmoid(alpha_ * cut));
}

}  // namespace moiety
