#pragma once
// The one assignment solver of the project: every alignment of neurons asks it.
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace moiety {

/// The permutation p of 0 ... d-1 for which sum_a profit[a, p[a]] is largest; exact, in O(d^3) by shortest augmenting
/// paths (Jonker and Volgenant, Computing 38, 1987), on one thread, in f64. profit [d, d] of any float type. The same
/// matrix gives the same permutation, also where several are best. Error: not a square, a number that is not finite.
std::vector<int64_t> best_assignment(const torch::Tensor& profit);

}  // namespace moiety
