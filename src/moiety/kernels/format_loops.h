// Plain decoding loops, one a format. Included by format*.cpp, each built for another instruction set; everything is in
// an unnamed namespace so that no copy is shared between them. The order of the float operations is the formats'
// definition (and these files are built without contraction to fused multiply-add), so all sets give the same bits.
#include <cstddef>
#include <cstdint>

#include "moiety/kernels/format_decoders.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

template <class T>
[[gnu::always_inline]] inline T load(const uint8_t* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
[[gnu::always_inline]] inline float load_half(const uint8_t* p) {
  return half_to_float(load<uint16_t>(p));
}

template <class T>
void decode_numbers(const uint8_t* p, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(load<T>(p + i * static_cast<int64_t>(sizeof(T))));
}

void decode_f32(const uint8_t* p, float* out, int64_t n) {
  __builtin_memcpy(out, p, static_cast<size_t>(n) * 4);
}

void decode_f16(const uint8_t* p, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i))));
#endif
  for (; i < n; ++i) out[i] = load_half(p + 2 * i);
}

void decode_bf16(const uint8_t* p, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(load<uint16_t>(p + 2 * i));
}

void decode_bool(const uint8_t* p, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = p[i] != 0 ? 1.f : 0.f;
}

// Sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity, all ones is NaN.
void decode_f8_e4m3(const uint8_t* p, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = p[i] & 0x7fu;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    uint32_t bits = (magnitude << 20) + (120u << 23);
    bits = magnitude < 8 ? bits_of(subnormal) : bits;
    bits = magnitude == 0x7f ? 0x7fc00000u : bits;
    out[i] = float_from_bits(bits | static_cast<uint32_t>(p[i] & 0x80u) << 24);
  }
}

void decode_f8_e5m2(const uint8_t* p, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(static_cast<uint16_t>(p[i] << 8));
}

void decode_q8_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 34, out += 32) {
    const float d = load_half(p);
    const auto* q = reinterpret_cast<const int8_t*>(p + 2);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i]);
  }
}

void decode_q4_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 18, out += 32) {
    const float d = load_half(p);
    const uint8_t* q = p + 2;
    for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>((q[j] & 15) - 8);
    for (int j = 0; j < 16; ++j) out[j + 16] = d * static_cast<float>((q[j] >> 4) - 8);
  }
}

void decode_q4_1(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 20, out += 32) {
    const float d = load_half(p), m = load_half(p + 2);
    const uint8_t* q = p + 4;
    for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>(q[j] & 15) + m;
    for (int j = 0; j < 16; ++j) out[j + 16] = d * static_cast<float>(q[j] >> 4) + m;
  }
}

void decode_q5_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 22, out += 32) {
    const float d = load_half(p);
    const uint32_t high = load<uint32_t>(p + 2);
    const uint8_t* q = p + 6;
    for (int j = 0; j < 16; ++j)
      out[j] = d * static_cast<float>(static_cast<int>((q[j] & 15u) | (high >> j & 1u) << 4) - 16);
    for (int j = 0; j < 16; ++j)
      out[j + 16] = d * static_cast<float>(static_cast<int>((q[j] >> 4) | (high >> (j + 16) & 1u) << 4) - 16);
  }
}

void decode_q5_1(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 24, out += 32) {
    const float d = load_half(p), m = load_half(p + 2);
    const uint32_t high = load<uint32_t>(p + 4);
    const uint8_t* q = p + 8;
    for (int j = 0; j < 16; ++j)
      out[j] = d * static_cast<float>(static_cast<int>((q[j] & 15u) | (high >> j & 1u) << 4)) + m;
    for (int j = 0; j < 16; ++j)
      out[j + 16] = d * static_cast<float>(static_cast<int>((q[j] >> 4) | (high >> (j + 16) & 1u) << 4)) + m;
  }
}

struct ScaleMin {
  int scale, min;
};
[[gnu::always_inline]] inline ScaleMin k_scale(const uint8_t* s, int g) {
  if (g < 4) return {s[g] & 63, s[g + 4] & 63};
  return {(s[g + 4] & 15) | (s[g - 4] >> 6) << 4, (s[g + 4] >> 4) | (s[g] >> 6) << 4};
}

void decode_q4_k(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += 144) {
    const float d = load_half(p), dmin = load_half(p + 2);
    const uint8_t* q = p + 16;
    for (int c = 0; c < 4; ++c, q += 32, out += 64) {
      const ScaleMin a = k_scale(p + 4, 2 * c), b = k_scale(p + 4, 2 * c + 1);
      const float da = d * static_cast<float>(a.scale), ma = dmin * static_cast<float>(a.min);
      const float db = d * static_cast<float>(b.scale), mb = dmin * static_cast<float>(b.min);
      for (int l = 0; l < 32; ++l) out[l] = da * static_cast<float>(q[l] & 15) - ma;
      for (int l = 0; l < 32; ++l) out[l + 32] = db * static_cast<float>(q[l] >> 4) - mb;
    }
  }
}

void decode_q5_k(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += 176) {
    const float d = load_half(p), dmin = load_half(p + 2);
    const uint8_t* high = p + 16;
    const uint8_t* q = p + 48;
    for (int c = 0; c < 4; ++c, q += 32, out += 64) {
      const ScaleMin a = k_scale(p + 4, 2 * c), b = k_scale(p + 4, 2 * c + 1);
      const float da = d * static_cast<float>(a.scale), ma = dmin * static_cast<float>(a.min);
      const float db = d * static_cast<float>(b.scale), mb = dmin * static_cast<float>(b.min);
      for (int l = 0; l < 32; ++l) out[l] = da * static_cast<float>((q[l] & 15) | (high[l] >> (2 * c) & 1) << 4) - ma;
      for (int l = 0; l < 32; ++l)
        out[l + 32] = db * static_cast<float>((q[l] >> 4) | (high[l] >> (2 * c + 1) & 1) << 4) - mb;
    }
  }
}

void decode_q6_k(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += 210) {
    const auto* scales = reinterpret_cast<const int8_t*>(p + 192);
    const float d = load_half(p + 208);
    for (int half = 0; half < 2; ++half, out += 128) {
      const uint8_t* low = p + 64 * half;
      const uint8_t* high = p + 128 + 32 * half;
      for (int part = 0; part < 4; ++part)  // 32 elements each, two scales
        for (int k = 0; k < 2; ++k) {
          const float scale = d * static_cast<float>(scales[8 * half + 2 * part + k]);
          const uint8_t* l = low + 32 * (part & 1) + 16 * k;
          const uint8_t* h = high + 16 * k;
          float* o = out + 32 * part + 16 * k;
          const int nibble = part < 2 ? 0 : 4, pair = 2 * part;
          for (int i = 0; i < 16; ++i)
            o[i] = scale * static_cast<float>(((l[i] >> nibble & 15) | (h[i] >> pair & 3) << 4) - 32);
        }
    }
  }
}

// Digit k of a byte that holds five base-3 digits as ceil(256 v / 243), most significant first.
[[gnu::always_inline]] inline int base3_digit(uint8_t byte, int power) {
  return (static_cast<int>(static_cast<uint8_t>(byte * power)) * 3) >> 8;
}

void decode_tq1_0(const uint8_t* p, float* out, int64_t n) {
  constexpr int kPower[5] = {1, 3, 9, 27, 81};
  for (; n > 0; n -= 256, p += 54, out += 256) {
    const float d = load_half(p + 52);
    for (int k = 0; k < 5; ++k)
      for (int m = 0; m < 32; ++m) out[m + 32 * k] = d * static_cast<float>(base3_digit(p[m], kPower[k]) - 1);
    for (int k = 0; k < 5; ++k)
      for (int m = 0; m < 16; ++m)
        out[160 + m + 16 * k] = d * static_cast<float>(base3_digit(p[32 + m], kPower[k]) - 1);
    for (int k = 0; k < 4; ++k)
      for (int m = 0; m < 4; ++m) out[240 + m + 4 * k] = d * static_cast<float>(base3_digit(p[48 + m], kPower[k]) - 1);
  }
}

void decode_tq2_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += 66, out += 256) {
    const float d = load_half(p + 64);
    for (int j = 0; j < 2; ++j)
      for (int k = 0; k < 4; ++k)
        for (int m = 0; m < 32; ++m)
          out[128 * j + m + 32 * k] = d * static_cast<float>((p[32 * j + m] >> (2 * k) & 3) - 1);
  }
}

constexpr float kE2m1Twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.f, -1, -2, -3, -4, -6, -8, -12};

// 2^(e - 128): the doubled table above makes it half the stored scale.
[[gnu::always_inline]] inline float e8m0_half(uint8_t e) {
  return float_from_bits(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23);
}

void decode_mxfp4(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 17, out += 32) {
    const float d = e8m0_half(p[0]);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * kE2m1Twice[p[1 + j] & 15];
      out[j + 16] = d * kE2m1Twice[p[1 + j] >> 4];
    }
  }
}

constexpr Decoder kDecoders[] = {
    decode_f32,
    decode_f16,
    decode_bf16,
    decode_numbers<double>,
    decode_numbers<int8_t>,
    decode_numbers<uint8_t>,
    decode_numbers<int16_t>,
    decode_numbers<uint16_t>,
    decode_numbers<int32_t>,
    decode_numbers<uint32_t>,
    decode_numbers<int64_t>,
    decode_numbers<uint64_t>,
    decode_bool,
    decode_f8_e4m3,
    decode_f8_e5m2,
    decode_q8_0,
    decode_q4_0,
    decode_q4_1,
    decode_q5_0,
    decode_q5_1,
    decode_q4_k,
    decode_q5_k,
    decode_q6_k,
    decode_tq1_0,
    decode_tq2_0,
    decode_mxfp4,
};

}  // namespace
}  // namespace moiety
