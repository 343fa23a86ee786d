#pragma once
// Products inside a task, which run on its thread alone (tasks.h).
#include <torch/types.h>

namespace moiety {

/// [rows, columns], columns side by side in memory; `index` [n] int64 gathers rows, then the matrix may be transposed.
struct Operand {
  torch::Tensor matrix;
  bool transposed = false;
  torch::Tensor index = {};
};

/// out [m, n] = a b, or += for `add`. All on the CPU. What is computed in is a's type: an f32 b under a bf16 a is
/// rounded, and an f32 out of bf16 operands has the sums as they are. f32 and bf16 run by our own kernels where these
/// are fast: torch's bf16 products make code for every new shape, and the rows of experts never stop giving new ones.
void multiply(const torch::Tensor& out, const Operand& a, const Operand& b, bool add = false);
/// The same by torch, on any device and on all threads where it is not called in a task.
void multiply_by_torch(const torch::Tensor& out, const Operand& a, const Operand& b, bool add = false);

}  // namespace moiety
