#pragma once
// What tests of pruned and merged experts share.
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe/moe_tools.h"
#include "moiety/base/random.h"
#include "moiety/compress/expert_statistics.h"

namespace moiety {

inline double distance(const ExpertWeights& a, const ExpertWeights& b) {
  double worst = std::max(distance(a.up, b.up), distance(a.down, b.down));
  if (a.gate.defined()) worst = std::max(worst, distance(a.gate, b.gate));
  return worst;
}

inline ExpertWeights random_expert(int64_t d, int64_t h, bool gated = true) {
  return {gated ? torch::randn({d, h}) : torch::Tensor(), torch::randn({d, h}), torch::randn({h, d})};
}

inline std::vector<ExpertWeights> random_experts(int64_t count, int64_t d, int64_t h, bool gated = true) {
  std::vector<ExpertWeights> out;
  for (int64_t e = 0; e < count; ++e) out.push_back(random_expert(d, h, gated));
  return out;
}

/// f_e(x): gated by SiLU, or with ReLU between two layers.
inline torch::Tensor output_of(const ExpertWeights& e, const torch::Tensor& x) {
  const auto up = torch::matmul(x, e.up.t());
  return torch::matmul(e.gate.defined() ? torch::silu(torch::matmul(x, e.gate.t())) * up : torch::relu(up), e.down.t());
}

inline std::vector<int64_t> random_order(int64_t n, uint64_t seed) {
  return RandomStream(seed, "order").permutation(n);
}

inline ExpertWeights noisy(const ExpertWeights& e, double size) {
  return {e.gate.defined() ? e.gate + size * torch::randn_like(e.gate) : e.gate, e.up + size * torch::randn_like(e.up),
          e.down + size * torch::randn_like(e.down)};
}

inline std::vector<int64_t> list_of(const torch::Tensor& t) {
  const auto i = t.to(torch::kInt64).contiguous();
  return {i.const_data_ptr<int64_t>(), i.const_data_ptr<int64_t>() + i.numel()};
}

}  // namespace moiety
