#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "moiety/kernels/packed_columns.h"
#include "moiety/kernels/packed_kernels.h"
#include "moiety/kernels/packed_layout.h"
#include "moiety/kernels/vectors_avx2.h"

namespace moiety {
namespace {

using View = QuantizedTiles::View;

// 4 bytes of activations for all 16 rows.
[[gnu::always_inline]] inline __m512i four(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
[[gnu::always_inline]] inline __m512i quad(const uint8_t* p) {
  return _mm512_load_si512(p);
}
[[gnu::always_inline]] inline __m512 halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}
[[gnu::always_inline]] inline __m512i bytes16(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
// e8m0_half() of 16 bytes. 2^(e - 127), infinite for 255, less half of itself.
[[gnu::always_inline]] inline __m512 exponents(const uint8_t* p) {
  const __m512i bits = _mm512_max_epi32(_mm512_slli_epi32(bytes16(p), 23), _mm512_set1_epi32(1 << 22));
  return _mm512_fnmadd_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0.5f), _mm512_castsi512_ps(bits));
}
// a | b & mask
[[gnu::always_inline]] inline __m512i join(__m512i a, __m512i b, __m512i mask) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xf8);
}

// ---- blocks of 32 ---------------------------------------------------------------------------------------------------

// sums[t] = the products of a block with tile row t, whose 32 bytes are at a + 32 t.
struct Bytes {
  static constexpr PackedLayout kLayout = kPackedQ8_0;
  template <int T>
  [[gnu::always_inline]] static void sums(const uint8_t* q, const uint8_t*, const int8_t* a, __m512i (&sums)[T]) {
    // Two chains each, or one token waits for its own instruction.
    __m512i odd[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = odd[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int z = 0; z < 8; z += 2) {
      const __m512i first = quad(q + 64 * z), second = quad(q + 64 * z + 64);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm512_dpbusd_epi32(sums[t], first, four(a + 32 * t + 4 * z));
        odd[t] = _mm512_dpbusd_epi32(odd[t], second, four(a + 32 * t + 4 * z + 4));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], odd[t]);
  }
};

// For a few rows the high halves of bytes are used as they are, 16 times too large, which an exact shift of their own
// sum takes back; for more a shift of the weights is cheaper.
struct Nibbles {
  template <int T>
  [[gnu::always_inline]] static void sums(const uint8_t* q, const uint8_t*, const int8_t* a, __m512i (&sums)[T]) {
    const __m512i mask = _mm512_set1_epi8(15);
    constexpr bool few = T < 4;
    __m512i high[few ? T : 1];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int t = 0; few && t < T; ++t) high[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z) {
      const __m512i both = quad(q + 64 * z), low = _mm512_and_si512(both, mask);
      const __m512i top = few ? _mm512_andnot_si512(mask, both) : _mm512_and_si512(_mm512_srli_epi32(both, 4), mask);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm512_dpbusd_epi32(sums[t], low, four(a + 32 * t + 4 * z));
        __m512i& to = few ? high[few ? t : 0] : sums[t];
        to = _mm512_dpbusd_epi32(to, top, four(a + 32 * t + 16 + 4 * z));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; few && t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], _mm512_srai_epi32(high[t], 4));
  }
};
struct Nibbles40 : Nibbles {
  static constexpr PackedLayout kLayout = kPackedQ4_0;
};
struct Nibbles41 : Nibbles {
  static constexpr PackedLayout kLayout = kPackedQ4_1;
};

struct FiveBits {
  template <int T>
  [[gnu::always_inline]] static void sums(const uint8_t* q, const uint8_t* h, const int8_t* a, __m512i (&sums)[T]) {
    const __m512i mask = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16), bits = quad(h);
    __m512i high[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = high[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z) {
      const __m512i both = quad(q + 64 * z);
      const __m512i low = join(_mm512_and_si512(both, mask), _mm512_slli_epi32(bits, 4 - z), fifth);
      const __m512i top = join(_mm512_and_si512(_mm512_srli_epi32(both, 4), mask), _mm512_srli_epi32(bits, z), fifth);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm512_dpbusd_epi32(sums[t], low, four(a + 32 * t + 4 * z));
        high[t] = _mm512_dpbusd_epi32(high[t], top, four(a + 32 * t + 16 + 4 * z));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], high[t]);
  }
};
struct FiveBits50 : FiveBits {
  static constexpr PackedLayout kLayout = kPackedQ5_0;
};
struct FiveBits51 : FiveBits {
  static constexpr PackedLayout kLayout = kPackedQ5_1;
};

struct E2m1 {
  static constexpr PackedLayout kLayout = kPackedMXFP4;
  template <int T>
  [[gnu::always_inline]] static void sums(const uint8_t* q, const uint8_t*, const int8_t* a, __m512i (&sums)[T]) {
    const __m512i mask = _mm512_set1_epi8(15), table = _mm512_broadcast_i32x4(e2m1_table<kLayout.offset>());
    __m512i high[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = high[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z) {
      const __m512i both = quad(q + 64 * z);
      const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(both, mask));
      const __m512i top = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(both, 4), mask));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t] = _mm512_dpbusd_epi32(sums[t], low, four(a + 32 * t + 4 * z));
        high[t] = _mm512_dpbusd_epi32(high[t], top, four(a + 32 * t + 16 + 4 * z));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], high[t]);
  }
};

template <class F, int T>
void blocks32(const uint8_t* group, int64_t blocks, const View& x, float* out, int64_t stride) {
  constexpr PackedLayout l = F::kLayout;
  PackedBlock<l> block(group);
  __m512 total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; block.next(b++)) {
    if constexpr (T > 3) block.template ask<1>(0);
    __m512i sums[T];
    F::template sums<T>(block.body + l.quad_at(0), block.body, x.q + b * 32 * T, sums);
    const __m512 scale = l.e2m1 ? exponents(block.ends) : halves(block.ends);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      if constexpr (l.offset > 0) {
        constexpr int kShift = __builtin_ctz(l.offset);
        sums[t] = _mm512_sub_epi32(sums[t], _mm512_slli_epi32(four(x.sums + b * T + t), kShift));
      }
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[b * T + t])),
                                 total[t]);
    }
    if constexpr (l.min) {
      const __m512 minimum = halves(block.ends + 32);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x.minimum[b * T + t]), total[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + stride * t, total[t]);
}

// ---- blocks of 256 --------------------------------------------------------------------------------------------------

// Q4_K and Q5_K: eight sub-blocks with a scale and a minimum each.
template <bool five, int T>
void blocks_k(const uint8_t* group, int64_t blocks, const View& x, float* out, int64_t stride) {
  constexpr PackedLayout l = five ? kPackedQ5_K : kPackedQ4_K;
  const __m512i mask = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
  PackedBlock<l> block(group);
  __m512 total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; block.next(b++)) {
    const uint8_t *body = block.body, *ends = block.ends;  // scales first
    const int8_t* a = x.q + b * 256 * T;
    __m512i sum[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_si512();
    // Whether sums of a sub-block's products fit in 16 bits: two of them are scaled by one product then.
    const bool fits = !five && x.largest[b] * 15 <= 32767;
    // Sub-blocks 2c and 2c + 1, in the halves of eight quads.
    const auto chunk = [&](auto c) __attribute__((always_inline)) {
      __m512i low[T], top[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) low[t] = top[t] = _mm512_setzero_si512();
      if constexpr (T > 1) block.template ask<4>(c);
#pragma GCC unroll 8
      for (int z = 0; z < 8; ++z) {
        const __m512i both = quad(body + l.quad_at(8 * c + z));
        __m512i first = _mm512_and_si512(both, mask), second;
        if constexpr (five) {
          const __m512i bits = quad(body + l.above_at(z));
          constexpr int g = 2 * decltype(c)::value;
          first = join(first, g <= 4 ? _mm512_slli_epi32(bits, 4 - g) : _mm512_srli_epi32(bits, g - 4), fifth);
          second = join(_mm512_and_si512(_mm512_srli_epi32(both, 4), mask),
                        g + 1 <= 4 ? _mm512_slli_epi32(bits, 3 - g) : _mm512_srli_epi32(bits, g - 3), fifth);
        } else {
          second = _mm512_andnot_si512(mask, both);  // 16 times too large
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          low[t] = _mm512_dpbusd_epi32(low[t], first, four(a + 256 * t + 64 * c + 4 * z));
          top[t] = _mm512_dpbusd_epi32(top[t], second, four(a + 256 * t + 64 * c + 32 + 4 * z));
        }
      }
      const __m512i s0 = bytes16(body + 32 * c), s1 = bytes16(body + 32 * c + 16);
      if (fits) {
        const __m512i scales = _mm512_or_si512(s0, _mm512_slli_epi32(s1, 16));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m512i sums = _mm512_mask_mov_epi16(low[t], 0xaaaaaaaa, _mm512_slli_epi32(top[t], 12));
          sum[t] = _mm512_dpwssd_epi32(sum[t], sums, scales);
        }
        return;
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        if constexpr (!five) top[t] = _mm512_srai_epi32(top[t], 4);
        sum[t] =
            _mm512_add_epi32(sum[t], _mm512_add_epi32(_mm512_mullo_epi32(low[t], s0), _mm512_mullo_epi32(top[t], s1)));
      }
    };
    if constexpr (five) {
      chunk(std::integral_constant<int, 0>());
      chunk(std::integral_constant<int, 1>());
      chunk(std::integral_constant<int, 2>());
      chunk(std::integral_constant<int, 3>());
    } else {
#pragma GCC unroll 1
      for (int c = 0; c < 4; ++c) chunk(c);
    }
    const __m512 scale = halves(ends), minimum = halves(ends + 32);
    __m512i mins[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p)
      mins[p] = _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(body + 128 + 32 * p)));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      __m512i least = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) least = _mm512_dpwssd_epi32(least, mins[p], four(x.pairs + (b * T + t) * 8 + 2 * p));
      const __m512 value =
          _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(sum[t]), _mm512_mul_ps(minimum, _mm512_cvtepi32_ps(least)));
      total[t] = _mm512_fmadd_ps(value, _mm512_set1_ps(x.scale[b * T + t]), total[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + stride * t, total[t]);
}

template <int T>
void blocks_q6_k(const uint8_t* group, int64_t blocks, const View& x, float* out, int64_t stride) {
  constexpr PackedLayout l = kPackedQ6_K;
  constexpr int64_t kStep = l.above_at(4) - l.above_at(0);
  const __m512i mask = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30);
  PackedBlock<l> block(group);
  __m512 total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; block.next(b++)) {
    const uint8_t *body = block.body, *ends = block.ends;  // scales first
    const int8_t* a = x.q + b * 256 * T;
    const int32_t* sums16 = x.sums + b * 16 * T;
    __m512i sum[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_si512();
    // Sub-blocks s and 8 + s, of 16 elements; `upper`: elements 64 to 127 and 192 to 255.
    const auto sub = [&]<bool upper>(int s) __attribute__((always_inline)) {
      __m512i low[T], top[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        // What the offset of 32 adds comes off before.
        low[t] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(four(sums16 + 16 * t + s), 5));
        top[t] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(four(sums16 + 16 * t + 8 + s), 5));
      }
      if constexpr (T > 1) block.template ask<8>(s);
      const uint8_t *quants = body + l.quad_at(upper ? 16 : 0) + kStep * (s % 4),
                    *above = body + l.above_at(0) + kStep * (s % 4);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int z = 4 * s + i;
        const __m512i both = quad(quants + 64 * i), bits = quad(above + 64 * i);
        // Bits 0 of element 4z, 2 of 64 + 4z, 4 of 128 + 4z, 6 of 192 + 4z.
        const __m512i first =
            join(_mm512_and_si512(both, mask), upper ? _mm512_slli_epi32(bits, 2) : _mm512_slli_epi32(bits, 4), two);
        const __m512i second =
            join(_mm512_and_si512(_mm512_srli_epi32(both, 4), mask), upper ? _mm512_srli_epi32(bits, 2) : bits, two);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          low[t] = _mm512_dpbusd_epi32(low[t], first, four(a + 256 * t + 4 * z));
          top[t] = _mm512_dpbusd_epi32(top[t], second, four(a + 256 * t + 128 + 4 * z));
        }
      }
      const auto signs = [&](int g) {
        return _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(body + 16 * g)));
      };
      const __m512i s0 = signs(s), s1 = signs(8 + s);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        sum[t] =
            _mm512_add_epi32(sum[t], _mm512_add_epi32(_mm512_mullo_epi32(low[t], s0), _mm512_mullo_epi32(top[t], s1)));
    };
    for (int s = 0; s < 4; ++s) {
      sub.template operator()<false>(s);
      sub.template operator()<true>(4 + s);
    }
    const __m512 scale = halves(ends);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[b * T + t])),
                                 total[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + stride * t, total[t]);
}

// Three values of a weight, four weights a byte.
template <int T>
void blocks_ternary(const uint8_t* group, int64_t blocks, const View& x, float* out, int64_t stride) {
  constexpr PackedLayout l = kPackedTernary;
  const __m512i mask = _mm512_set1_epi8(3);
  PackedBlock<l> block(group);
  __m512 total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; block.next(b++)) {
    const uint8_t *q = block.body, *ends = block.ends;
    const int8_t* a = x.q + b * 256 * T;
    __m512i even[T], odd[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      // What the offset of 1 adds comes off before.
      even[t] = odd[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p)
        even[t] = _mm512_dpwssd_epi32(even[t], _mm512_set1_epi16(-l.offset), four(x.pairs + (b * T + t) * 8 + 2 * p));
    }
    for (int c = 0; c < 2; ++c) {
      if constexpr (T > 3) block.template ask<2>(c);
#pragma GCC unroll 8
      for (int z = 0; z < 8; ++z) {
        const __m512i all = quad(q + 64 * (8 * c + z));
        const __m512i w[4] = {_mm512_and_si512(all, mask), _mm512_and_si512(_mm512_srli_epi32(all, 2), mask),
                              _mm512_and_si512(_mm512_srli_epi32(all, 4), mask),
                              _mm512_and_si512(_mm512_srli_epi32(all, 6), mask)};
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const int8_t* at = a + 256 * t + 128 * c + 4 * z;
          even[t] = _mm512_dpbusd_epi32(even[t], w[0], four(at));
          odd[t] = _mm512_dpbusd_epi32(odd[t], w[1], four(at + 32));
          even[t] = _mm512_dpbusd_epi32(even[t], w[2], four(at + 64));
          odd[t] = _mm512_dpbusd_epi32(odd[t], w[3], four(at + 96));
        }
      }
    }
    const __m512 scale = halves(ends);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even[t], odd[t])),
                                 _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[b * T + t])), total[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + stride * t, total[t]);
}

// All 16 rows of a column.
struct Sixteen {
  static constexpr int64_t kRows = 16;
  using Float = __m512;
  static __m512i words(const uint8_t* p) { return _mm512_load_si512(p); }
  static __m512i bits(__m512i v, int64_t from, int mask) {
    return _mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi64_si128(from)), _mm512_set1_epi32(mask));
  }
  static __m512i joined(__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 4)); }
  static __m512i less(__m512i v, int offset) { return _mm512_sub_epi32(v, _mm512_set1_epi32(offset)); }
  static __m512i e2m1_twice(__m512i v) {
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(e2m1_table<0>()), v);
    return _mm512_srai_epi32(_mm512_slli_epi32(bytes, 24), 24);
  }
  static Float number(__m512i v) { return _mm512_cvtepi32_ps(v); }
  static Float halves(const uint8_t* p) { return moiety::halves(p); }
  static Float exponents(const uint8_t* p) { return moiety::exponents(p); }
  static Float unsigned_bytes(const uint8_t* p) { return number(bytes16(p)); }
  static Float signed_bytes(const uint8_t* p) {
    return number(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Float every_second(const uint8_t* p, int64_t which) {
    const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
    return number(bits(pairs, 8 * which, 255));
  }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float fms(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }
  static Float all(float v) { return _mm512_set1_ps(v); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
};

template <class F>
constexpr PackedFormat of32() {
  PackedFormat f{};
  [&]<int... T>(std::integer_sequence<int, T...>) {
    ((f.product[T] = blocks32<F, T + 1>), ...);
  }
  (std::make_integer_sequence<int, 8>());
  fill_columns<Sixteen, F::kLayout>(f.columns);
  return f;
}

int64_t peak(int64_t rounds) {
  constexpr int kChains = 16, kTimes = 8;
  __m512i sums[kChains];
  for (__m512i& s : sums) s = _mm512_setzero_si512();
  __m512i a = _mm512_set1_epi8(1), b = a;
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));  // so that nothing is computed ahead
#pragma GCC unroll 8
    for (int k = 0; k < kTimes; ++k)
#pragma GCC unroll 16
      for (__m512i& s : sums) s = _mm512_dpbusd_epi32(s, a, b);
  }
  for (__m512i& s : sums) asm volatile("" : : "v"(s));
  return rounds * kTimes * kChains * 2 * 64;
}

constexpr PackedKernels kKernels = [] {
  PackedKernels k{.q8_0 = of32<Bytes>(),
                  .q4_0 = of32<Nibbles40>(),
                  .q4_1 = of32<Nibbles41>(),
                  .q5_0 = of32<FiveBits50>(),
                  .q5_1 = of32<FiveBits51>(),
                  .mxfp4 = of32<E2m1>(),
                  .peak = peak};
  [&]<int... T>(std::integer_sequence<int, T...>) {
    ((k.q4_k.product[T] = blocks_k<false, T + 1>), ...);
    ((k.q5_k.product[T] = blocks_k<true, T + 1>), ...);
    ((k.q6_k.product[T] = blocks_q6_k<T + 1>), ...);
    ((k.ternary.product[T] = blocks_ternary<T + 1>), ...);
  }
  (std::make_integer_sequence<int, 8>());
  fill_columns<Sixteen, kPackedQ4_K>(k.q4_k.columns);
  fill_columns<Sixteen, kPackedQ5_K>(k.q5_k.columns);
  fill_columns<Sixteen, kPackedQ6_K>(k.q6_k.columns);
  fill_columns<Sixteen, kPackedTernary>(k.ternary.columns);
  return k;
}();

}  // namespace

const PackedKernels& packed_kernels_avx512() {
  return kKernels;
}

}  // namespace moiety
#endif
