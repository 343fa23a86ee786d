#include "moiety/moe/dispatch.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/kernels/swiglu.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

using torch::Tensor;

// The pairs of every token, in the order of pairs: entries start[n] ... start[n + 1] of `pair`.
struct PairsOfTokens {
  std::vector<int64_t> start, pair;
  PairsOfTokens(const Tensor& tokens, int64_t rows)
      : start(static_cast<size_t>(rows) + 1), pair(static_cast<size_t>(tokens.numel())) {
    const int64_t* token = tokens.const_data_ptr<int64_t>();
    const int64_t pairs = tokens.numel();
    for (int64_t p = 0; p < pairs; ++p) ++start[static_cast<size_t>(token[p]) + 1];
    for (size_t n = 1; n < start.size(); ++n) start[n] += start[n - 1];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t p = 0; p < pairs; ++p) pair[static_cast<size_t>(next[static_cast<size_t>(token[p])]++)] = p;
  }
};

// out[n] = sum over the pairs p of token n of weight[p] * rows[p]; every weight is 1 when undefined.
template <class T>
void sum_pairs(const Tensor& rows, const Tensor& weights, const Tensor& tokens, const Tensor& out) {
  const PairsOfTokens of(tokens, out.size(0));
  const int64_t width = out.size(1);
  const Bits<T>* from = bits<T>(rows);
  Bits<T>* to = bits<T>(out);
  const float* weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  parallel_for(0, out.size(0), std::max<int64_t>(1, 16384 / width), [&](int64_t first, int64_t last) {
    std::vector<const Bits<T>*> row;
    std::vector<float> scale;
    for (int64_t n = first; n < last; ++n) {
      row.clear();
      scale.clear();
      for (auto i = static_cast<size_t>(of.start[n]); i < static_cast<size_t>(of.start[n + 1]); ++i) {
        row.push_back(from + of.pair[i] * width);
        scale.push_back(weight ? weight[of.pair[i]] : 1.f);
      }
      weighted_sum(row.data(), scale.data(), static_cast<int64_t>(row.size()), to + n * width, width);
    }
  });
}

}  // namespace

void sum_pairs(const Tensor& rows, const Tensor& weights, const Tensor& tokens, const Tensor& out) {
  if (out.scalar_type() == torch::kFloat32)
    sum_pairs<float>(rows, weights, tokens, out);
  else
    sum_pairs<at::BFloat16>(rows, weights, tokens, out);
}

namespace {

// Pairs sorted by expert: one pass counts, one places. experts [N, K] int64 on the CPU, contiguous.
struct Sorted {
  Tensor slots, tokens;
  std::vector<int64_t> counts;
  Sorted(const Tensor& experts, int64_t count) : counts(static_cast<size_t>(count)) {
    const int64_t* expert = experts.const_data_ptr<int64_t>();
    const int64_t all = experts.numel(), width = experts.size(1);
    int64_t pairs = 0;
    for (int64_t i = 0; i < all; ++i) {
      if (expert[i] < 0) continue;
      check(expert[i] < count, "a routing names expert {} but there are {}", expert[i], count);
      ++counts[static_cast<size_t>(expert[i])];
      ++pairs;
    }
    std::vector<int64_t> next(counts.size());
    for (size_t e = 1; e < counts.size(); ++e) next[e] = next[e - 1] + counts[e - 1];
    slots = torch::empty({pairs}, torch::kInt64);
    tokens = torch::empty({pairs}, torch::kInt64);
    int64_t *slot = slots.data_ptr<int64_t>(), *token = tokens.data_ptr<int64_t>();
    for (int64_t i = 0; i < all; ++i) {
      if (expert[i] < 0) continue;
      const int64_t at = next[static_cast<size_t>(expert[i])]++;
      slot[at] = i;
      token[at] = i / width;
    }
  }
};

}  // namespace

Dispatch Dispatch::of(const Routing& routing, int64_t experts, const torch::Tensor& map) {
  const int64_t width = routing.experts.size(1);
  if (routing.experts.is_cpu() && !map.defined()) {
    Sorted sorted(routing.experts.contiguous(), experts);
    return {sorted.tokens, routing.gates.reshape({-1}).index_select(0, sorted.slots), sorted.slots,
            std::move(sorted.counts)};
  }
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
  const auto type = y.scalar_type();
  if (may_shorten({y, gates}) && y.is_cpu() && (type == torch::kFloat32 || type == torch::kBFloat16)) {
    auto out = torch::empty({rows, y.size(1)}, y.options());
    sum_pairs(y.contiguous(), gates.to(torch::kFloat32).contiguous(), tokens, out);
    return out;
  }
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
