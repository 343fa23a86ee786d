#pragma once
// Gated feed-forward layers over packed matrices: the dense one, or the chosen experts of a mixture side by side.
#include <torch/types.h>

#include <functional>
#include <span>
#include <vector>

#include "moiety/nn/activation.h"
#include "moiety/nn/packed.h"

namespace moiety {

struct PackedGated {
  const PackedMatrix *gate, *up, *down;
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  ///< null: none
};
/// (gate x, up x) [P, f] f32 each -> what the down projection takes; may work in place.
using Combine = std::function<torch::Tensor(torch::Tensor g, torch::Tensor u)>;

/// down(combine(gate x, up x)) of every pair [P, d] f32. x [N, d] f32, contiguous; the first counts[0] pairs go through
/// experts[0], and so on; pair p is token tokens[p], or p where tokens are null. An expert without pairs is not touched
/// and may hold nulls.
torch::Tensor packed_gated(const torch::Tensor& x, std::span<const PackedGated> experts,
                           std::span<const int64_t> counts, const int64_t* tokens, const Combine& combine);

/// Adds a bias [width] to every row of y [rows, width], on the calling thread; null: does nothing.
void add_bias(const float* bias, int64_t rows, int64_t width, float* y);
/// What the kernel makes of (g, u) f32, contiguous, in place of g, on all threads.
torch::Tensor apply_times(const GateTimes& times, torch::Tensor g, const torch::Tensor& u);
/// act(g) * u, f32 and contiguous; silu and gelu work in place. A Combine for any activation.
torch::Tensor act_times(Activation act, torch::Tensor g, const torch::Tensor& u);

}  // namespace moiety
