#pragma once
// From a routing to the rows that experts see, and back. Written once and used by all.
#include <torch/types.h>

#include <vector>

#include "moiety/nn/routing.h"

namespace moiety {

/// The (token, expert) pairs of a routing, sorted by expert, tokens in order inside an expert. Sized by what is really
/// used: unused slots are left out, experts that share weights (`map` [E] -> physical expert) are joined and their
/// gates summed.
struct Dispatch {
  torch::Tensor tokens;         ///< [P] int64
  torch::Tensor gates;          ///< [P] f32, with gradient
  torch::Tensor slots;          ///< [P] int64: n * K + k of the pair; undefined with a map
  std::vector<int64_t> counts;  ///< [E] pairs per (physical) expert

  static Dispatch of(const Routing& routing, int64_t experts, const torch::Tensor& map = {});
  /// x [N, d] -> the rows of every pair [P, d].
  torch::Tensor gather(const torch::Tensor& x) const { return x.index_select(0, tokens); }
  /// Expert outputs [P, d] -> sum over pairs of gate * output [N, d].
  torch::Tensor reduce(const torch::Tensor& y, int64_t rows) const;
};

/// out [N, d] = sum over the pairs p of token n of weights[p] * rows[p], in the order of pairs; f32 or bf16 on the CPU,
/// contiguous, summed in f32. weights [P] f32, undefined: every weight is 1.
void sum_pairs(const torch::Tensor& rows, const torch::Tensor& weights, const torch::Tensor& tokens,
               const torch::Tensor& out);

/// The routing with at most `capacity` tokens an expert: tokens claim places in order, all choices of a token at once;
/// what finds no place is dropped (expert -1, gate 0, other gates stay). capacity >= 0, else Error.
Routing limit_capacity(const Routing& routing, int64_t experts, int64_t capacity);

/// floor(tokens * factor * slots / experts), the product taken in f64 and in this order (GShard, arXiv 2006.16668).
int64_t expert_capacity(int64_t tokens, int64_t slots, int64_t experts, double factor);

}  // namespace moiety
