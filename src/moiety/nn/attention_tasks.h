#pragma once
// Attention with a backward pass, for training and for prompts: tasks over rows, heads and blocks of queries on all
// threads, with our own products inside. A block's scores are all that is ever held of the matrix of scores.
#include <torch/types.h>

#include "moiety/nn/attention.h"

namespace moiety {

/// Whether attend_by_tasks() takes these: f32 or bf16 on the CPU, features side by side in memory, where our products
/// are fast. Shapes as attend() has them.
bool runs_by_tasks(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, const torch::Tensor& allowed,
                   bool causal);

/// What attend() computes, with gradients for q, k, v and the sinks. allowed [1 or B, 1, T, S] bool, or undefined: then
/// `causal` hides later keys (T == S), else all are seen. The result [B, H, T, Dv] lies in memory as [B, T, H, Dv]. A
/// row that sees nothing gives zeros. The values do not depend on the number of threads, nor on whether a graph is
/// built. Gradients have no gradients of their own.
torch::Tensor attend_by_tasks(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                              const torch::Tensor& allowed, bool causal, const AttentionOptions& options);

}  // namespace moiety
