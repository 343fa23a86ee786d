#pragma once
// The one top-k of the project: the lowest index wins ties, which torch's own does not promise.
#include <torch/types.h>

#include <utility>

namespace moiety {

/// The k largest of the last dimension, largest first: (values [..., k], indices [..., k] int64). Differentiable in the
/// values. Throws Error unless 1 <= k <= size.
std::pair<torch::Tensor, torch::Tensor> top_k(const torch::Tensor& scores, int64_t k);

/// Indices of the k largest of n numbers in the same order, NaN above all; for small k.
void largest(const float* numbers, int64_t n, int64_t k, int64_t* indices);

}  // namespace moiety
