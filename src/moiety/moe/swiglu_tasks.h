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

/// -> [N, d]. g and u [P, f] are filled with what gate and up gave when they are defined.
torch::Tensor swiglu_tasks_forward(const SwigluInputs& in, const torch::Tensor& g, const torch::Tensor& u);

/// Fills `out`, whose weight gradients are already zero where an expert has no row.
void swiglu_tasks_backward(const SwigluInputs& in, const torch::Tensor& g, const torch::Tensor& u,
                           const torch::Tensor& dy, SwigluGradients& out);

}  // namespace moiety
