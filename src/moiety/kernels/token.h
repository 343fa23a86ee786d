#pragma once
// What a decoder does to tokens between its matrix products, each in one pass over memory. All f32.
#include <cstdint>

#include "moiety/kernels/format.h"

namespace moiety {

/// out[i] = x[i] / sqrt(mean(x^2) + eps) * (offset + weight[i]), n elements; `out` may be `x`.
void rms_norm(const float* x, const float* weight, float offset, float eps, float* out, int64_t n);

/// The same of bf16 (its bits): x / sqrt(...) is rounded to bf16 before the weight where offset is 0, as the models
/// that were trained so have it.
void rms_norm(const uint16_t* x, const float* weight, float offset, float eps, uint16_t* out, int64_t n);
/// Its gradient from that of the output: dx, and dw[i] += what this row gives; dw may be null.
void rms_norm_backward(const float* x, const float* weight, float offset, float eps, const float* dy, float* dx,
                       float* dw, int64_t n);
void rms_norm_backward(const uint16_t* x, const float* weight, float offset, float eps, const uint16_t* dy,
                       uint16_t* dx, float* dw, int64_t n);

/// Rotates the first 2 * half of n features of one head by angles given as cosines and sines [half]: pairs (i, i +
/// half), or (2i, 2i + 1) when interleaved. The other features are copied. `out` must not overlap `x`.
void rotate_head(const float* x, const float* cosine, const float* sine, int64_t half, bool interleaved, float* out,
                 int64_t n);
void rotate_head(const uint16_t* x, const float* cosine, const float* sine, int64_t half, bool interleaved,
                 uint16_t* out, int64_t n);

/// g[i] = silu(g[i]) * u[i].
void silu_times(float* g, const float* u, int64_t n);
/// g[i] = gelu(g[i]) * u[i] with the approximation by tanh (Hendrycks & Gimpel 2016, arXiv 1606.08415).
void gelu_tanh_times(float* g, const float* u, int64_t n);
/// g[i] = (u[i] in [-limit, limit] + 1) * x * sigmoid(alpha * x), x = min(g[i], limit): the gate of gpt-oss.
void clamped_times(float* g, const float* u, float alpha, float limit, int64_t n);

/// y[r] = row r of w [rows, n] times x [n].
void rows_times(const float* w, int64_t rows, int64_t n, const float* x, float* y);

/// One query position of `heads` heads that share keys and values, over `length` cached positions: for every head
/// softmax(scale * q k^T, soft-capped) v. q [heads, size]; k, v: rows of `size` and `v_size` elements one behind the
/// other, stored as their formats say and widened a few positions at a time; seen [length] or null (all); sinks [heads]
/// or null: logits that take probability and give nothing; out [heads, v_size]. `scratch` has room for
/// attend_scratch(a) numbers. Positions that are not seen count as minus infinity; at least one is seen.
struct AttendRow {
  const float* q;
  const void *k, *v;
  int64_t heads, size, v_size, length;
  float scale, softcap;
  const bool* seen;
  const float* sinks;
  Format k_format = Format::F32, v_format = Format::F32;
};
int64_t attend_scratch(const AttendRow& a);
void attend_row(const AttendRow& a, float* scratch, float* out);

}  // namespace moiety
