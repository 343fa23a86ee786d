#include "moiety/moe/mixture.h"

#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {

Dispatch Dispatch::of(const Routing& routing, int64_t experts, const torch::Tensor& map) {
  const int64_t slots = routing.experts.size(1);
  auto expert = routing.experts.reshape({-1});
  auto gates = routing.gates.reshape({-1});
  auto tokens = torch::arange(routing.experts.size(0), expert.options()).repeat_interleave(slots);
  const auto used = expert >= 0;
  if (!used.all().item<bool>()) {
    const auto at = used.nonzero().squeeze(1);
    expert = expert.index_select(0, at);
    gates = gates.index_select(0, at);
    tokens = tokens.index_select(0, at);
  }
  const int64_t logical = map.defined() ? map.numel() : experts;
  const int64_t largest = expert.numel() == 0 ? -1 : expert.max().item<int64_t>();
  check(largest < logical, "a routing names expert {} but there are {}", largest, logical);
  if (map.defined() && expert.numel() > 0) {
    // Aliases of one physical expert become one pair: key = physical * N + token, gates of equal keys are summed.
    const int64_t n = routing.experts.size(0);
    const auto key = map.to(expert.device()).index_select(0, expert) * n + tokens;
    const auto [unique, inverse, unused] = at::_unique2(key, /*sorted=*/true, /*return_inverse=*/true);
    gates = torch::zeros({unique.numel()}, gates.options()).index_add(0, inverse, gates);
    expert = unique.floor_divide(n);
    tokens = unique.remainder(n);
  } else {
    const auto order = std::get<1>(at::sort(expert, /*stable=*/true, 0, false));
    expert = expert.index_select(0, order);
    gates = gates.index_select(0, order);
    tokens = tokens.index_select(0, order);
  }
  Dispatch d;
  const auto counts = torch::bincount(expert, {}, experts).to(torch::kCPU);
  d.counts.assign(counts.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>() + experts);
  d.tokens = tokens;
  d.gates = gates;
  return d;
}

torch::Tensor Dispatch::reduce(const torch::Tensor& y, int64_t rows) const {
  return torch::zeros({rows, y.size(1)}, y.options()).index_add(0, tokens, y * gates.to(y.scalar_type()).unsqueeze(1));
}

Mixture::Mixture(std::shared_ptr<Router> r, std::shared_ptr<Experts> e, std::shared_ptr<FeedForward> s, Linear g) {
  router = register_module("gate", std::move(r));
  experts = register_module("experts", std::move(e));
  if (s) shared = register_module("shared_experts", std::move(s));
  if (!g.is_empty()) shared_gate = register_module("shared_expert_gate", std::move(g));
}

torch::Tensor Mixture::forward(const torch::Tensor& x, Pass& pass) {
  const auto flat = x.reshape({-1, x.size(-1)});
  const Site site = pass.at("ffn");
  const Routing routing = router->route(flat, site, pass);
  const Dispatch dispatch = Dispatch::of(routing, experts->count(), expert_map);
  auto y = dispatch.reduce(experts->forward(dispatch.gather(flat), dispatch.counts), flat.size(0));
  if (pass.trace) {
    Trace::Record record{.site = site, .routing = routing, .input = {}, .output = {}, .real = {}};
    if (pass.trace->keep_inputs) record.input = flat;
    if (pass.trace->keep_outputs) record.output = y;
    if (pass.mask.defined()) record.real = pass.mask.reshape({-1});
    pass.trace->add(std::move(record));
  }
  if (shared) {
    auto s = shared->apply(flat);
    if (!shared_gate.is_empty()) s = torch::sigmoid(shared_gate(flat)) * s;
    y = y + s;
  }
  return y.view(x.sizes());
}

}  // namespace moiety
