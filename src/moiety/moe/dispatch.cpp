#include "moiety/moe/dispatch.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"

namespace moiety {

Dispatch Dispatch::of(const Routing& routing, int64_t experts, const torch::Tensor& map) {
  const int64_t width = routing.experts.size(1);
  auto expert = routing.experts.reshape({-1});
  auto gates = routing.gates.reshape({-1});
  auto slots = torch::arange(expert.numel(), expert.options());
  const auto used = expert >= 0;
  if (!used.all().item<bool>()) {
    slots = used.nonzero().squeeze(1);
    expert = expert.index_select(0, slots);
    gates = gates.index_select(0, slots);
  }
  const int64_t logical = map.defined() ? map.numel() : experts;
  const int64_t largest = expert.numel() == 0 ? -1 : expert.max().item<int64_t>();
  check(largest < logical, "a routing names expert {} but there are {}", largest, logical);
  Dispatch d;
  if (map.defined() && expert.numel() > 0) {
    // Aliases of one physical expert become one pair: key = physical * N + token, gates of equal keys are summed.
    const int64_t n = routing.experts.size(0);
    const auto key = map.to(expert.device()).index_select(0, expert) * n + slots.div(width, "floor");
    const auto [unique, inverse, unused] = at::_unique2(key, /*sorted=*/true, /*return_inverse=*/true);
    d.gates = torch::zeros({unique.numel()}, gates.options()).index_add(0, inverse, gates);
    expert = unique.floor_divide(n);
    d.tokens = unique.remainder(n);
  } else {
    const auto order = std::get<1>(at::sort(expert, /*stable=*/true, 0, false));
    expert = expert.index_select(0, order);
    d.gates = gates.index_select(0, order);
    d.slots = slots.index_select(0, order);
    d.tokens = d.slots.div(width, "floor");
  }
  const auto counts = torch::bincount(expert, {}, experts).to(torch::kCPU);
  d.counts.assign(counts.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>() + experts);
  return d;
}

torch::Tensor Dispatch::reduce(const torch::Tensor& y, int64_t rows) const {
  return torch::zeros({rows, y.size(1)}, y.options()).index_add(0, tokens, y * gates.to(y.scalar_type()).unsqueeze(1));
}

Routing limit_capacity(const Routing& routing, int64_t experts, int64_t capacity) {
  check(capacity >= 0, "a capacity of {} tokens is impossible", capacity);
  torch::NoGradGuard no_grad;
  const auto flat = routing.experts.reshape({-1});
  // Unused slots go last, as an expert of their own, and stay what they are.
  const auto key = flat.masked_fill(flat < 0, experts);
  const auto [sorted, order] = at::sort(key, /*stable=*/true, 0, false);
  const auto counts = torch::bincount(sorted, {}, experts + 1);
  const auto start = counts.cumsum(0) - counts;
  const auto place = torch::arange(flat.numel(), flat.options()) - start.index_select(0, sorted);
  const auto kept =
      torch::zeros_like(flat, torch::kBool).index_copy_(0, order, place < capacity).view_as(routing.experts);
  Routing out = routing;
  out.experts = routing.experts.masked_fill(~kept, -1);
  {
    torch::AutoGradMode grad(true);
    out.gates = routing.gates * kept.to(routing.gates.scalar_type());
  }
  return out;
}

int64_t expert_capacity(int64_t tokens, int64_t slots, int64_t experts, double factor) {
  check(factor > 0.0, "a capacity factor of {} is not above 0", factor);
  const double room = static_cast<double>(tokens) * factor * static_cast<double>(slots) / static_cast<double>(experts);
  return std::isinf(room) ? tokens : static_cast<int64_t>(std::floor(room));
}

}  // namespace moiety
