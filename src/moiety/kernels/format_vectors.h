// Decoding in vectors, for format_avx2.cpp and format_avx512.cpp: the same operations in the same order as the plain
// loops, which stay for the other formats.
#include <iterator>

#include "moiety/kernels/format.h"
#include "moiety/kernels/format_loops.h"
#include "moiety/kernels/vectors_avx2.h"

namespace moiety {
namespace {

struct Times {
  float scale;
};
struct TimesPlus {
  float scale, offset;
};

#if defined(__AVX512F__)
using Floats = __m512;
constexpr int kWidth = 16;
[[gnu::always_inline]] inline Floats floats(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
[[gnu::always_inline]] inline void put(float* out, Floats v, Times t) {
  _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_set1_ps(t.scale), v));
}
[[gnu::always_inline]] inline void put(float* out, Floats v, TimesPlus t) {
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(t.scale), v), _mm512_set1_ps(t.offset)));
}
#else
using Floats = __m256;
constexpr int kWidth = 8;
[[gnu::always_inline]] inline Floats floats(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
[[gnu::always_inline]] inline void put(float* out, Floats v, Times t) {
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_set1_ps(t.scale), v));
}
[[gnu::always_inline]] inline void put(float* out, Floats v, TimesPlus t) {
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(t.scale), v), _mm256_set1_ps(t.offset)));
}
#endif

// 16 signed bytes.
template <class T>
[[gnu::always_inline]] inline void put16(float* out, __m128i bytes, T how) {
  put(out, floats(bytes), how);
  if constexpr (kWidth == 8) put(out + 8, floats(_mm_unpackhi_epi64(bytes, bytes)), how);
}
template <class T>
[[gnu::always_inline]] inline void put32(float* out, __m256i bytes, T how) {
  put16(out, _mm256_castsi256_si128(bytes), how);
  put16(out + 16, _mm256_extracti128_si256(bytes, 1), how);
}
[[gnu::always_inline]] inline __m256i less(__m256i v, int offset) {
  return _mm256_sub_epi8(v, _mm256_set1_epi8(static_cast<char>(offset)));
}

void vector_q8_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 34, out += 32) put32(out, load256(p + 2), Times{load_half(p)});
}
void vector_q4_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 18, out += 32) put32(out, less(nibbles32(p + 2), 8), Times{load_half(p)});
}
void vector_q4_1(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 20, out += 32) put32(out, nibbles32(p + 4), TimesPlus{load_half(p), load_half(p + 2)});
}
void vector_q5_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 22, out += 32)
    put32(out, less(_mm256_or_si256(nibbles32(p + 6), fifth_bits(p + 2)), 16), Times{load_half(p)});
}
void vector_q5_1(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 32, p += 24, out += 32)
    put32(out, _mm256_or_si256(nibbles32(p + 8), fifth_bits(p + 4)), TimesPlus{load_half(p), load_half(p + 2)});
}

template <int kBytes, int kQuants, int kHigh>
void vector_scale_min(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += kBytes) {
    const float d = load_half(p), dmin = load_half(p + 2);
    __m256i high = _mm256_setzero_si256();
    if constexpr (kHigh != 0) high = load256(p + kHigh);
    for (int g = 0; g < 8; ++g, out += 32) {
      const ScaleMin s = k_scale(p + 4, g);
      __m256i v = k_nibbles(p + kQuants, g);
      if constexpr (kHigh != 0) v = _mm256_or_si256(v, k_fifth_bits(high, g));
      put32(out, v, TimesPlus{d * static_cast<float>(s.scale), -(dmin * static_cast<float>(s.min))});
    }
  }
}

void vector_q6_k(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += Q6K::kBytes) {
    const float d = load_half(p + 208);
    const auto scale = [&](int k) { return Times{d * static_cast<float>(static_cast<int8_t>(p[192 + k]))}; };
    for (int g = 0; g < 8; ++g, out += 32) {
      const __m256i v = less(q6_k_quants(p, g), 32);
      put16(out, _mm256_castsi256_si128(v), scale(2 * g));
      put16(out + 16, _mm256_extracti128_si256(v, 1), scale(2 * g + 1));
    }
  }
}

void vector_tq2_0(const uint8_t* p, float* out, int64_t n) {
  for (; n > 0; n -= 256, p += TQ20::kBytes) {
    const float d = load_half(p + 64);
    for (int g = 0; g < 8; ++g, out += 32)
      put32(out,
            less(_mm256_and_si256(_mm256_srli_epi16(load256(p + 32 * (g / 4)), 2 * (g % 4)), _mm256_set1_epi8(3)), 1),
            Times{d});
  }
}

struct DecoderTable {
  Decoder each[std::size(kDecoders)];
};
constexpr DecoderTable kVectorDecoders = [] {
  DecoderTable t{};
  for (size_t i = 0; i < std::size(kDecoders); ++i) t.each[i] = kDecoders[i];
  const auto set = [&t](Format f, Decoder d) { t.each[static_cast<size_t>(f)] = d; };
  set(Format::Q8_0, vector_q8_0);
  set(Format::Q4_0, vector_q4_0);
  set(Format::Q4_1, vector_q4_1);
  set(Format::Q5_0, vector_q5_0);
  set(Format::Q5_1, vector_q5_1);
  set(Format::Q4_K, vector_scale_min<Q4K::kBytes, 16, 0>);
  set(Format::Q5_K, vector_scale_min<Q5K::kBytes, 48, 16>);
  set(Format::Q6_K, vector_q6_k);
  set(Format::TQ2_0, vector_tq2_0);
  return t;
}();

}  // namespace
}  // namespace moiety
