#pragma once
// The elementwise work between the matrix products of a gated expert, in one pass over memory. Elements are f32, or
// bf16 as its bits; sums and intermediate values are f32.
#include <cstdint>

namespace moiety {

/// Backward pass of h = silu(g) * u for one row of n elements, h weighted by `share` behind the down projection:
/// t is the gradient of h before the weight. Writes share * h to `h`, the gradients to `dg` and `du` (`dg` may be `t`),
/// and returns the gradient of the weight, the sum of t * h. `h` may be null.
float swiglu_backward(const float* g, const float* u, const float* t, float share, float* h, float* dg, float* du,
                      int64_t n);
float swiglu_backward(const uint16_t* g, const uint16_t* u, const uint16_t* t, float share, uint16_t* h, uint16_t* dg,
                      uint16_t* du, int64_t n);

/// out = sum over i < count of weights[i] * rows[i] (every weight 1 for null), in this order; n elements a row.
void weighted_sum(const float* const* rows, const float* weights, int64_t count, float* out, int64_t n);
void weighted_sum(const uint16_t* const* rows, const float* weights, int64_t count, uint16_t* out, int64_t n);

}  // namespace moiety
