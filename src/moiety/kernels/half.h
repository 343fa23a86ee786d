#pragma once
// IEEE half and bfloat16 to and from float32, round to nearest even, subnormals kept. Independent of the floating-point
// flush modes. Always inlined, so that files built for different instruction sets never share a copy.
#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace moiety {

[[gnu::always_inline]] inline float float_from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
[[gnu::always_inline]] inline uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

[[gnu::always_inline]] inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t magnitude = h & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  bits |= magnitude > 0x7c00u ? 0x00400000u : 0u;   // NaN becomes quiet, as the hardware does
  bits = magnitude < 0x400u ? __builtin_bit_cast(uint32_t, subnormal) : bits;
  return float_from_bits(bits | static_cast<uint32_t>(h & 0x8000u) << 16);
#endif
}

/// Values that round to 65536 or more become infinity.
[[gnu::always_inline]] inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = 0;
  if (magnitude > 0x7f800000u)
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  else if (magnitude >= 0x477ff000u)  // 65520 is half way to the first value beyond the largest half
    half = 0x7c00u;
  else if (magnitude < 0x38800000u)  // subnormal: the sum with 0.5 rounds to a multiple of 2^-24
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  else
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  return static_cast<uint16_t>(sign | half);
#endif
}

[[gnu::always_inline]] inline float bf16_to_float(uint16_t h) {
  return float_from_bits(static_cast<uint32_t>(h) << 16);
}

[[gnu::always_inline]] inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace moiety
