// Products with AVX-512 and VNNI: unsigned weights times signed activations, 64 to an instruction, into int32. The
// offset of the signed formats is taken out with the activation sums.
#if defined(__x86_64__)
#include "moiety/kernels/dot_loops.h"
#include "moiety/kernels/vectors_avx2.h"

namespace moiety {
namespace {

// The 16 bytes at a twice, then the 16 bytes at b twice.
[[gnu::always_inline]] inline __m512i twice(const uint8_t* a, const uint8_t* b) {
  return _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load128(a)), 0xff00, load128(b));
}
[[gnu::always_inline]] inline __m512i lanes16(int a, int b, int c, int d) {  // one 16-bit count a 128-bit lane
  const auto pair = [](int v) { return static_cast<long long>(v) * 0x0001000100010001ll; };
  return _mm512_set_epi64(pair(d), pair(d), pair(c), pair(c), pair(b), pair(b), pair(a), pair(a));
}
// Nibbles of two blocks of 32, in element order.
[[gnu::always_inline]] inline __m512i nibbles(const uint8_t* a, const uint8_t* b) {
  return _mm512_and_si512(_mm512_srlv_epi16(twice(a, b), lanes16(0, 4, 0, 4)), _mm512_set1_epi8(15));
}

// pair: the unsigned quants of the blocks at p and p + kBytes; one: of the block at p. kOffset: what they are too large
// by. The halves at p and p + kBytes, as floats.
template <int kBytes>
[[gnu::always_inline]] inline __m128 two_halves(const uint8_t* p) {
  return _mm_cvtph_ps(_mm_insert_epi16(_mm_cvtsi32_si128(load<uint16_t>(p)), load<int16_t>(p + kBytes), 1));
}

struct Q80Pair : Q80 {
  [[gnu::always_inline]] static __m128 two_scales(const uint8_t* p) { return two_halves<kBytes>(p); }
  static constexpr int kOffset = 128;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(load256(p + 2)), load256(p + kBytes + 2), 1);
    return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  [[gnu::always_inline]] static __m256i one(const uint8_t* p) {
    return _mm256_xor_si256(load256(p + 2), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
};
struct Q40Pair : Q40 {
  [[gnu::always_inline]] static __m128 two_scales(const uint8_t* p) { return two_halves<kBytes>(p); }
  static constexpr int kOffset = 8;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) { return nibbles(p + 2, p + kBytes + 2); }
  [[gnu::always_inline]] static __m256i one(const uint8_t* p) { return nibbles32(p + 2); }
};
struct Q41Pair : Q41 {
  static constexpr int kOffset = 0;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) { return nibbles(p + 4, p + kBytes + 4); }
  [[gnu::always_inline]] static __m256i one(const uint8_t* p) { return nibbles32(p + 4); }
};
[[gnu::always_inline]] inline __m512i fifth(__m512i low, const uint8_t* a, const uint8_t* b) {
  const __mmask64 high = load<uint32_t>(a) | static_cast<uint64_t>(load<uint32_t>(b)) << 32;
  return _mm512_mask_add_epi8(low, high, low, _mm512_set1_epi8(16));
}
struct Q50Pair : Q50 {
  [[gnu::always_inline]] static __m128 two_scales(const uint8_t* p) { return two_halves<kBytes>(p); }
  static constexpr int kOffset = 16;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    return fifth(nibbles(p + 6, p + kBytes + 6), p + 2, p + kBytes + 2);
  }
  [[gnu::always_inline]] static __m256i one(const uint8_t* p) {
    return _mm256_or_si256(nibbles32(p + 6), fifth_bits(p + 2));
  }
};
struct Q51Pair : Q51 {
  static constexpr int kOffset = 0;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    return fifth(nibbles(p + 8, p + kBytes + 8), p + 4, p + kBytes + 4);
  }
  [[gnu::always_inline]] static __m256i one(const uint8_t* p) {
    return _mm256_or_si256(nibbles32(p + 8), fifth_bits(p + 4));
  }
};
struct Mxfp4Pair : Mxfp4 {
  [[gnu::always_inline]] static __m128 two_scales(const uint8_t* p) {
    return _mm_setr_ps(scale(p), scale(p + kBytes), 0.f, 0.f);
  }
  static constexpr int kOffset = 12;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(e2m1_table<kOffset>()), nibbles(p + 1, p + kBytes + 1));
  }
  [[gnu::always_inline]] static __m256i one(const uint8_t* p) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(e2m1_table<kOffset>()), nibbles32(p + 1));
  }
};

// Two blocks a step. With minimums, (scale, minimum) of both blocks are converted together and multiplied by the
// activations' (scale, scaled sum).
template <class F>
float dot_pairs(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m512 products[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m128 rest = _mm_setzero_ps();
  const __m512i spread = F::kMin ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2)
                                 : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const auto step = [&](int64_t b, int k) {
    const uint8_t* p = w + b * F::kBytes;
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), F::pair(p), _mm512_loadu_si512(a.q + 32 * b));
    __m128 scales;
    if constexpr (F::kMin) {
      const __m128i halves = _mm_insert_epi32(_mm_cvtsi32_si128(load<int32_t>(p)), load<int32_t>(p + F::kBytes), 1);
      scales = _mm_mul_ps(_mm_cvtph_ps(halves), _mm_loadu_ps(a.scale_pairs + 2 * b));
      rest = _mm_add_ps(rest, scales);
    } else {
      scales = _mm_mul_ps(F::two_scales(p),
                          _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a.scale + b))));
      rest = _mm_fmadd_ps(scales, _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a.sum + b))), rest);
    }
    products[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums),
                                  _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(scales)), products[k]);
  };
  int64_t b = 0;
  for (; b + 4 <= blocks; b += 4) step(b, 0), step(b + 2, 1);
  if (b + 2 <= blocks) step(b, 0), b += 2;
  __m512 total = _mm512_add_ps(products[0], products[1]);
  float last = 0;
  if (b < blocks) {
    const uint8_t* p = w + b * F::kBytes;
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), F::one(p), load256(a.q + 32 * b));
    const float scale = F::scale(p) * a.scale[b];
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale));
    total = _mm512_add_ps(total, _mm512_zextps256_ps512(product));
    last = F::kMin ? load_half(p + 2) * a.scaled_sum[b] : -static_cast<float>(F::kOffset) * (scale * a.sum[b]);
  }
  const __m512 others = _mm512_zextps128_ps512(rest);
  if constexpr (F::kMin)  // the minimums' products lie in the odd elements
    total = _mm512_mask_add_ps(total, 0x000a, total, others);
  else
    total = _mm512_fnmadd_ps(others, _mm512_set1_ps(static_cast<float>(F::kOffset)), total);
  return _mm512_reduce_add_ps(total) + last;
}

// ---- 256-element formats --------------------------------------------------------------------------------------------

[[gnu::always_inline]] inline __m512i both_nibbles(const uint8_t* q) {  // 32 low nibbles, then the 32 high ones
  const __m512i v = _mm512_broadcast_i64x4(load256(q));
  return _mm512_and_si512(_mm512_srlv_epi16(v, lanes16(0, 0, 4, 4)), _mm512_set1_epi8(15));
}

// Q4_K and Q5_K: kQuants is where the nibbles start, kHigh the fifth bits (0: none).
template <int kBytes, int kQuants, int kHigh>
float dot_scale_min_512(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m512 products = _mm512_setzero_ps();
  __m128 mins = _mm_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, w += kBytes) {
    const __m128i both = k_scales(w + 4);
    const __m512i scales = _mm512_castsi256_si512(_mm256_cvtepu8_epi32(both));
    __m512i high = _mm512_setzero_si512();
    if constexpr (kHigh != 0) high = _mm512_broadcast_i64x4(load256(w + kHigh));
    __m512i total = _mm512_setzero_si512();
    const auto chunk = [&]<int c>() {
      __m512i v = both_nibbles(w + kQuants + 32 * c);
      if constexpr (kHigh != 0) {
        const __m512i bits = _mm512_inserti64x4(_mm512_set1_epi8(static_cast<char>(1 << (2 * c))),
                                                _mm256_set1_epi8(static_cast<char>(2 << (2 * c))), 1);
        v = _mm512_mask_add_epi8(v, _mm512_test_epi8_mask(high, bits), v, _mm512_set1_epi8(16));
      }
      const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), v, _mm512_loadu_si512(a.q + 256 * b + 64 * c));
      const __m512i which = _mm512_inserti64x4(_mm512_set1_epi32(2 * c), _mm256_set1_epi32(2 * c + 1), 1);
      // A lane's sum fits 16 bits and the scale's upper half is zero: a 16-bit product is enough.
      total = _mm512_dpwssd_epi32(total, sums, _mm512_permutexvar_epi32(which, scales));
    };
    chunk.template operator()<0>();
    chunk.template operator()<1>();
    chunk.template operator()<2>();
    chunk.template operator()<3>();
    const __m128i min = _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_unpackhi_epi64(both, both)), load128(a.sums32 + 8 * b));
    const float d = load_half(w) * a.scale[b], dmin = load_half(w + 2) * a.scale[b];
    products = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(d), products);
    mins = _mm_fmadd_ps(_mm_cvtepi32_ps(min), _mm_set1_ps(dmin), mins);
  }
  return _mm512_reduce_add_ps(_mm512_sub_ps(products, _mm512_zextps128_ps512(mins)));
}

float dot_q6_k_512(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m512 products = _mm512_setzero_ps();
  __m256 rest = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, w += Q6K::kBytes) {
    const __m128i scale_bytes = load128(w + 192);
    const __m512i scales = _mm512_and_si512(_mm512_cvtepi8_epi32(scale_bytes), _mm512_set1_epi32(0xffff));
    __m512i total = _mm512_setzero_si512();
    const auto half = [&]<int n>() {
      const __m512i low = _mm512_loadu_si512(w + 64 * n);
      const __m512i high = _mm512_broadcast_i64x4(load256(w + 128 + 32 * n));
      const __m512i nibble = _mm512_set1_epi8(15), pair = _mm512_set1_epi8(0x30);
      const __m512i first = _mm512_or_si512(_mm512_and_si512(low, nibble),
                                            _mm512_and_si512(_mm512_sllv_epi16(high, lanes16(4, 4, 2, 2)), pair));
      const __m512i second = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), nibble),
                                             _mm512_and_si512(_mm512_srlv_epi16(high, lanes16(0, 0, 2, 2)), pair));
      const int8_t* q = a.q + 256 * b + 128 * n;
      const __m512i groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      const __m512i sums1 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(q));
      const __m512i sums2 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), second, _mm512_loadu_si512(q + 64));
      total = _mm512_dpwssd_epi32(total, sums1,
                                  _mm512_permutexvar_epi32(_mm512_add_epi32(groups, _mm512_set1_epi32(8 * n)), scales));
      total = _mm512_dpwssd_epi32(
          total, sums2, _mm512_permutexvar_epi32(_mm512_add_epi32(groups, _mm512_set1_epi32(8 * n + 4)), scales));
    };
    half.template operator()<0>();
    half.template operator()<1>();
    const __m256i offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(scale_bytes), load256(a.sums16 + 16 * b));
    const float d = load_half(w + 208) * a.scale[b];
    products = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(d), products);
    rest = _mm256_fmadd_ps(_mm256_cvtepi32_ps(offset), _mm256_set1_ps(-32.f * d), rest);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(products, _mm512_zextps256_ps512(rest)));
}

float dot_tq2_0_512(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m512 products = _mm512_setzero_ps();
  float rest = 0;
  for (int64_t b = 0; b < blocks; ++b, w += TQ20::kBytes) {
    __m512i total = _mm512_setzero_si512();
    for (int j = 0; j < 2; ++j) {
      const __m512i codes = _mm512_broadcast_i64x4(load256(w + 32 * j));
      const __m512i two_bits = _mm512_set1_epi8(3);
      const int8_t* q = a.q + 256 * b + 128 * j;
      total = _mm512_dpbusd_epi32(total, _mm512_and_si512(_mm512_srlv_epi16(codes, lanes16(0, 0, 2, 2)), two_bits),
                                  _mm512_loadu_si512(q));
      total = _mm512_dpbusd_epi32(total, _mm512_and_si512(_mm512_srlv_epi16(codes, lanes16(4, 4, 6, 6)), two_bits),
                                  _mm512_loadu_si512(q + 64));
    }
    const float d = load_half(w + 64) * a.scale[b];
    products = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(d), products);
    rest += d * a.sum[b];
  }
  return _mm512_reduce_add_ps(products) - rest;
}

// ---- float weights --------------------------------------------------------------------------------------------------

struct VectorF32 {
  static constexpr int kBytes = 4;
  [[gnu::always_inline]] static __m512 at(const uint8_t* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
};
struct VectorF16 {
  static constexpr int kBytes = 2;
  [[gnu::always_inline]] static __m512 at(const uint8_t* p, __mmask16 m) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
  }
};
struct VectorBf16 {
  static constexpr int kBytes = 2;
  [[gnu::always_inline]] static __m512 at(const uint8_t* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
};

template <class V>
void dot_floats_512(const uint8_t* w, int64_t rows, int64_t cols, const float* x, float* y) {
  for (int64_t r = 0; r < rows; ++r, w += cols * V::kBytes) {
    __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 64 <= cols; i += 64)
      for (int k = 0; k < 4; ++k)
        part[k] =
            _mm512_fmadd_ps(V::at(w + (i + 16 * k) * V::kBytes, 0xffff), _mm512_loadu_ps(x + i + 16 * k), part[k]);
    for (; i < cols; i += 16) {
      const auto mask = static_cast<__mmask16>(cols - i >= 16 ? 0xffff : (1 << (cols - i)) - 1);
      part[0] = _mm512_fmadd_ps(V::at(w + i * V::kBytes, mask), _mm512_maskz_loadu_ps(mask, x + i), part[0]);
    }
    y[r] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3])));
  }
}

// Quants (dot_loops.h) in registers.
[[gnu::always_inline]] inline __m512i magnitudes(const float* x) {
  return _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff));
}
// The bytes' sums by 8, plus 8 times 128.
[[gnu::always_inline]] inline __m512i sums_of_8(__m512i bytes) {
  return _mm512_sad_epu8(_mm512_xor_si512(bytes, _mm512_set1_epi8(-128)), _mm512_setzero_si512());
}

struct Quants32 {
  static constexpr int kSize = 32;
  __m256i q;
  float scale;
  [[gnu::always_inline]] static __m128i rounded(__m512 v) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i whole = _mm512_cvttps_epi32(v);
    const __m512 rest = _mm512_sub_ps(v, _mm512_cvtepi32_ps(whole));
    whole = _mm512_mask_add_epi32(whole, _mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.5f), _CMP_GE_OQ), whole, one);
    whole = _mm512_mask_sub_epi32(whole, _mm512_cmp_ps_mask(rest, _mm512_set1_ps(-0.5f), _CMP_LE_OQ), whole, one);
    return _mm512_cvtepi32_epi8(whole);
  }
  [[gnu::always_inline]] void take(const float* x) {
    const auto largest =
        static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(magnitudes(x), magnitudes(x + 16))));
    float d = 0, inverse = 0;
    if (!inverse_32(largest, d, inverse)) {
      q = _mm256_setzero_si256();
      scale = Quants<32>::empty_scale(largest);
      return;
    }
    const __m512 by = _mm512_set1_ps(inverse);
    q = _mm256_set_m128i(rounded(_mm512_mul_ps(_mm512_loadu_ps(x + 16), by)),
                         rounded(_mm512_mul_ps(_mm512_loadu_ps(x), by)));
    scale = scale_32(d);
  }
  [[gnu::always_inline]] void narrow(int8_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), q); }
  [[gnu::always_inline]] static int32_t all(__m256i by_8) {
    const __m128i v = _mm_add_epi64(_mm256_castsi256_si128(by_8), _mm256_extracti128_si256(by_8, 1));
    return _mm_cvtsi128_si32(v) + _mm_extract_epi32(v, 2);
  }
  [[gnu::always_inline]] int32_t size() const {
    return all(_mm256_sad_epu8(_mm256_abs_epi8(q), _mm256_setzero_si256()));
  }
  [[gnu::always_inline]] void larger(int32_t bound, uint64_t* bits) const {
    *bits = _mm256_cmpgt_epu8_mask(_mm256_abs_epi8(q), _mm256_set1_epi8(static_cast<char>(bound)));
  }
  [[gnu::always_inline]] void sums(int32_t* to) const {
    const __m256i by_8 = _mm256_sad_epu8(_mm256_xor_si256(q, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    *to = all(by_8) - 32 * 128;
  }
};

struct Quants256 {
  static constexpr int kSize = 256;
  __m512i q[4];
  float scale;
  [[gnu::always_inline]] void take(const float* x) {
    __m512i most = magnitudes(x);
#pragma GCC unroll 16
    for (int i = 1; i < 16; ++i) most = _mm512_max_epi32(most, magnitudes(x + 16 * i));
    const int32_t largest = _mm512_reduce_max_epi32(most);
    int at = 0;
    for (__mmask16 here = 0; at < 256; at += 16) {
      here = _mm512_cmpeq_epi32_mask(magnitudes(x + at), _mm512_set1_epi32(largest));
      if (here == 0) continue;
      at += __builtin_ctz(here);
      break;
    }
    float inverse = 0;
    if (!inverse_256(static_cast<uint32_t>(largest), x[at], inverse)) {
      for (__m512i& v : q) v = _mm512_setzero_si512();
      scale = Quants<256>::empty_scale(static_cast<uint32_t>(largest));
      return;
    }
    const __m512 by = _mm512_set1_ps(inverse), round = _mm512_set1_ps(kRounding);
    const auto bytes = [&](const float* p) __attribute__((always_inline)) {
      const __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(p), by), round);
      const __m512i nearest = _mm512_sub_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(kRoundingBits));
      return _mm512_cvtsepi32_epi8(nearest);  // 128 becomes 127
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* p = x + 64 * i;
      const __m256i low = _mm256_set_m128i(bytes(p + 16), bytes(p)),
                    high = _mm256_set_m128i(bytes(p + 48), bytes(p + 32));
      q[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    scale = 1.f / inverse;
  }
  [[gnu::always_inline]] void narrow(int8_t* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 64 * i, q[i]);
  }
  [[gnu::always_inline]] int32_t size() const {
    __m512i by_8 = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      by_8 = _mm512_add_epi64(by_8, _mm512_sad_epu8(_mm512_abs_epi8(q[i]), _mm512_setzero_si512()));
    return static_cast<int32_t>(_mm512_reduce_add_epi64(by_8));
  }
  [[gnu::always_inline]] int32_t largest_32() const {
    __m512i most = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i by_8 = _mm512_sad_epu8(_mm512_abs_epi8(q[i]), _mm512_setzero_si512());
      const __m512i by_16 = _mm512_add_epi64(by_8, _mm512_shuffle_epi32(by_8, _MM_PERM_BADC));
      most = _mm512_max_epi32(most, _mm512_add_epi64(by_16, _mm512_permutex_epi64(by_16, 0x4e)));
    }
    return static_cast<int32_t>(_mm512_reduce_max_epi32(most));
  }
  [[gnu::always_inline]] void larger(int32_t bound, uint64_t* bits) const {
    const __m512i limit = _mm512_set1_epi8(static_cast<char>(bound));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bits[i] = _mm512_cmpgt_epu8_mask(_mm512_abs_epi8(q[i]), limit);
  }
  [[gnu::always_inline]] void sums(int32_t* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i by_8 = sums_of_8(q[i]), by_16 = _mm512_add_epi64(by_8, _mm512_bsrli_epi128(by_8, 8));
      const __m128i four = _mm256_castsi256_si128(_mm512_cvtepi64_epi32(_mm512_maskz_compress_epi64(0x55, by_16)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * i), _mm_sub_epi32(four, _mm_set1_epi32(16 * 128)));
    }
  }
};

template <class F>
constexpr DotBlocks kPairs = each_row<dot_pairs<F>, F::kBytes>;

constexpr DotKernels kKernels = [] {
  DotKernels k = kPlain;
  k.f32 = dot_floats_512<VectorF32>;
  k.f16 = dot_floats_512<VectorF16>;
  k.bf16 = dot_floats_512<VectorBf16>;
  k.q8_0 = kPairs<Q80Pair>;
  k.q4_0 = kPairs<Q40Pair>;
  k.q4_1 = kPairs<Q41Pair>;
  k.q5_0 = kPairs<Q50Pair>;
  k.q5_1 = kPairs<Q51Pair>;
  k.mxfp4 = kPairs<Mxfp4Pair>;
  k.q4_k = each_row<dot_scale_min_512<Q4K::kBytes, 16, 0>, Q4K::kBytes>;
  k.q5_k = each_row<dot_scale_min_512<Q5K::kBytes, 48, 16>, Q5K::kBytes>;
  k.q6_k = each_row<dot_q6_k_512, Q6K::kBytes>;
  k.tq2_0 = each_row<dot_tq2_0_512, TQ20::kBytes>;
  k.tile_row_32 = tile_row<Quants32>;
  k.tile_row_256 = tile_row<Quants256>;
  return k;
}();

}  // namespace

const DotKernels& dot_kernels_avx512() {
  return kKernels;
}

}  // namespace moiety
#endif
