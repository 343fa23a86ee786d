// Loops over vectors of 16 neighbours, included by softmax*.cpp, each built for another instruction set. Sums have one
// lane for each of the 16, so that their order is the same everywhere. Everything is in an unnamed namespace so that no
// copy is shared between them.
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <limits>

#include "moiety/kernels/exponential.h"
#include "moiety/kernels/half.h"
#include "moiety/kernels/softmax_kernels.h"

namespace moiety {
namespace {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using Words [[gnu::vector_size(kLanes * sizeof(uint32_t))]] = uint32_t;
using Halves [[gnu::vector_size(kLanes * sizeof(uint16_t))]] = uint16_t;
using Bytes [[gnu::vector_size(kLanes)]] = uint8_t;

// The first `count` elements, the rest 0.
template <class Vector, class T>
[[gnu::always_inline]] inline void read(const T* from, int count, Vector& to) {
  to = Vector{};
  __builtin_memcpy(&to, from, static_cast<size_t>(count) * sizeof(T));
}
[[gnu::always_inline]] inline void get(const float* from, int count, Floats& to) {
  read(from, count, to);
}
[[gnu::always_inline]] inline void get(const uint16_t* from, int count, Floats& to) {
  Halves h;
  read(from, count, h);
  to = (Floats)(__builtin_convertvector(h, Words) << 16);
}
[[gnu::always_inline]] inline void put(const Floats& x, int count, float* to) {
  __builtin_memcpy(to, &x, static_cast<size_t>(count) * sizeof *to);
}
[[gnu::always_inline]] inline void put(const Floats& x, int count, uint16_t* to) {
#if defined(__AVX512BF16__)
  const auto h = _mm512_cvtneps_pbh((__m512)x);  // subnormal numbers give 0
#else
  const Words bits = (Words)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Halves h = __builtin_convertvector(x == x ? rounded : bits >> 16 | 64u, Halves);
#endif
  __builtin_memcpy(to, &h, static_cast<size_t>(count) * sizeof *to);
}

// Calls body(first, count): 16 elements at a time, known when compiled, then what is left.
template <class Body>
[[gnu::always_inline]] inline void by_lanes(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// By halves: one lane after another would take longer than the lanes themselves.
[[gnu::always_inline]] inline float total(const Floats& sums) {
  float x[kLanes];
  put(sums, kLanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
[[gnu::always_inline]] inline float largest_of(const Floats& values) {
  float x[kLanes];
  put(values, kLanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  return x[0];
}

// e^x, x <= 88, as exponential.h has it, but 0 below -87.
[[gnu::always_inline]] inline void exponential(Floats& x) {
  const Floats low = Floats{} - 87.f, clamped = low > x ? low : x;  // a NaN stays
  Floats shifted, p;
  exponential_parts(clamped, shifted, p);
  p *= (Floats)(((Words)shifted - (0x4b400000u - 127u)) << 23);
  x = x < low ? Floats{} : p;
}

// Within 2 ulp: a polynomial near zero, where the quotient would cancel.
[[gnu::always_inline]] inline void hyperbolic_tangent(Floats& x) {
  const Floats size = x < 0.f ? -x : x, s = x * x;
  Floats e = size > 44.f ? Floats{} + 88.f : size * 2.f;
  exponential(e);
  const Floats far = 1.f - 2.f / (e + 1.f);
  Floats p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const Floats near = x + x * s * p;
  x = size < 0.625f ? near : x < 0.f ? -far : far;
}

template <bool capped>
[[gnu::always_inline]] inline void logits(const Logits& l, Floats& x) {
  x *= l.scale;
  if constexpr (capped) {
    x *= 1.f / l.softcap;
    hyperbolic_tangent(x);
    x *= l.softcap;
  }
}

// x where seen, else `other`.
template <bool masked>
[[gnu::always_inline]] inline void where_seen(const Logits& l, int64_t at, int count, float other, Floats& x) {
  if constexpr (masked) {
    Bytes seen;
    read(l.seen + at, count, seen);
    x = __builtin_convertvector(seen, Words) != 0u ? x : Floats{} + other;
  }
}

// Scores become logits, unless those are mere multiples of them. Returns the largest of what is there now and of
// `most`.
template <bool capped, bool masked, bool plain = false>
float to_logits(const Logits& l, float* scores, float most) {
  Floats largest = Floats{} + most;
  by_lanes(
      l.n, [&](int64_t at, int count) __attribute__((always_inline)) {
        Floats z;
        get(scores + at, count, z);
        if constexpr (!plain) {
          logits<capped>(l, z);
          where_seen<masked>(l, at, count, -kInfinity, z);
          put(z, count, scores + at);
        }
        if (count == kLanes)
          largest = z > largest ? z : largest;
        else
          for (int i = 0; i < count; ++i) most = z[i] > most ? z[i] : most;
      });
  const float of_lanes = largest_of(largest);
  return of_lanes > most ? of_lanes : most;
}

template <class T>
SoftmaxSums softmax_row_loop(const Logits& l, float* scores, float sink, T* to) {
  const bool capped = l.softcap != 0.f, masked = l.seen != nullptr, plain = !capped && !masked && l.scale > 0.f;
  const auto pass = plain    ? to_logits<false, false, true>
                    : capped ? masked ? to_logits<true, true> : to_logits<true, false>
                    : masked ? to_logits<false, true>
                             : to_logits<false, false>;
  const float scale = plain ? l.scale : 1.f, of_scores = pass(l, scores, -kInfinity) * scale;
  float most = of_scores > sink ? of_scores : sink;
  if (most == -kInfinity) most = 0.f;
  Floats sums{};
  by_lanes(
      l.n, [&](int64_t at, int count) __attribute__((always_inline)) {
        Floats e;
        get(scores + at, count, e);
        e = e * scale - most;
        exponential(e);
        put(e, count, to + at);
        if (count == kLanes)
          sums += e;
        else
          for (int i = 0; i < count; ++i) sums[i] += e[i];
      });
  Floats of_sink = Floats{} + (sink - most);
  exponential(of_sink);
  const float sum = total(sums) + of_sink[0];
  // A NaN among the scores is in the sum, too.
  return sum == 0.f ? SoftmaxSums{kInfinity, 0.f} : SoftmaxSums{most + std::log(sum), 1.f / sum};
}

template <class T, bool capped, bool masked>
void backward_loop(const Logits& l, const float* scores, const float* dp, float log_sum, float delta, T* p, T* ds) {
  by_lanes(
      l.n, [&](int64_t at, int count) __attribute__((always_inline)) {
        Floats z, d{};
        get(scores + at, count, z);
        logits<capped>(l, z);
        if (dp != nullptr) {
          get(dp + at, count, d);
          d = (d - delta) * l.scale;
          if constexpr (capped) d *= 1.f - z * (1.f / l.softcap) * (z * (1.f / l.softcap));
        }
        z -= log_sum;
        exponential(z);
        where_seen<masked>(l, at, count, 0.f, z);
        put(z, count, p + at);
        if (dp == nullptr) return;
        d *= z;
        where_seen<masked>(l, at, count, 0.f, d);
        put(d, count, ds + at);
      });
}

template <class T>
void softmax_backward_loop(const Logits& l, const float* scores, const float* dp, float log_sum, float delta, T* p,
                           T* ds) {
  const bool masked = l.seen != nullptr;
  const auto loop = l.softcap != 0.f ? masked ? backward_loop<T, true, true> : backward_loop<T, true, false>
                    : masked ? backward_loop<T, false, true>
                                     : backward_loop<T, false, false>;
  loop(l, scores, dp, log_sum, delta, p, ds);
}

template <class T>
float row_dot_loop(const T* a, const T* b, int64_t n) {
  Floats sums{};
  by_lanes(
      n, [&](int64_t at, int count) __attribute__((always_inline)) {
        Floats x, y;
        get(a + at, count, x);
        get(b + at, count, y);
        sums += x * y;
      });
  return total(sums);
}

template <class T>
void scale_row_loop(const float* x, float factor, T* out, int64_t n) {
  by_lanes(
      n, [&](int64_t at, int count) __attribute__((always_inline)) {
        Floats y;
        get(x + at, count, y);
        put(y * factor, count, out + at);
      });
}

constexpr SoftmaxKernels kSoftmax = {
    {softmax_row_loop<float>, softmax_backward_loop<float>, row_dot_loop<float>, scale_row_loop<float>},
    {softmax_row_loop<uint16_t>, softmax_backward_loop<uint16_t>, row_dot_loop<uint16_t>, scale_row_loop<uint16_t>}};

}  // namespace
}  // namespace moiety
