#pragma once
// The gated mixture on the CPU as tasks (internal to grouped.cpp): pieces of an expert's rows, then blocks of its
// weight gradients, all experts side by side.
#include <torch/types.h>

#include <vector>

namespace moiety {

struct SwigluInputs {
  const torch::Tensor &x, &tokens, &gates;  ///< [N, d], [P] sorted by expert, [P] f32
  const torch::Tensor &gate, &up, &down;    ///< [E, f, d], [E, f, d], [E, d, f]
  const std::vector<int64_t>& counts;
};

/// What is undefined is not wanted.
struct SwigluGradients {
  torch::Tensor x, gates, gate, up, down;
};

/// Whether there are tasks enough for all threads: f32 or bf16 on the CPU, many rows or many experts.
bool runs_as_tasks(const SwigluInputs& in);

/// The matrices of one expert: gate and up [f, d], down [d, f].
struct SwigluMatrices {
  torch::Tensor gate, up, down;
};
/// The outputs of the pairs of some experts [P', d], as swiglu_tasks_forward computes them when all experts are there:
/// `counts` are those of these experts, 0 for others, `all` those of all; tokens [P'].
torch::Tensor swiglu_tasks_outputs(const torch::Tensor& x, const torch::Tensor& tokens,
                                   const std::vector<int64_t>& counts, const std::vector<int64_t>& all,
                                   const std::vector<SwigluMatrices>& matrices);

/// Whether the outputs of x [N, d] are computed by swiglu_rows(), by the number of tokens and the shape of the matrices
/// alone: see runs_by_rows().
bool runs_by_rows(const torch::Tensor& x, const SwigluMatrices& expert);
/// The outputs of the pairs of some experts [P', d] in x's type, as dot products: every matrix is read once. tokens
/// [P'].
torch::Tensor swiglu_rows(const torch::Tensor& x, const torch::Tensor& tokens, const std::vector<int64_t>& counts,
                          const std::vector<SwigluMatrices>& matrices);

/// -> [N, d]. g and u [P, f] are filled with what gate and up gave when they are defined.
torch::Tensor swiglu_tasks_forward(const SwigluInputs& in, const torch::Tensor& g, const torch::Tensor& u);

/// Fills `out`, whose weight gradients are already zero where an expert has no row.
void swiglu_tasks_backward(const SwigluInputs& in, const torch::Tensor& g, const torch::Tensor& u,
                           const torch::Tensor& dy, SwigluGradients& out);

}  // namespace moiety
