#pragma once
// Quants of block formats in 256-bit vectors, for files built with AVX2 or AVX-512.
#include <immintrin.h>

#include "moiety/kernels/block_layout.h"

namespace moiety {
namespace {

[[gnu::always_inline]] inline __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
[[gnu::always_inline]] inline __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// The 16 bytes' 32 nibbles in the order of the 32-element formats: all low ones, then all high ones.
[[gnu::always_inline]] inline __m256i nibbles32(const uint8_t* p) {
  const __m128i v = load128(p);
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
}

// 16 in element i where bit i of the word at p is set.
[[gnu::always_inline]] inline __m256i fifth_bits(const uint8_t* p) {
  const __m256i bytes =
      _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(p)),
                          _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bits = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits), _mm256_set1_epi8(16));
}

// What the 16 codes of E2M1 stand for, times two, and `offset` more.
template <int offset>
[[gnu::always_inline]] inline __m128i e2m1_table() {
  return _mm_add_epi8(load128(kE2m1Twice), _mm_set1_epi8(offset));
}

// Sub-block g of the nibbles of Q4_K and Q5_K.
[[gnu::always_inline]] inline __m256i k_nibbles(const uint8_t* quants, int g) {
  const __m256i v = load256(quants + 32 * (g / 2));
  return _mm256_and_si256(g % 2 == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}
// 16 where the fifth bit of sub-block g is set.
[[gnu::always_inline]] inline __m256i k_fifth_bits(__m256i high, int g) {
  const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << g));
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit), _mm256_set1_epi8(16));
}

// Elements 32 g to 32 g + 31 of a Q6_K block, too large by 32.
[[gnu::always_inline]] inline __m256i q6_k_quants(const uint8_t* w, int g) {
  const int half = g / 4, part = g % 4;
  const __m256i low = load256(w + 64 * half + 32 * (part & 1)), high = load256(w + 128 + 32 * half);
  return _mm256_or_si256(
      _mm256_and_si256(part < 2 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(15)),
      _mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(high, 2 * part), _mm256_set1_epi8(3)), 4));
}

// The six-bit scales of Q4_K and Q5_K as eight bytes, then the eight minimums.
[[gnu::always_inline]] inline __m128i k_scales(const uint8_t* s) {
  const uint32_t a = load<uint32_t>(s), b = load<uint32_t>(s + 4), c = load<uint32_t>(s + 8);
  constexpr uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, top = 0x30303030;
  return _mm_setr_epi32(static_cast<int>(a & six), static_cast<int>((c & four) | (a >> 2 & top)),
                        static_cast<int>(b & six), static_cast<int>((c >> 4 & four) | (b >> 2 & top)));
}

}  // namespace
}  // namespace moiety
