#pragma once
// Matrix products of tokens sorted by expert with the experts' matrices: one call a projection, with gradients.
#include <torch/types.h>

#include <vector>

#include "moiety/moe/swiglu_tasks.h"

namespace moiety {

/// x [P, in] sorted by expert, weight [E, out, in], bias [E, out] or undefined, counts [E] with sum P -> [P, out]: row
/// p of expert e is W_e x_p + b_e. Experts with count 0 are not touched; their gradient is zero. x f32 or bf16, weight
/// and bias of x's dtype or f32, which is rounded on its way and gets gradients that are not.
torch::Tensor grouped_linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias,
                             const std::vector<int64_t>& counts);

/// The whole gated mixture in one step: sum over pairs of gate * down(silu(gate_w x) * up x).
/// x [N, d]; tokens [P] int64, gates [P] f32, both sorted by expert; gate, up [E, f, d], down [E, d, f] -> [N, d].
/// Dtypes as for grouped_linear. Neither gathered inputs nor expert outputs are kept for the backward pass: two [P, f]
/// tensors are.
torch::Tensor grouped_swiglu(const torch::Tensor& x, const torch::Tensor& tokens, const torch::Tensor& gates,
                             const std::vector<int64_t>& counts, const torch::Tensor& gate, const torch::Tensor& up,
                             const torch::Tensor& down);

/// grouped_swiglu in two halves, for experts that are not in memory together; without a graph, and bit for bit the
/// same. The outputs of the pairs of some experts, tokens [P'] and counts (0 for the others), out of `all` counts, in
/// any split; then, of all pairs in their order [P, d], the sum.
torch::Tensor swiglu_outputs(const torch::Tensor& x, const torch::Tensor& tokens, const torch::Tensor& gates,
                             const std::vector<int64_t>& counts, const std::vector<int64_t>& all,
                             const std::vector<SwigluMatrices>& matrices);
torch::Tensor swiglu_sum(const torch::Tensor& x, const torch::Tensor& outputs, const torch::Tensor& tokens,
                         const torch::Tensor& gates, const std::vector<int64_t>& counts);

}  // namespace moiety
