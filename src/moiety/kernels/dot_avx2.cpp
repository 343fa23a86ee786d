// Products with AVX2: unsigned weights times signed activations by maddubs. Its sums of two fit 16 bits for weights of
// up to seven bits; Q8_0 multiplies magnitudes and moves the sign to the activations.
#if defined(__x86_64__)
#include "moiety/kernels/dot_loops.h"
#include "moiety/kernels/vectors_avx2.h"

namespace moiety {
namespace {

[[gnu::always_inline]] inline float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Eight int32 sums of unsigned times signed bytes.
[[gnu::always_inline]] inline __m256i multiply(__m256i weights, __m256i activations) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, activations), _mm256_set1_epi16(1));
}

// sums: partial sums of quant times activation, kOffset: what the quants are too large by.
struct Q80Sums : Q80 {
  static constexpr int kOffset = 0;
  [[gnu::always_inline]] static __m256i sums(const uint8_t* p, __m256i q) {
    const __m256i v = load256(p + 2);
    return multiply(_mm256_abs_epi8(v), _mm256_sign_epi8(q, v));
  }
};
struct Q40Sums : Q40 {
  static constexpr int kOffset = 8;
  [[gnu::always_inline]] static __m256i sums(const uint8_t* p, __m256i q) { return multiply(nibbles32(p + 2), q); }
};
struct Q41Sums : Q41 {
  static constexpr int kOffset = 0;
  [[gnu::always_inline]] static __m256i sums(const uint8_t* p, __m256i q) { return multiply(nibbles32(p + 4), q); }
};
struct Q50Sums : Q50 {
  static constexpr int kOffset = 16;
  [[gnu::always_inline]] static __m256i sums(const uint8_t* p, __m256i q) {
    return multiply(_mm256_or_si256(nibbles32(p + 6), fifth_bits(p + 2)), q);
  }
};
struct Q51Sums : Q51 {
  static constexpr int kOffset = 0;
  [[gnu::always_inline]] static __m256i sums(const uint8_t* p, __m256i q) {
    return multiply(_mm256_or_si256(nibbles32(p + 8), fifth_bits(p + 4)), q);
  }
};
struct Mxfp4Sums : Mxfp4 {
  static constexpr int kOffset = 12;
  [[gnu::always_inline]] static __m256i sums(const uint8_t* p, __m256i q) {
    const __m256i table = _mm256_broadcastsi128_si256(e2m1_table<kOffset>());
    return multiply(_mm256_shuffle_epi8(table, nibbles32(p + 1)), q);
  }
};

template <class F>
float dot_32_avx2(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m256 products[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  float rest[2] = {0, 0};
  const auto add = [&](int64_t b, int k) {
    const uint8_t* p = w + b * F::kBytes;
    const float scale = F::scale(p) * a.scale[b];
    products[k] =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(F::sums(p, load256(a.q + 32 * b))), _mm256_set1_ps(scale), products[k]);
    if constexpr (F::kMin) rest[k] += load_half(p + 2) * a.scaled_sum[b];
    if constexpr (F::kOffset != 0) rest[k] += scale * a.sum[b];
  };
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) add(b, 0), add(b + 1, 1);
  if (b < blocks) add(b, 0);
  const float total = sum_of(_mm256_add_ps(products[0], products[1])), other = rest[0] + rest[1];
  return F::kMin ? total + other : total - static_cast<float>(F::kOffset) * other;
}

// ---- 256-element formats --------------------------------------------------------------------------------------------

// The 16-bit value number i of both lanes' eight, everywhere.
[[gnu::always_inline]] inline __m256i spread16(__m128i values, int i) {
  return _mm256_broadcastsi128_si256(_mm_shuffle_epi8(values, _mm_set1_epi16(static_cast<short>(0x0100 + 0x0202 * i))));
}

template <int kBytes, int kQuants, int kHigh>
float dot_scale_min_avx2(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m256 products = _mm256_setzero_ps();
  __m128 mins = _mm_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, w += kBytes) {
    const __m128i both = k_scales(w + 4);
    const __m128i scales = _mm_cvtepu8_epi16(both);
    __m256i high = _mm256_setzero_si256();
    if constexpr (kHigh != 0) high = load256(w + kHigh);
    __m256i total = _mm256_setzero_si256();
    for (int g = 0; g < 8; ++g) {
      __m256i v = k_nibbles(w + kQuants, g);
      if constexpr (kHigh != 0) v = _mm256_or_si256(v, k_fifth_bits(high, g));
      const __m256i pairs = _mm256_maddubs_epi16(v, load256(a.q + 256 * b + 32 * g));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, spread16(scales, g)));
    }
    const __m128i min = _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_unpackhi_epi64(both, both)), load128(a.sums32 + 8 * b));
    const float d = load_half(w) * a.scale[b], dmin = load_half(w + 2) * a.scale[b];
    products = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(d), products);
    mins = _mm_fmadd_ps(_mm_cvtepi32_ps(min), _mm_set1_ps(dmin), mins);
  }
  return sum_of(_mm256_sub_ps(products, _mm256_zextps128_ps256(mins)));
}

float dot_q6_k_avx2(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m256 products = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, w += Q6K::kBytes) {
    const __m256i scales = _mm256_cvtepi8_epi16(load128(w + 192));
    __m256i total = _mm256_setzero_si256();
    for (int g = 0; g < 8; ++g) {  // 32 elements, two scales
      const int half = g / 4, part = g % 4;
      const __m256i pairs = _mm256_maddubs_epi16(q6_k_quants(w, g), load256(a.q + 256 * b + 32 * g));
      // The first 16 elements lie in the lower lane, the next in the upper.
      const __m128i eight = half == 0 ? _mm256_castsi256_si128(scales) : _mm256_extracti128_si256(scales, 1);
      const __m256i scale =
          _mm256_set_m128i(_mm_shuffle_epi8(eight, _mm_set1_epi16(static_cast<short>(0x0302 + 0x0404 * part))),
                           _mm_shuffle_epi8(eight, _mm_set1_epi16(static_cast<short>(0x0100 + 0x0404 * part))));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, scale));
    }
    const __m256i offset = _mm256_madd_epi16(scales, load256(a.sums16 + 16 * b));
    total = _mm256_sub_epi32(total, _mm256_slli_epi32(offset, 5));
    products = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(load_half(w + 208) * a.scale[b]), products);
  }
  return sum_of(products);
}

float dot_tq2_0_avx2(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  __m256 products = _mm256_setzero_ps();
  float rest = 0;
  for (int64_t b = 0; b < blocks; ++b, w += TQ20::kBytes) {
    __m256i total = _mm256_setzero_si256();
    for (int g = 0; g < 8; ++g) {
      const __m256i codes = _mm256_srli_epi16(load256(w + 32 * (g / 4)), 2 * (g % 4));
      total = _mm256_add_epi32(total,
                               multiply(_mm256_and_si256(codes, _mm256_set1_epi8(3)), load256(a.q + 256 * b + 32 * g)));
    }
    const float d = load_half(w + 64) * a.scale[b];
    products = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(d), products);
    rest += d * a.sum[b];
  }
  return sum_of(products) - rest;
}

// ---- float weights --------------------------------------------------------------------------------------------------

struct VectorF32 : LoadF32 {
  static constexpr int kBytes = 4;
  [[gnu::always_inline]] static __m256 eight(const uint8_t* p) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  }
};
struct VectorF16 : LoadF16 {
  static constexpr int kBytes = 2;
  [[gnu::always_inline]] static __m256 eight(const uint8_t* p) { return _mm256_cvtph_ps(load128(p)); }
};
struct VectorBf16 : LoadBf16 {
  static constexpr int kBytes = 2;
  [[gnu::always_inline]] static __m256 eight(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
};

template <class V>
void dot_floats_avx2(const uint8_t* w, int64_t rows, int64_t cols, const float* x, float* y) {
  for (int64_t r = 0; r < rows; ++r, w += cols * V::kBytes) {
    __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= cols; i += 32)
      for (int k = 0; k < 4; ++k)
        part[k] = _mm256_fmadd_ps(V::eight(w + (i + 8 * k) * V::kBytes), _mm256_loadu_ps(x + i + 8 * k), part[k]);
    float rest = 0;
    for (; i < cols; ++i) rest += V::at(w + i * V::kBytes) * x[i];
    y[r] = sum_of(_mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3]))) + rest;
  }
}

template <class F>
constexpr DotBlocks kRows32 = each_row<dot_32_avx2<F>, F::kBytes>;

constexpr DotKernels kKernels = [] {
  DotKernels k = kPlain;
  k.f32 = dot_floats_avx2<VectorF32>;
  k.f16 = dot_floats_avx2<VectorF16>;
  k.bf16 = dot_floats_avx2<VectorBf16>;
  k.q8_0 = kRows32<Q80Sums>;
  k.q4_0 = kRows32<Q40Sums>;
  k.q4_1 = kRows32<Q41Sums>;
  k.q5_0 = kRows32<Q50Sums>;
  k.q5_1 = kRows32<Q51Sums>;
  k.mxfp4 = kRows32<Mxfp4Sums>;
  k.q4_k = each_row<dot_scale_min_avx2<Q4K::kBytes, 16, 0>, Q4K::kBytes>;
  k.q5_k = each_row<dot_scale_min_avx2<Q5K::kBytes, 48, 16>, Q5K::kBytes>;
  k.q6_k = each_row<dot_q6_k_avx2, Q6K::kBytes>;
  k.tq2_0 = each_row<dot_tq2_0_avx2, TQ20::kBytes>;
  return k;
}();

}  // namespace

const DotKernels& dot_kernels_avx2() {
  return kKernels;
}

}  // namespace moiety
#endif
