// Plain decoding loops, one a format. Included by format*.cpp, each built for another instruction set; everything is in
// an unnamed namespace so that no copy is shared between them. The order of the float operations is the formats'
// definition (and these files are built without contraction to fused multiply-add), so all sets give the same bits.
#include "moiety/kernels/block_layout.h"
#include "moiety/kernels/format_decoders.h"

namespace moiety {
namespace {

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

template <class F>
void decode_32(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += F::kBytes, out += 32) {
    int8_t v[32];
    F::unpack(p, v);
    const float d = F::scale(p);
    if constexpr (F::kMin) {
      const float m = load_half(p + 2);
      for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(v[i]) + m;
    } else {
      for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(v[i]);
    }
  }
}

template <class F>
void decode_scale_min(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += F::kBytes) {
    int8_t v[256];
    F::unpack(p, v);
    const float d = load_half(p), dmin = load_half(p + 2);
    for (int g = 0; g < 8; ++g, out += 32) {
      const ScaleMin s = k_scale(p + 4, g);
      const float scale = d * static_cast<float>(s.scale), min = dmin * static_cast<float>(s.min);
      for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(v[32 * g + i]) - min;
    }
  }
}

void decode_q6_k(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += Q6K::kBytes) {
    int8_t v[256];
    Q6K::unpack(p, v);
    const float d = load_half(p + 208);
    for (int g = 0; g < 16; ++g, out += 16) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(p[192 + g]));
      for (int i = 0; i < 16; ++i) out[i] = scale * static_cast<float>(v[16 * g + i]);
    }
  }
}

template <class F>
void decode_ternary(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += F::kBytes, out += 256) {
    int8_t v[256];
    F::unpack(p, v);
    const float d = load_half(p + F::kBytes - 2);
    for (int i = 0; i < 256; ++i) out[i] = d * static_cast<float>(v[i]);
  }
}

// By table, because nibble 8 is -0.
void decode_mxfp4(const uint8_t* p, float* out, int64_t n) {
  constexpr float kTable[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.f, -1, -2, -3, -4, -6, -8, -12};
  for (; n > 0; n -= 32, p += 17, out += 32) {
    const float d = e8m0_half(p[0]);
    for (int j = 0; j < 16; ++j) {
      out[j] = d * kTable[p[1 + j] & 15];
      out[j + 16] = d * kTable[p[1 + j] >> 4];
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
    decode_32<Q80>,
    decode_32<Q40>,
    decode_32<Q41>,
    decode_32<Q50>,
    decode_32<Q51>,
    decode_scale_min<Q4K>,
    decode_scale_min<Q5K>,
    decode_q6_k,
    decode_ternary<TQ10>,
    decode_ternary<TQ20>,
    decode_mxfp4,
};

}  // namespace
}  // namespace moiety
