// Products of packed rows with AVX2. 8 of a group's 16 rows are a vector; a step's quads of 8 rows are unpacked into
// registers once and meet all rows of the tile. maddubs adds two products in 16 bits, which saturate; how many of its
// sums 16 bits hold says when they have to be widened:
//   4 bits  15 * 127 * 2 = 3810   8 quads (30480)      6 bits   63 * 127 * 2 = 16002   2 quads (32004)
//   5 bits  31 * 127 * 2 = 7874   4 quads (31496)      8 bits  128 * 127 * 2 = 32512   1 quad, by magnitudes
//   2 bits   3 * 127 * 2 = 762    8 quads (6096)       E2M1    28 * 127 * 2 = 7112    4 quads (28448)
// Activations are at least -127 (QuantizeBlock). The integers, and what is done with them in f32, are those of AVX-512:
// results have the same bits.
#if defined(__x86_64__)
#include <utility>

#include "moiety/kernels/packed_columns.h"
#include "moiety/kernels/packed_kernels.h"
#include "moiety/kernels/packed_layout.h"
#include "moiety/kernels/vectors_avx2.h"

namespace moiety {
namespace {

using View = QuantizedTiles::View;

constexpr int kHalf = 8;  // rows of a vector

// 4 bytes of activations for 8 rows.
[[gnu::always_inline]] inline __m256i four(const void* p) {
  return _mm256_set1_epi32(load<int32_t>(static_cast<const uint8_t*>(p)));
}
[[gnu::always_inline]] inline __m256i quad(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
[[gnu::always_inline]] inline __m256 halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
[[gnu::always_inline]] inline __m128i eight(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
// e8m0_half() of 8 bytes. 2^(e - 127), infinite for 255, less half of itself.
[[gnu::always_inline]] inline __m256 exponents(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi32(eight(p));
  const __m256 v = _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(bytes, 23), _mm256_set1_epi32(1 << 22)));
  return _mm256_fnmadd_ps(v, _mm256_set1_ps(0.5f), v);
}
[[gnu::always_inline]] inline __m256i bits_of_bytes(__m256i v, char mask) {
  return _mm256_and_si256(v, _mm256_set1_epi8(mask));
}
// Low or high halves of bytes.
template <bool high>
[[gnu::always_inline]] inline __m256i nibbles(__m256i v) {
  return bits_of_bytes(high ? _mm256_srli_epi16(v, 4) : v, 15);
}
// Bit `from` of bytes moved to bit `to`. What comes from a neighbour is for a mask to take away.
template <int from, int to>
[[gnu::always_inline]] inline __m256i moved(__m256i v) {
  if constexpr (from < to) return _mm256_slli_epi16(v, to - from);
  if constexpr (from > to) return _mm256_srli_epi16(v, from - to);
  return v;
}
// Nibbles with bit `bit` of each byte of `bits` above.
template <bool high, int bit>
[[gnu::always_inline]] inline __m256i five_bits(__m256i both, __m256i bits) {
  return _mm256_or_si256(nibbles<high>(both), bits_of_bytes(moved<bit, 4>(bits), 16));
}

// Two sums of 16 bits a row of n quads, whose activations lie one behind another.
template <int n>
[[gnu::always_inline]] inline __m256i products(const __m256i* w, const int8_t* a) {
  __m256i sums = _mm256_maddubs_epi16(w[0], four(a));
#pragma GCC unroll 8
  for (int z = 1; z < n; ++z) sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w[z], four(a + 4 * z)));
  return sums;
}

// ---- blocks of 32 ---------------------------------------------------------------------------------------------------

// unpack: the 8 quads of a block in order of their elements. sums: their products with 32 activations. kOffset: what is
// still to be taken off the quants.
struct Bytes {
  static constexpr PackedLayout kLayout = kPackedQ8_0;
  static constexpr int kOffset = 0;
  struct Weights {
    __m256i signs[8], sizes[8];
  };
  [[gnu::always_inline]] static void unpack(const uint8_t* q, const uint8_t*, Weights& w) {
#pragma GCC unroll 8
    for (int z = 0; z < 8; ++z) {
      w.signs[z] = _mm256_xor_si256(quad(q + 64 * z), _mm256_set1_epi8(-128));  // as the file has them
      w.sizes[z] = _mm256_abs_epi8(w.signs[z]);
    }
  }
  [[gnu::always_inline]] static __m256i sums(const Weights& w, const int8_t* a) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int z = 0; z < 8; ++z) {
      const __m256i pairs = _mm256_maddubs_epi16(w.sizes[z], _mm256_sign_epi8(four(a + 4 * z), w.signs[z]));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones));
    }
    return sums;
  }
};

struct Nibbles {
  using Weights = __m256i[8];
  [[gnu::always_inline]] static void unpack(const uint8_t* q, const uint8_t*, Weights& w) {
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z) {
      const __m256i both = quad(q + 64 * z);
      w[z] = nibbles<false>(both);
      w[4 + z] = nibbles<true>(both);
    }
  }
  [[gnu::always_inline]] static __m256i sums(const Weights& w, const int8_t* a) {
    return _mm256_madd_epi16(products<8>(w, a), _mm256_set1_epi16(1));
  }
};
struct Nibbles40 : Nibbles {
  static constexpr PackedLayout kLayout = kPackedQ4_0;
  static constexpr int kOffset = 8;
};
struct Nibbles41 : Nibbles {
  static constexpr PackedLayout kLayout = kPackedQ4_1;
  static constexpr int kOffset = 0;
};

struct FiveBits {
  using Weights = __m256i[8];
  [[gnu::always_inline]] static void unpack(const uint8_t* q, const uint8_t* high, Weights& w) {
    const __m256i bits = quad(high);
    const auto one = [&]<int z>() __attribute__((always_inline)) {
      const __m256i both = quad(q + 64 * z);
      w[z] = five_bits<false, z>(both, bits);
      w[4 + z] = five_bits<true, 4 + z>(both, bits);
    };
    one.template operator()<0>();
    one.template operator()<1>();
    one.template operator()<2>();
    one.template operator()<3>();
  }
  [[gnu::always_inline]] static __m256i sums(const Weights& w, const int8_t* a) {
    const __m256i ones = _mm256_set1_epi16(1);
    return _mm256_add_epi32(_mm256_madd_epi16(products<4>(w, a), ones),
                            _mm256_madd_epi16(products<4>(w + 4, a + 16), ones));
  }
};
struct FiveBits50 : FiveBits {
  static constexpr PackedLayout kLayout = kPackedQ5_0;
  static constexpr int kOffset = 16;
};
struct FiveBits51 : FiveBits {
  static constexpr PackedLayout kLayout = kPackedQ5_1;
  static constexpr int kOffset = 0;
};

struct E2m1 : FiveBits {
  static constexpr PackedLayout kLayout = kPackedMXFP4;
  static constexpr int kOffset = kLayout.offset;
  [[gnu::always_inline]] static void unpack(const uint8_t* q, const uint8_t*, Weights& w) {
    const __m256i table = _mm256_broadcastsi128_si256(e2m1_table<kOffset>());
#pragma GCC unroll 4
    for (int z = 0; z < 4; ++z) {
      const __m256i both = quad(q + 64 * z);
      w[z] = _mm256_shuffle_epi8(table, nibbles<false>(both));
      w[4 + z] = _mm256_shuffle_epi8(table, nibbles<true>(both));
    }
  }
};

// Running totals of a tile's `rows` rows and both halves of the group. One row keeps them in registers.
template <bool single>
struct Totals {
  static constexpr int kMost = single ? 1 : static_cast<int>(QuantizedTiles::kRows);
  __m256 of[kMost][2];
  [[gnu::always_inline]] void clear(int rows) {
    for (int t = 0; t < rows; ++t) of[t][0] = of[t][1] = _mm256_setzero_ps();
  }
  [[gnu::always_inline]] void store(int rows, float* out, int64_t stride) const {
    for (int t = 0; t < rows; ++t)
      for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + stride * t + kHalf * h, of[t][h]);
  }
};

template <class F>
struct Blocks32 {
  template <bool single>
  static void run(const uint8_t* group, int64_t blocks, const View& x, int tile, float* out, int64_t stride) {
    constexpr PackedLayout l = F::kLayout;
    const int rows = single ? 1 : tile;
    PackedBlock<l> block(group);
    Totals<single> total;
    total.clear(rows);
    for (int64_t b = 0; b < blocks; block.next(b++)) {
      if constexpr (!single) block.template ask<1>(0);
      const uint8_t *q = block.body + l.quad_at(0), *above = block.body, *ends = block.ends;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        typename F::Weights w;
        F::unpack(q + 32 * h, above + 32 * h, w);
        const __m256 scale = l.e2m1 ? exponents(ends + 8 * h) : halves(ends + 16 * h);
        __m256 minimum = _mm256_setzero_ps();
        if constexpr (l.min) minimum = halves(ends + 32 + 16 * h);
        for (int t = 0; t < rows; ++t) {
          const int64_t at = b * rows + t;
          __m256i sums = F::sums(w, x.q + 32 * at);
          if constexpr (F::kOffset > 0)
            sums = _mm256_sub_epi32(sums, _mm256_slli_epi32(four(x.sums + at), __builtin_ctz(F::kOffset)));
          __m256 now = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(scale, _mm256_set1_ps(x.scale[at])),
                                       total.of[t][h]);
          if constexpr (l.min) now = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x.minimum[at]), now);
          total.of[t][h] = now;
        }
      }
    }
    total.store(rows, out, stride);
  }
};

// ---- blocks of 256 --------------------------------------------------------------------------------------------------

// 8 scales, each twice, for the two sums that a row has in a vector.
[[gnu::always_inline]] inline __m256i unsigned_scales(const uint8_t* p) {
  const __m128i v = eight(p);
  return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(v, v));
}
[[gnu::always_inline]] inline __m256i signed_scales(const uint8_t* p) {
  const __m128i v = eight(p);
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(v, v));
}

// Q4_K and Q5_K: eight sub-blocks with a scale and a minimum each.
template <bool five>
struct BlocksK {
  template <bool single>
  static void run(const uint8_t* group, int64_t blocks, const View& x, int tile, float* out, int64_t stride) {
    constexpr PackedLayout l = five ? kPackedQ5_K : kPackedQ4_K;
    const int rows = single ? 1 : tile;
    PackedBlock<l> block(group);
    Totals<single> total;
    total.clear(rows);
    for (int64_t b = 0; b < blocks; block.next(b++)) {
      const uint8_t *body = block.body, *ends = block.ends;  // scales first
      const int8_t* a = x.q + 256 * b * rows;
      __m256i sum[Totals<single>::kMost][2];
      for (int t = 0; t < rows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
      // Sub-block g lies in the low (g even) or high halves of eight quads.
      const auto sub = [&]<int g>(int h) __attribute__((always_inline)) {
        __m256i w[8];
#pragma GCC unroll 8
        for (int z = 0; z < 8; ++z) {
          const __m256i both = quad(body + l.quad_at(8 * (g / 2) + z) + 32 * h);
          if constexpr (five)
            w[z] = five_bits<g % 2 == 1, g>(both, quad(body + l.above_at(z) + 32 * h));
          else
            w[z] = nibbles<g % 2 == 1>(both);
        }
        const __m256i scale = unsigned_scales(body + 16 * g + 8 * h);
        for (int t = 0; t < rows; ++t) {
          const int8_t* at = a + 256 * t + 32 * g;
          __m256i now;
          if constexpr (five)
            now = _mm256_add_epi32(_mm256_madd_epi16(products<4>(w, at), scale),
                                   _mm256_madd_epi16(products<4>(w + 4, at + 16), scale));
          else
            now = _mm256_madd_epi16(products<8>(w, at), scale);
          sum[t][h] = _mm256_add_epi32(sum[t][h], now);
        }
      };
      const auto both_halves = [&]<int g>() __attribute__((always_inline)) {
        if constexpr (!single) block.template ask<8>(g);
        sub.template operator()<g>(0);
        sub.template operator()<g>(1);
      };
      [&]<int... g>(std::integer_sequence<int, g...>) __attribute__((always_inline)) {
        (both_halves.template operator()<g>(), ...);
      }
      (std::make_integer_sequence<int, 8>());
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = halves(ends + 16 * h), minimum = halves(ends + 32 + 16 * h);
        __m256i mins[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) mins[p] = _mm256_cvtepu8_epi16(load128(body + 128 + 32 * p + 16 * h));
        for (int t = 0; t < rows; ++t) {
          const int64_t at = b * rows + t;
          __m256i least = _mm256_madd_epi16(mins[0], four(x.pairs + 8 * at));
#pragma GCC unroll 4
          for (int p = 1; p < 4; ++p)
            least = _mm256_add_epi32(least, _mm256_madd_epi16(mins[p], four(x.pairs + 8 * at + 2 * p)));
          const __m256 value =
              _mm256_fmsub_ps(scale, _mm256_cvtepi32_ps(sum[t][h]), _mm256_mul_ps(minimum, _mm256_cvtepi32_ps(least)));
          total.of[t][h] = _mm256_fmadd_ps(value, _mm256_set1_ps(x.scale[at]), total.of[t][h]);
        }
      }
    }
    total.store(rows, out, stride);
  }
};

struct BlocksQ6_K {
  template <bool single>
  static void run(const uint8_t* group, int64_t blocks, const View& x, int tile, float* out, int64_t stride) {
    constexpr PackedLayout l = kPackedQ6_K;
    constexpr int64_t kStep = l.above_at(4) - l.above_at(0);
    const int rows = single ? 1 : tile;
    PackedBlock<l> block(group);
    Totals<single> total;
    total.clear(rows);
    for (int64_t b = 0; b < blocks; block.next(b++)) {
      const uint8_t *body = block.body, *ends = block.ends;  // scales first
      const int8_t* a = x.q + 256 * b * rows;
      __m256i sum[Totals<single>::kMost][2];
      for (int t = 0; t < rows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
      // Sub-blocks s and 8 + s lie in the low and high halves of four quads; `upper`: s is 4 or more.
      const auto sub = [&]<bool upper>(int s, int h) __attribute__((always_inline)) {
        const uint8_t *from = body + l.quad_at(upper ? 16 : 0) + kStep * (s % 4) + 32 * h,
                      *above = body + l.above_at(0) + kStep * (s % 4) + 32 * h;
        constexpr int kFirst = upper ? 2 : 0, kSecond = upper ? 6 : 4;  // where their two bits lie
        __m256i w[8];
#pragma GCC unroll 4
        for (int z = 0; z < 4; ++z) {
          const __m256i both = quad(from + 64 * z), bits = quad(above + 64 * z);
          w[z] = _mm256_or_si256(nibbles<false>(both), bits_of_bytes(moved<kFirst, 4>(bits), 0x30));
          w[4 + z] = _mm256_or_si256(nibbles<true>(both), bits_of_bytes(moved<kSecond, 4>(bits), 0x30));
        }
        const __m256i s0 = signed_scales(body + 16 * s + 8 * h), s1 = signed_scales(body + 16 * (8 + s) + 8 * h);
        for (int t = 0; t < rows; ++t) {
          const int8_t *low = a + 256 * t + 16 * s, *top = low + 128;
          const __m256i first = _mm256_add_epi32(_mm256_madd_epi16(products<2>(w, low), s0),
                                                 _mm256_madd_epi16(products<2>(w + 2, low + 8), s0));
          const __m256i second = _mm256_add_epi32(_mm256_madd_epi16(products<2>(w + 4, top), s1),
                                                  _mm256_madd_epi16(products<2>(w + 6, top + 8), s1));
          sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_add_epi32(first, second));
        }
      };
      const auto both_halves = [&]<bool upper>(int s) __attribute__((always_inline)) {
        if constexpr (!single) block.template ask<8>(s);
        sub.template operator()<upper>(s, 0);
        sub.template operator()<upper>(s, 1);
      };
      for (int s = 0; s < 4; ++s) {
        both_halves.template operator()<false>(s);
        both_halves.template operator()<true>(4 + s);
      }
      // What the offset of 32 added: the scales of two sub-blocks times the sums of their activations.
      alignas(32) int16_t sums16[Totals<single>::kMost][16];
      for (int t = 0; t < rows; ++t) {
        const int32_t* from = x.sums + (b * rows + t) * 16;
        const __m256i both = _mm256_packs_epi32(load256(from), load256(from + 8));
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums16[t]), _mm256_permute4x64_epi64(both, 0xd8));
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m256i pairs[8];
#pragma GCC unroll 8
        for (int p = 0; p < 8; ++p)
          pairs[p] =
              _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(eight(body + 32 * p + 8 * h), eight(body + 32 * p + 16 + 8 * h)));
        const __m256 scale = halves(ends + 16 * h);
        for (int t = 0; t < rows; ++t) {
          __m256i offset = _mm256_madd_epi16(pairs[0], four(sums16[t]));
#pragma GCC unroll 8
          for (int p = 1; p < 8; ++p)
            offset = _mm256_add_epi32(offset, _mm256_madd_epi16(pairs[p], four(sums16[t] + 2 * p)));
          const __m256i exact = _mm256_sub_epi32(sum[t][h], _mm256_slli_epi32(offset, 5));
          total.of[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact),
                                           _mm256_mul_ps(scale, _mm256_set1_ps(x.scale[b * rows + t])), total.of[t][h]);
        }
      }
    }
    total.store(rows, out, stride);
  }
};

// Three values of a weight, four weights a byte.
struct BlocksTernary {
  template <bool single>
  static void run(const uint8_t* group, int64_t blocks, const View& x, int tile, float* out, int64_t stride) {
    constexpr PackedLayout l = kPackedTernary;
    const int rows = single ? 1 : tile;
    PackedBlock<l> block(group);
    const __m256i ones = _mm256_set1_epi16(1);
    Totals<single> total;
    total.clear(rows);
    for (int64_t b = 0; b < blocks; block.next(b++)) {
      const uint8_t *q = block.body, *ends = block.ends;
      const int8_t* a = x.q + 256 * b * rows;
      __m256i sum[Totals<single>::kMost][2];
      for (int t = 0; t < rows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
      for (int c = 0; c < 2; ++c) {
        if constexpr (!single) block.template ask<2>(c);
        const auto quarter = [&]<int k>(int h) __attribute__((always_inline)) {
          __m256i w[8];
#pragma GCC unroll 8
          for (int z = 0; z < 8; ++z) w[z] = bits_of_bytes(moved<2 * k, 0>(quad(q + 64 * (8 * c + z) + 32 * h)), 3);
          for (int t = 0; t < rows; ++t)
            sum[t][h] =
                _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(products<8>(w, a + 256 * t + 128 * c + 32 * k), ones));
        };
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          quarter.template operator()<0>(h);
          quarter.template operator()<1>(h);
          quarter.template operator()<2>(h);
          quarter.template operator()<3>(h);
        }
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = halves(ends + 16 * h);
        for (int t = 0; t < rows; ++t) {
          const int64_t at = b * rows + t;
          // What the offset of 1 added.
          __m128i all = _mm_madd_epi16(load128(x.pairs + 8 * at), _mm_set1_epi16(l.offset));
          all = _mm_add_epi32(all, _mm_shuffle_epi32(all, 0x4e));
          all = _mm_add_epi32(all, _mm_shuffle_epi32(all, 0xb1));
          const __m256i exact = _mm256_sub_epi32(sum[t][h], _mm256_broadcastd_epi32(all));
          total.of[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scale, _mm256_set1_ps(x.scale[at])),
                                           total.of[t][h]);
        }
      }
    }
    total.store(rows, out, stride);
  }
};

template <class B, int T>
void product(const uint8_t* group, int64_t blocks, const View& x, float* out, int64_t stride) {
  B::template run<T == 1>(group, blocks, x, T, out, stride);
}

// Half of a column's rows.
struct Eight {
  static constexpr int64_t kRows = kHalf;
  using Float = __m256;
  static __m256i words(const uint8_t* p) { return quad(p); }
  static __m256i bits(__m256i v, int64_t from, int mask) {
    return _mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi64_si128(from)), _mm256_set1_epi32(mask));
  }
  static __m256i joined(__m256i low, __m256i high) { return _mm256_or_si256(low, _mm256_slli_epi32(high, 4)); }
  static __m256i less(__m256i v, int offset) { return _mm256_sub_epi32(v, _mm256_set1_epi32(offset)); }
  static __m256i e2m1_twice(__m256i v) {
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(e2m1_table<0>()), v);
    return _mm256_srai_epi32(_mm256_slli_epi32(bytes, 24), 24);
  }
  static Float number(__m256i v) { return _mm256_cvtepi32_ps(v); }
  static Float halves(const uint8_t* p) { return moiety::halves(p); }
  static Float exponents(const uint8_t* p) { return moiety::exponents(p); }
  static Float unsigned_bytes(const uint8_t* p) { return number(_mm256_cvtepu8_epi32(eight(p))); }
  static Float signed_bytes(const uint8_t* p) { return number(_mm256_cvtepi8_epi32(eight(p))); }
  static Float every_second(const uint8_t* p, int64_t which) {
    return number(bits(_mm256_cvtepu16_epi32(load128(p)), 8 * which, 255));
  }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float fms(Float a, Float b, Float c) { return _mm256_fmsub_ps(a, b, c); }
  static Float all(float v) { return _mm256_set1_ps(v); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
};

template <class B, PackedLayout l>
constexpr PackedFormat of() {
  PackedFormat f{};
  [&]<int... T>(std::integer_sequence<int, T...>) {
    ((f.product[T] = product<B, T + 1>), ...);
  }
  (std::make_integer_sequence<int, 8>());
  fill_columns<Eight, l>(f.columns);
  return f;
}

// Eight steps are added up in 16 bits, as products<8> has it.
int64_t peak(int64_t rounds) {
  constexpr int kChains = 6, kTimes = 8;
  __m256i sums[kChains];
  for (__m256i& s : sums) s = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi8(1), b = a;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 6
    for (__m256i& s : sums) {
      __m256i words = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int k = 0; k < kTimes; ++k) {
        asm volatile("" : "+x"(a), "+x"(b));  // so that nothing is computed ahead
        words = _mm256_add_epi16(words, _mm256_maddubs_epi16(a, b));
      }
      s = _mm256_add_epi32(s, _mm256_madd_epi16(words, a));
    }
  }
  for (__m256i& s : sums) asm volatile("" : : "x"(s));
  return rounds * kTimes * kChains * 2 * 32;
}

constexpr PackedKernels kKernels{.q8_0 = of<Blocks32<Bytes>, kPackedQ8_0>(),
                                 .q4_0 = of<Blocks32<Nibbles40>, kPackedQ4_0>(),
                                 .q4_1 = of<Blocks32<Nibbles41>, kPackedQ4_1>(),
                                 .q5_0 = of<Blocks32<FiveBits50>, kPackedQ5_0>(),
                                 .q5_1 = of<Blocks32<FiveBits51>, kPackedQ5_1>(),
                                 .mxfp4 = of<Blocks32<E2m1>, kPackedMXFP4>(),
                                 .q4_k = of<BlocksK<false>, kPackedQ4_K>(),
                                 .q5_k = of<BlocksK<true>, kPackedQ5_K>(),
                                 .q6_k = of<BlocksQ6_K, kPackedQ6_K>(),
                                 .ternary = of<BlocksTernary, kPackedTernary>(),
                                 .peak = peak};

}  // namespace

const PackedKernels& packed_kernels_avx2() {
  return kKernels;
}

}  // namespace moiety
#endif
