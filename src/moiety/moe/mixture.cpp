#include "moiety/moe/mixture.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/nn/dots.h"
#include "moiety/nn/shortcut.h"

namespace moiety {

namespace {

// Of few numbers without a graph: each on its own, the same whatever else is in x (models/token_blocks).
torch::Tensor sigmoid_of(const torch::Tensor& x) {
  if (x.numel() > LinearImpl::kDotRows || !x.is_cpu() || x.scalar_type() != torch::kFloat32 || !may_shorten({x}))
    return torch::sigmoid(x);
  auto y = x.contiguous().clone();
  float* v = y.data_ptr<float>();
  for (int64_t i = 0; i < y.numel(); ++i) v[i] = 1.f / (1.f + std::exp(-v[i]));
  return y;
}

}  // namespace

torch::Tensor mix(Router& router, Experts& experts, const torch::Tensor& x, const Site& site, Pass& pass,
                  const torch::Tensor& expert_map, double capacity_factor) {
  Routing routing = router.route(x, site, pass);
  if (capacity_factor > 0.0)
    routing = limit_capacity(routing, router.experts(),
                             expert_capacity(x.size(0), routing.experts.size(1), router.experts(), capacity_factor));
  const Dispatch dispatch = Dispatch::of(routing, experts.count(), expert_map);
  auto y = experts.mix_in(x, dispatch, pass);
  report(pass, site, routing, router.experts(), x, y);
  return y;
}

void report(Pass& pass, const Site& site, const Routing& routing, int64_t experts, const torch::Tensor& x,
            const torch::Tensor& y) {
  if (!pass.trace) return;
  Trace::Record record{.site = site, .routing = routing, .input = {}, .output = {}, .real = {}};
  if (pass.trace->keep_inputs) record.input = x;
  if (pass.trace->keep_outputs) record.output = y;
  record.experts = experts;
  if (pass.mask.defined()) record.real = pass.mask.reshape({-1});
  pass.trace->add(std::move(record));
}

Mixture::Mixture(std::shared_ptr<Router> r, std::shared_ptr<Experts> e, std::shared_ptr<FeedForward> s, Linear g) {
  router = register_module("gate", std::move(r));
  experts = register_module("experts", std::move(e));
  if (s) shared = register_module("shared_experts", std::move(s));
  if (!g.is_empty()) shared_gate = register_module("shared_expert_gate", std::move(g));
}

torch::Tensor Mixture::forward(const torch::Tensor& x, Pass& pass) {
  pass.batch = x.size(0);
  const auto flat = x.reshape({-1, x.size(-1)});
  const auto routed =
      pass.training && jitter > 0.0 ? flat * torch::empty_like(flat).uniform_(1.0 - jitter, 1.0 + jitter) : flat;
  auto y = mix(*router, *experts, routed, pass.at("ffn"), pass, expert_map,
               pass.training && training_capacity_factor > 0.0 ? training_capacity_factor : capacity_factor);
  if (bias.defined()) y = y + bias.to(y.scalar_type());
  if (routed_scale != 1.0) y = y * routed_scale;
  if (shared) {
    auto s = shared->apply(flat, pass);
    if (!shared_gate.is_empty()) s = sigmoid_of(multiply_narrow(shared_gate, flat)) * s;
    if (shared_scale != 1.0) s = s * shared_scale;
    y = y + s;
  }
  return y.view(x.sizes());
}

}  // namespace moiety
