#pragma once
// e^x for loops that the compiler vectorises. Always inlined, so that files built for different instruction sets never
// share a copy.
#include "moiety/kernels/half.h"

namespace moiety {

// What e^x is made of, -87 <= x <= 88, of a float or a vector of them: e^x = 2^n p, n in the low bits of `shifted`.
template <class F>
[[gnu::always_inline]] inline void exponential_parts(const F& x, F& shifted, F& p) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  shifted = x * 1.44269504f + 12582912.f;
  const F n = shifted - 12582912.f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  p = r * (1.f / 5040.f) + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
}

// e^x: 2^n times a polynomial of the rest, |rest| <= ln(2)/2; within 2 ulp. Clamped to what f32 holds as a normal
// number.
[[gnu::always_inline]] inline float exponential(float x) {
  const float clamped = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  float shifted, p;
  exponential_parts(clamped, shifted, p);
  const float power = float_from_bits((bits_of(shifted) - 0x4b400000u + 127u) << 23);
  return x != x ? x : p * power;
}

}  // namespace moiety
