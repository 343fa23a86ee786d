#pragma once
// The selective state space recurrence of Mamba (Gu and Dao 2023, arXiv 2312.00752), with a graph or without.
#include <torch/types.h>

#include <utility>

namespace moiety {

/// h[d, n] = exp(dt[d] a[n, d]) h[d, n] + dt[d] u[d] b[n] and y[d] = sum over n of c[n] h[d, n], token by token.
/// u, dt [B, T, D]; a [N, D]; b, c [B, T, N]; state [B, N, D] in front of the first token, undefined: zeros; what
/// [B, T] uint8 says what tokens are (kernels/scan.h), undefined: all are steps. -> y [B, T, D] and the last state.
/// f32 on the CPU by a kernel, whose tasks give the same bits for any number of threads and which keeps one state in
/// kScanChunk for the backward pass; everything else token by token. Error: other shapes or types, N above 256.
std::pair<torch::Tensor, torch::Tensor> selective_scan(const torch::Tensor& u, const torch::Tensor& dt,
                                                       const torch::Tensor& a, const torch::Tensor& b,
                                                       const torch::Tensor& c, const torch::Tensor& state,
                                                       const torch::Tensor& what);
/// The same by torch operations, in any floating type: what the kernel is compared with.
std::pair<torch::Tensor, torch::Tensor> selective_scan_composite(const torch::Tensor& u, const torch::Tensor& dt,
                                                                 const torch::Tensor& a, const torch::Tensor& b,
                                                                 const torch::Tensor& c, const torch::Tensor& state,
                                                                 const torch::Tensor& what);

}  // namespace moiety
