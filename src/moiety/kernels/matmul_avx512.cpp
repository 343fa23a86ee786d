// Tiles of 14 x 32 sums in 28 registers. bf16 is packed as pairs of neighbours along k, the 32-bit unit of its dot
// product, so that both types share the packing.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "moiety/kernels/half.h"
#include "moiety/kernels/matmul_loops.h"

namespace moiety {
namespace {

struct Avx512 {
  static constexpr int64_t kRows = kMatmulRows, kColumns = kMatmulColumns;
  static constexpr int64_t kLeft = 140 * 1024;
  static constexpr int64_t kDepth = 512;

  // One element of f32, or two of bf16.
  template <class T>
  static constexpr int64_t kUnit = 4 / sizeof(T);

  // Rows r[0..15] of 16 units -> their transposition.
  static void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  static __mmask16 first(int64_t n) {
    return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << std::max<int64_t>(n, 0)) - 1u);
  }

  // 32 numbers as bf16, in their order. Subnormal ones give zero.
  static __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

  // Lines of elements that lie one behind another along k: to[p * width + line], units p. Lines that are missing give
  // zeros; `width` lines of the panel, at most 16 of them here. Reads `count` elements of a line.
  template <class T, class Source>
  static void pack_lines(const Source* const* lines, int64_t have, int64_t count, uint32_t* to, int64_t width,
                         int64_t keep) {
    const int64_t units = (count + kUnit<T> - 1) / kUnit<T>;
    const __mmask16 kept = first(keep);
    for (int64_t p = 0; p < units; p += 16) {
      __m512i r[16];
      const int64_t left = count - p * kUnit<T>;  // elements
      for (int i = 0; i < 16; ++i) {
        if (i >= have)
          r[i] = _mm512_setzero_si512();
        else if constexpr (sizeof(Source) > sizeof(T))
          r[i] = rounded(_mm512_maskz_loadu_ps(first(left), lines[i] + p * 2),
                         _mm512_maskz_loadu_ps(first(left - 16), lines[i] + p * 2 + 16));
        else if (left >= 16 * kUnit<T>)
          r[i] = _mm512_loadu_si512(lines[i] + p * kUnit<T>);
        else if constexpr (sizeof(T) == 4)
          r[i] = _mm512_maskz_loadu_epi32(first(left), lines[i] + p);
        else
          r[i] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1u), lines[i] + p * 2);
      }
      transpose16(r);
      const int64_t rows = std::min<int64_t>(16, units - p);
      for (int64_t i = 0; i < rows; ++i) _mm512_mask_storeu_epi32(to + (p + i) * width, kept, r[i]);
    }
  }

  // 16 elements and 16 more -> pairs of one of each.
  static __m512i neighbours(__m512i x) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), x);
  }

  // Elements that lie one behind another across the panel: line(p) is where those of depth p begin; `have` of `width`.
  template <class T, class Source, class Line>
  static void pack_across(Line line, int64_t have, int64_t count, uint32_t* to, int64_t width) {
    for (int64_t at = 0; at < width; at += 16) {
      const __mmask16 keep = first(width - at), real = first(have - at);
      if constexpr (sizeof(T) == 4) {
        for (int64_t p = 0; p < count; ++p)
          _mm512_mask_storeu_epi32(to + p * width + at, keep, _mm512_maskz_loadu_epi32(real, line(p) + at));
      } else if constexpr (sizeof(Source) > sizeof(T)) {
        for (int64_t p = 0; p < count; p += 2) {
          const __m512 low = _mm512_maskz_loadu_ps(real, line(p) + at);
          const __m512 high = p + 1 < count ? _mm512_maskz_loadu_ps(real, line(p + 1) + at) : _mm512_setzero_ps();
          _mm512_mask_storeu_epi32(to + p / 2 * width + at, keep, neighbours(rounded(low, high)));
        }
      } else {
        const auto wide = [&](int64_t p) {
          return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, line(p) + at));
        };
        for (int64_t p = 0; p < count; p += 2) {
          const __m512i low = wide(p), high = p + 1 < count ? wide(p + 1) : _mm512_setzero_si512();
          _mm512_mask_storeu_epi32(to + p / 2 * width + at, keep, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
    }
  }

  // Rows begin ... begin + have of the left operand, depth from ... from + count.
  template <class T>
  static void pack_left(const MatrixView<T>& a, int64_t begin, int64_t have, int64_t from, int64_t count,
                        uint32_t* to) {
    if (!a.transposed) {
      const T* lines[kRows];
      for (int64_t i = 0; i < have; ++i) lines[i] = a.line(begin + i) + from;
      pack_lines<T>(lines, have, count, to, kRows, kRows);
    } else {
      pack_across<T, T>([&](int64_t p) { return a.line(from + p) + begin; }, have, count, to, kRows);
    }
  }

  template <class T, class Source>
  static void pack_right(const MatrixView<Source>& b, int64_t begin, int64_t have, int64_t from, int64_t count,
                         uint32_t* to) {
    if (b.transposed) {
      for (int64_t half = 0; half < kColumns; half += 16) {
        const Source* lines[16];
        const int64_t n = std::clamp<int64_t>(have - half, 0, 16);
        for (int64_t j = 0; j < n; ++j) lines[j] = b.line(begin + half + j) + from;
        pack_lines<T>(lines, n, count, to + half, kColumns, 16);
      }
    } else {
      pack_across<T, Source>([&](int64_t p) { return b.line(from + p) + begin; }, have, count, to, kColumns);
    }
  }

  template <class T>
  [[gnu::always_inline]] static __m512 fused(__m512 left, __m512 right, __m512 sum) {
    if constexpr (sizeof(T) == 4)
      return _mm512_fmadd_ps(left, right, sum);
    else
      return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  // tile [rows, 32] = the first `rows` of a packed run times a packed panel.
  template <class T, int rows>
  static void tile(int64_t units, const uint32_t* a, const uint32_t* b, float* out) {
    __m512 sums[rows][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < units; ++p) {
      const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16);
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i) {
        float unit;
        std::memcpy(&unit, a + i, 4);
        const __m512 left = _mm512_set1_ps(unit);
        sums[i][0] = fused<T>(left, b0, sums[i][0]);
        sums[i][1] = fused<T>(left, b1, sums[i][1]);
      }
      a += kRows;
      b += kColumns;
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      _mm512_store_ps(out + i * kColumns, sums[i][0]);
      _mm512_store_ps(out + i * kColumns + 16, sums[i][1]);
    }
  }

  using Tile = void (*)(int64_t, const uint32_t*, const uint32_t*, float*);
  template <class T>
  static constexpr Tile kTiles[] = {nullptr,     tile<T, 1>,  tile<T, 2>,  tile<T, 3>,  tile<T, 4>,
                                    tile<T, 5>,  tile<T, 6>,  tile<T, 7>,  tile<T, 8>,  tile<T, 9>,
                                    tile<T, 10>, tile<T, 11>, tile<T, 12>, tile<T, 13>, tile<T, 14>};

  // to [rows, columns] = tile (+ to).
  static void put(const float* from, int64_t rows, int64_t columns, float* to, int64_t stride, bool add) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t half = 0; half < columns; half += 16) {
        const __mmask16 mask = first(columns - half);
        __m512 x = _mm512_load_ps(from + i * kColumns + half);
        float* at = to + i * stride + half;
        if (add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, at));
        _mm512_mask_storeu_ps(at, mask, x);
      }
  }

  // The same for bf16; `before` [rows, columns], where given, is what other depths summed up.
  static void put(const float* from, const float* before, int64_t width, int64_t rows, int64_t columns, uint16_t* to,
                  int64_t stride, bool add) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t half = 0; half < columns; half += 16) {
        const __mmask16 mask = first(columns - half);
        __m512 x = _mm512_load_ps(from + i * kColumns + half);
        if (before != nullptr) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, before + i * width + half));
        uint16_t* at = to + i * stride + half;
        if (add) {
          const __m512i old = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at)), 16);
          x = _mm512_add_ps(x, _mm512_castsi512_ps(old));
        }
        // By integers: the instruction that rounds to bf16 flushes subnormal values.
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i out = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
      }
  }
};

constexpr MatmulKernels kKernels = {product<Avx512>, product<Avx512>, product<Avx512>, product<Avx512>,
                                    product<Avx512>};

}  // namespace

const MatmulKernels& matmul_kernels_avx512() {
  return kKernels;
}

}  // namespace moiety
#endif
