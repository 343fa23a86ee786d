// Loops that the compiler vectorises, included by token*.cpp, each built for another instruction set. Sums have one
// lane for each of 16 neighbours, so that their order is the same everywhere. Everything is in an unnamed namespace so
// that no copy is shared.
#include <cmath>
#include <cstdint>
#include <limits>

#include "moiety/kernels/exponential.h"
#include "moiety/kernels/token_kernels.h"

namespace moiety {
namespace {

constexpr int kLanes = 16;

// By halves: adding up one lane after another would take longer than the products.
[[gnu::always_inline]] inline float total(float (&sums)[kLanes]) {
  for (int i = 0; i < 8; ++i) sums[i] += sums[i + 8];
  for (int i = 0; i < 4; ++i) sums[i] += sums[i + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

[[gnu::always_inline]] inline float dot(const float* a, const float* b, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) sums[k] += a[i + k] * b[i + k];
  for (int k = 0; i < n; ++i, ++k) sums[k] += a[i] * b[i];
  return total(sums);
}

void rms_norm_loop(const float* x, const float* weight, float offset, float eps, float* out, int64_t n) {
  const float mean = dot(x, x, n) / static_cast<float>(n), scale = 1.f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * (offset + weight[i]);
}

void rotate_loop(const float* x, const float* c, const float* s, int64_t half, bool interleaved, float* out,
                 int64_t n) {
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * c[i] - b * s[i];
      out[2 * i + 1] = b * c[i] + a * s[i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) out[i] = x[i] * c[i] - x[half + i] * s[i];
    for (int64_t i = 0; i < half; ++i) out[half + i] = x[half + i] * c[i] + x[i] * s[i];
  }
  for (int64_t i = 2 * half; i < n; ++i) out[i] = x[i];
}

void silu_loop(float* g, const float* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] / (1.f + exponential(-g[i])) * u[i];
}

// to[0 .. kWidth) = sum over s of p[s] * v[s * stride ...]. The sums stay in registers.
template <int kWidth>
[[gnu::always_inline]] inline void weigh(const float* p, const float* v, int64_t stride, int64_t length, float* to) {
  float sums[kWidth] = {};
  for (int64_t s = 0; s < length; ++s)
    for (int i = 0; i < kWidth; ++i) sums[i] += p[s] * v[s * stride + i];
  for (int i = 0; i < kWidth; ++i) to[i] = sums[i];
}

void attend_loop(const AttendRow& a, float* scratch, float* out) {
  for (int64_t s = 0; s < a.length; ++s)
    for (int64_t h = 0; h < a.heads; ++h)
      scratch[h * a.length + s] = a.scale * dot(a.q + h * a.size, a.k + s * a.size, a.size);
  for (int64_t h = 0; h < a.heads; ++h) {
    float* p = scratch + h * a.length;
    if (a.softcap != 0.f)
      for (int64_t s = 0; s < a.length; ++s) p[s] = a.softcap * std::tanh(p[s] / a.softcap);
    if (a.seen != nullptr)
      for (int64_t s = 0; s < a.length; ++s)
        if (!a.seen[s]) p[s] = -std::numeric_limits<float>::infinity();
    float most = a.sinks != nullptr ? a.sinks[h] : -std::numeric_limits<float>::infinity();
    for (int64_t s = 0; s < a.length; ++s) most = p[s] > most ? p[s] : most;
    float sums[kLanes] = {};
    int64_t s = 0;
    // What lies 87 below the largest would be clamped, not vanish.
    const auto weight = [&](float x) __attribute__((always_inline)) {
      const float e = exponential(x - most);
      return x - most < -87.f ? 0.f : e;
    };
    for (; s + kLanes <= a.length; s += kLanes)
      for (int k = 0; k < kLanes; ++k) {
        p[s + k] = weight(p[s + k]);
        sums[k] += p[s + k];
      }
    for (int k = 0; s < a.length; ++s, ++k) {
      p[s] = weight(p[s]);
      sums[k] += p[s];
    }
    const float sum = total(sums) + (a.sinks != nullptr ? weight(a.sinks[h]) : 0.f);
    float* to = out + h * a.v_size;
    int64_t i = 0;
    for (; i + 64 <= a.v_size; i += 64) weigh<64>(p, a.v + i, a.v_size, a.length, to + i);
    for (; i + 16 <= a.v_size; i += 16) weigh<16>(p, a.v + i, a.v_size, a.length, to + i);
    for (; i < a.v_size; ++i) weigh<1>(p, a.v + i, a.v_size, a.length, to + i);
    const float scale = 1.f / sum;
    for (i = 0; i < a.v_size; ++i) to[i] *= scale;
  }
}

void gelu_loop(float* g, const float* u, int64_t n) {
  // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
  for (int64_t i = 0; i < n; ++i) {
    const float x = g[i], z = 1.5957691216f * (x + 0.044715f * x * x * x);
    g[i] = x / (1.f + exponential(-z)) * u[i];
  }
}

void rows_loop(const float* w, int64_t rows, int64_t n, const float* x, float* y) {
  for (int64_t r = 0; r < rows; ++r) y[r] = dot(w + r * n, x, n);
}

constexpr TokenKernels kToken = {rms_norm_loop, rotate_loop, silu_loop, gelu_loop, rows_loop, attend_loop};

}  // namespace
}  // namespace moiety
