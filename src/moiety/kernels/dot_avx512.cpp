// Products with AVX-512 and VNNI: unsigned weights times signed activations, 64 to an instruction, into int32. The
// offset of the signed formats is taken out with the activation sums.
#if defined(__x86_64__)
#include <immintrin.h>

#include "moiety/kernels/dot_loops.h"

namespace moiety {
namespace {

[[gnu::always_inline]] inline __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
[[gnu::always_inline]] inline __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

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

// Halves at eight blocks kBytes apart, as floats.
template <int kBytes>
[[gnu::always_inline]] inline __m256 halves(const uint8_t* p) {
  const auto at = [p](int i) { return load<int16_t>(p + i * kBytes); };
  return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
}
// Pairs of halves (scale, minimum) at eight blocks.
struct Pairs {
  __m256 scale, min;
};
template <int kBytes>
[[gnu::always_inline]] inline Pairs half_pairs(const uint8_t* p) {
  const auto at = [p](int i) { return load<int32_t>(p + i * kBytes); };
  const __m256i both = _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  return {_mm256_cvtph_ps(_mm256_cvtepi32_epi16(both)),
          _mm256_cvtph_ps(_mm256_cvtepi32_epi16(_mm256_srli_epi32(both, 16)))};
}

// pair: the unsigned quants of the blocks at p and p + kBytes. kOffset: what they are too large by.
struct Q80Pair : Q80 {
  static constexpr int kOffset = 128;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(load256(p + 2)), load256(p + kBytes + 2), 1);
    return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  [[gnu::always_inline]] static __m256 scales(const uint8_t* p) { return halves<kBytes>(p); }
};
struct Q40Pair : Q40 {
  static constexpr int kOffset = 8;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) { return nibbles(p + 2, p + kBytes + 2); }
  [[gnu::always_inline]] static __m256 scales(const uint8_t* p) { return halves<kBytes>(p); }
};
struct Q41Pair : Q41 {
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) { return nibbles(p + 4, p + kBytes + 4); }
};
[[gnu::always_inline]] inline __m512i fifth(__m512i low, const uint8_t* a, const uint8_t* b) {
  const __mmask64 high = load<uint32_t>(a) | static_cast<uint64_t>(load<uint32_t>(b)) << 32;
  return _mm512_mask_add_epi8(low, high, low, _mm512_set1_epi8(16));
}
struct Q50Pair : Q50 {
  static constexpr int kOffset = 16;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    return fifth(nibbles(p + 6, p + kBytes + 6), p + 2, p + kBytes + 2);
  }
  [[gnu::always_inline]] static __m256 scales(const uint8_t* p) { return halves<kBytes>(p); }
};
struct Q51Pair : Q51 {
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    return fifth(nibbles(p + 8, p + kBytes + 8), p + 4, p + kBytes + 4);
  }
};
struct Mxfp4Pair : Mxfp4 {
  static constexpr int kOffset = 12;
  [[gnu::always_inline]] static __m512i pair(const uint8_t* p) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, nibbles(p + 1, p + kBytes + 1));
  }
  [[gnu::always_inline]] static __m256 scales(const uint8_t* p) {
    return _mm256_setr_ps(scale(p), scale(p + 17), scale(p + 34), scale(p + 51), scale(p + 68), scale(p + 85),
                          scale(p + 102), scale(p + 119));
  }
};

// Adds up to eight blocks (`pairs` pairs) to `products`, and to `rest` what the offset or the minimums need.
template <class F>
[[gnu::always_inline]] inline void add_blocks(const uint8_t* w, int pairs, const ActivationView& a, int64_t b,
                                              __m512* products, __m256& rest) {
  __m256 scale;
  if constexpr (F::kMin) {
    const Pairs both = half_pairs<F::kBytes>(w);
    scale = _mm256_mul_ps(both.scale, _mm256_loadu_ps(a.scale + b));
    rest = _mm256_fmadd_ps(both.min, _mm256_loadu_ps(a.scaled_sum + b), rest);
  } else {
    scale = _mm256_mul_ps(F::scales(w), _mm256_loadu_ps(a.scale + b));
    rest = _mm256_fmadd_ps(scale, _mm256_loadu_ps(a.sum + b), rest);
  }
  const __m512 scales = _mm512_castps256_ps512(scale);
  __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  for (int k = 0; k < pairs; ++k) {
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), F::pair(w + 2 * k * F::kBytes),
                                             _mm512_loadu_si512(a.q + 32 * (b + 2 * k)));
    products[k & 1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_permutexvar_ps(which, scales), products[k & 1]);
    which = _mm512_add_epi32(which, _mm512_set1_epi32(2));
  }
}

template <class F>
float dot_pairs(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m512 products[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m256 rest = _mm256_setzero_ps();
  int64_t b = 0;
  for (; b + 8 <= blocks; b += 8, w += 8 * F::kBytes) add_blocks<F>(w, 4, a, b, products, rest);
  if (b < blocks) {
    // Blocks of zeros fill the group; the activations are padded with zeros.
    const auto left = static_cast<int>(blocks - b);
    alignas(64) uint8_t group[8 * F::kBytes] = {};
    __builtin_memcpy(group, w, static_cast<size_t>(left) * F::kBytes);
    add_blocks<F>(group, (left + 1) / 2, a, b, products, rest);
  }
  const float total = _mm512_reduce_add_ps(_mm512_add_ps(products[0], products[1]));
  const float other = _mm512_reduce_add_ps(_mm512_zextps256_ps512(rest));
  if constexpr (F::kMin)
    return total + other;
  else
    return total - static_cast<float>(F::kOffset) * other;
}

// ---- 256-element formats --------------------------------------------------------------------------------------------

// The six-bit scales as eight bytes, then the eight minimums.
[[gnu::always_inline]] inline __m128i k_scales(const uint8_t* s) {
  const uint32_t a = load<uint32_t>(s), b = load<uint32_t>(s + 4), c = load<uint32_t>(s + 8);
  constexpr uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, top = 0x30303030;
  return _mm_setr_epi32(static_cast<int>(a & six), static_cast<int>((c & four) | (a >> 2 & top)),
                        static_cast<int>(b & six), static_cast<int>((c >> 4 & four) | (b >> 2 & top)));
}

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
  return k;
}();

}  // namespace

const DotKernels& dot_kernels_avx512() {
  return kKernels;
}

}  // namespace moiety
#endif
