#pragma once
// f32 and the bits of bf16 behind one name, for loops that compute in f32. Always inlined and in an unnamed namespace,
// so that files built for different instruction sets never share a copy.
#include <cstdint>

#include "moiety/kernels/half.h"

namespace moiety {
namespace {

[[gnu::always_inline]] inline float load(float x) {
  return x;
}
[[gnu::always_inline]] inline float load(uint16_t x) {
  return bf16_to_float(x);
}
[[gnu::always_inline]] inline void store(float x, float* to) {
  *to = x;
}
// Without the branch for NaN, which would stop the compiler: a NaN keeps a bit of its payload.
[[gnu::always_inline]] inline void store(float x, uint16_t* to) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  *to = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 64u : rounded);
}

}  // namespace
}  // namespace moiety
