// Loops that the compiler vectorises, included by token*.cpp, each built for another instruction set. Sums have one
// lane for each of 16 neighbours, so that their order is the same everywhere. Everything is in an unnamed namespace so
// that no copy is shared.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "moiety/kernels/exponential.h"
#include "moiety/kernels/format.h"
#include "moiety/kernels/load_store.h"
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

// Sums in f32 over any element type, in the order of dot().
template <class T, class F>
[[gnu::always_inline]] inline float sum_of(int64_t n, F term) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) sums[k] += term(i + k);
  for (int k = 0; i < n; ++i, ++k) sums[k] += term(i);
  return total(sums);
}

template <class T>
[[gnu::always_inline]] inline float norm_scale(const T* x, float eps, int64_t n) {
  const float square = sum_of<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { return load(x[i]) * load(x[i]); });
  return 1.f / std::sqrt(square / static_cast<float>(n) + eps);
}

template <class T>
void rms_norm_loop(const T* x, const float* weight, float offset, float eps, T* out, int64_t n) {
  const float scale = norm_scale(x, eps, n);
  if (offset != 0.f) {
    for (int64_t i = 0; i < n; ++i) store(load(x[i]) * scale * (offset + weight[i]), out + i);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    T normed;
    store(load(x[i]) * scale, &normed);
    store(load(normed) * weight[i], out + i);
  }
}

template <class T>
void rms_norm_backward_loop(const T* x, const float* weight, float offset, float eps, const T* dy, T* dx, float* dw,
                            int64_t n) {
  const float scale = norm_scale(x, eps, n);
  if (dw != nullptr)
    for (int64_t i = 0; i < n; ++i) dw[i] += load(dy[i]) * load(x[i]) * scale;
  const float along = sum_of<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { return load(dy[i]) * (offset + weight[i]) * load(x[i]); });
  const float back = scale * scale * scale * along / static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) store(load(dy[i]) * (offset + weight[i]) * scale - load(x[i]) * back, dx + i);
}

template <class T>
void rotate_loop(const T* x, const float* c, const float* s, int64_t half, bool interleaved, T* out, int64_t n) {
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x[2 * i]), b = load(x[2 * i + 1]);
      store(a * c[i] - b * s[i], out + 2 * i);
      store(b * c[i] + a * s[i], out + 2 * i + 1);
    }
  } else {
    for (int64_t i = 0; i < half; ++i) store(load(x[i]) * c[i] - load(x[half + i]) * s[i], out + i);
    for (int64_t i = 0; i < half; ++i) store(load(x[half + i]) * c[i] + load(x[i]) * s[i], out + half + i);
  }
  for (int64_t i = 2 * half; i < n; ++i) out[i] = x[i];
}

void silu_loop(float* g, const float* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] / (1.f + exponential(-g[i])) * u[i];
}

using Lanes [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float)), gnu::may_alias]] = float;

// Adds the halves of every group of kGroup lanes of a, and then of b.
template <int kGroup>
[[gnu::always_inline]] inline void fold(const Lanes& a, const Lanes& b, Lanes& out) {
  const auto with = [&]<size_t... i>(std::index_sequence<i...>) __attribute__((always_inline)) {
    constexpr int kHalf = kGroup / 2;
    out = __builtin_shufflevector(a, b, (i / kHalf * kGroup + i % kHalf)...) +
          __builtin_shufflevector(a, b, (i / kHalf * kGroup + kHalf + i % kHalf)...);
  };
  with(std::make_index_sequence<kLanes>());
}

// out[s] = dot(q, row s of k [16, size]): the same sums in the same order, with their lanes added up together.
[[gnu::always_inline]] inline void dots(const float* q, const float* k, int64_t size, float* out) {
  Lanes fours[4];
  for (int g = 0; g < 4; ++g) {
    Lanes sums[4] = {};
    for (int r = 0; r < 4; ++r, k += size) {
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes)
        sums[r] += *reinterpret_cast<const Lanes*>(q + i) * *reinterpret_cast<const Lanes*>(k + i);
      for (int lane = 0; i < size; ++i, ++lane) sums[r][lane] += q[i] * k[i];
    }
    Lanes low, high;
    fold<16>(sums[0], sums[1], low);
    fold<16>(sums[2], sums[3], high);
    fold<8>(low, high, fours[g]);
  }
  Lanes low, high, all;
  fold<4>(fours[0], fours[1], low);
  fold<4>(fours[2], fours[3], high);
  fold<2>(low, high, all);
  for (int s = 0; s < kLanes; ++s) out[s] = all[s];
}

// For kHeads heads, to[0 .. kWidth) += sum over s of p[s] * v[s * stride ...]; heads stand p_stride and stride apart.
// The sums stay in registers.
template <int kWidth, int kHeads = 1>
[[gnu::always_inline]] inline void weigh(const float* p, int64_t p_stride, const float* v, int64_t stride,
                                         int64_t length, float* to) {
  float sums[kHeads][kWidth];
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kWidth; ++i) sums[h][i] = to[h * stride + i];
  for (int64_t s = 0; s < length; ++s)
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kWidth; ++i) sums[h][i] += p[h * p_stride + s] * v[s * stride + i];
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kWidth; ++i) to[h * stride + i] = sums[h][i];
}

#if defined(__AVX512F__)
constexpr int kPairWidth = 64;  // what two heads have registers for
#else
constexpr int kPairWidth = 32;
#endif

// Calls body(first, count, rows) for all positions in tiles, rows [count, size] in f32.
template <class F>
[[gnu::always_inline]] inline void by_tiles(const void* data, Format format, int64_t size, int64_t length, float* wide,
                                            F body) {
  const auto* bytes = static_cast<const std::byte*>(data);
  const int64_t row = row_bytes(format, size), tile = attend_tile(size);
  for (int64_t first = 0; first < length; first += tile) {
    const int64_t count = length - first < tile ? length - first : tile;
    const std::byte* from = bytes + first * row;
    if (format == Format::F32) {
      body(first, count, reinterpret_cast<const float*>(from));
    } else {
      dequantize_row(format, from, wide, count * size);
      body(first, count, wide);
    }
  }
}

void attend_loop(const AttendRow& a, float* scratch, float* out) {
  float* factors = scratch + a.heads * a.length;
  float* wide = factors + a.heads;
  by_tiles(a.k, a.k_format, a.size, a.length, wide, [&](int64_t first, int64_t count, const float* k) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* q = a.q + h * a.size;
      float* p = scratch + h * a.length + first;
      int64_t s = 0;
      // Of the usual sizes the query stays in registers.
      if (a.size == 64)
        for (; s + kLanes <= count; s += kLanes) dots(q, k + s * 64, 64, p + s);
      else if (a.size == 128)
        for (; s + kLanes <= count; s += kLanes) dots(q, k + s * 128, 128, p + s);
      else
        for (; s + kLanes <= count; s += kLanes) dots(q, k + s * a.size, a.size, p + s);
      for (; s < count; ++s) p[s] = dot(q, k + s * a.size, a.size);
      for (s = 0; s < count; ++s) p[s] *= a.scale;
    }
  });
  for (int64_t h = 0; h < a.heads; ++h) {
    float* p = scratch + h * a.length;
    if (a.softcap != 0.f)
      for (int64_t s = 0; s < a.length; ++s) p[s] = a.softcap * std::tanh(p[s] / a.softcap);
    if (a.seen != nullptr)
      for (int64_t s = 0; s < a.length; ++s)
        if (!a.seen[s]) p[s] = -std::numeric_limits<float>::infinity();
    float largest[kLanes], most = a.sinks != nullptr ? a.sinks[h] : -std::numeric_limits<float>::infinity();
    for (float& x : largest) x = most;
    int64_t s = 0;
    for (; s + kLanes <= a.length; s += kLanes)
      for (int k = 0; k < kLanes; ++k) largest[k] = p[s + k] > largest[k] ? p[s + k] : largest[k];
    for (const float x : largest) most = x > most ? x : most;
    for (; s < a.length; ++s) most = p[s] > most ? p[s] : most;
    float sums[kLanes] = {};
    s = 0;
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
    factors[h] = 1.f / sum;
  }
  for (int64_t i = 0; i < a.heads * a.v_size; ++i) out[i] = 0.f;
  by_tiles(a.v, a.v_format, a.v_size, a.length, wide, [&](int64_t first, int64_t count, const float* v) {
    const int64_t n = a.v_size;
    int64_t h = 0;
    for (; h + 2 <= a.heads; h += 2) {
      const float* p = scratch + h * a.length + first;
      float* to = out + h * n;
      int64_t i = 0;
      for (; i + kPairWidth <= n; i += kPairWidth) weigh<kPairWidth, 2>(p, a.length, v + i, n, count, to + i);
      for (; i + 16 <= n; i += 16) weigh<16, 2>(p, a.length, v + i, n, count, to + i);
      for (; i < n; ++i) weigh<1, 2>(p, a.length, v + i, n, count, to + i);
    }
    for (; h < a.heads; ++h) {
      const float* p = scratch + h * a.length + first;
      float* to = out + h * n;
      int64_t i = 0;
      for (; i + 64 <= n; i += 64) weigh<64>(p, 0, v + i, n, count, to + i);
      for (; i + 16 <= n; i += 16) weigh<16>(p, 0, v + i, n, count, to + i);
      for (; i < n; ++i) weigh<1>(p, 0, v + i, n, count, to + i);
    }
  });
  for (int64_t h = 0; h < a.heads; ++h)
    for (int64_t i = 0; i < a.v_size; ++i) out[h * a.v_size + i] *= factors[h];
}

void gelu_loop(float* g, const float* u, int64_t n) {
  // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
  for (int64_t i = 0; i < n; ++i) {
    const float x = g[i], z = 1.5957691216f * (x + 0.044715f * x * x * x);
    g[i] = x / (1.f + exponential(-z)) * u[i];
  }
}

// Comparisons that let what is no number through.
void clamped_loop(float* g, const float* u, float alpha, float limit, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = g[i] > limit ? limit : g[i], y = u[i] > limit ? limit : u[i] < -limit ? -limit : u[i];
    g[i] = (y + 1.f) * (x / (1.f + exponential(-alpha * x)));
  }
}

void rows_loop(const float* w, int64_t rows, int64_t n, const float* x, float* y) {
  for (int64_t r = 0; r < rows; ++r) y[r] = dot(w + r * n, x, n);
}

constexpr TokenKernels kToken = {{rms_norm_loop<float>, rms_norm_backward_loop<float>, rotate_loop<float>},
                                 {rms_norm_loop<uint16_t>, rms_norm_backward_loop<uint16_t>, rotate_loop<uint16_t>},
                                 silu_loop,
                                 gelu_loop,
                                 clamped_loop,
                                 rows_loop,
                                 attend_loop};

}  // namespace
}  // namespace moiety
