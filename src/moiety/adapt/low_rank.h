#pragma once
// What all low-rank adapters compute beside a frozen matrix: y + B (g * (A v)), by two thin products for all ranks
// together, with a gate for every rank, every expert (r ranks side by side), or none. LoRA: arXiv 2106.09685.
#include <torch/types.h>

#include "moiety/nn/routing.h"

namespace moiety {

/// t in x's type.
inline torch::Tensor like(const torch::Tensor& t, const torch::Tensor& x) {
  return t.scalar_type() == x.scalar_type() ? t : t.to(x.scalar_type());
}

/// y + scale * B (gates * (A v)), in y's dtype. y [..., out] is used up: it is changed in place and must not be needed
/// elsewhere. v [..., in]; a [R, in]; b [out, R]; gates [N, R], or [N, E] for E experts of R / E neighbouring ranks, or
/// undefined for 1 everywhere; N is the number of rows of v. Gradients reach y, v, a, b and gates; a gate of 0 keeps
/// its ranks' gradients at exactly 0.
torch::Tensor add_low_rank(torch::Tensor y, const torch::Tensor& v, const torch::Tensor& a, const torch::Tensor& b,
                           const torch::Tensor& gates, double scale);

/// The same for experts A [E, r, in], B [E, out, r] that were routed: gates [N, K] at experts [N, K] (-1: unused),
/// times scale [E] (undefined: 1) times `factor`. Where few of many ranks are chosen, only the chosen experts compute
/// (grouped products); else all ranks do, with gates of 0.
torch::Tensor add_routed(torch::Tensor y, const torch::Tensor& v, const torch::Tensor& a, const torch::Tensor& b,
                         const Routing& routing, double factor, const torch::Tensor& scale = {});

/// Gates of a routing as a table [N, E]; gates of an expert that stands twice in a row are added.
torch::Tensor gate_table(const Routing& routing, int64_t experts);

/// A [E, r, in] as [E r, in], B [E, out, r] as [out, E r].
torch::Tensor joined_a(const torch::Tensor& a);
torch::Tensor joined_b(const torch::Tensor& b);

}  // namespace moiety
