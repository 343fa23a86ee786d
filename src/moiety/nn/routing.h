#pragma once
// What a router decided. Rows are tokens: row n of N = B*T is token (n / T, n % T) of the batch.
#include <torch/types.h>

#include <compare>
#include <cstdint>
#include <string>

namespace moiety {

/// Where a decision was taken. Keyed by place and not by module: one module may run at many depths, or several rounds
/// in one.
struct Site {
  int64_t block = 0;
  int64_t round = 0;
  std::string site = "ffn";  ///< ffn, attention, q_proj, ...
  auto operator<=>(const Site&) const = default;
};

struct Routing {
  torch::Tensor experts;  ///< [N, K] int64, -1 in an unused slot
  torch::Tensor gates;    ///< [N, K] f32, 0 in an unused slot
  torch::Tensor scores;   ///< [N, E] f32, the full distribution (after softmax or sigmoid)
  torch::Tensor logits;   ///< [N, E] f32
};

}  // namespace moiety
