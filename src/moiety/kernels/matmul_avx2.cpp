// Tiles of 6 x 16 sums in 12 registers. bf16 is widened to f32 when it is packed.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "moiety/kernels/half.h"
#include "moiety/kernels/matmul_loops.h"

namespace moiety {
namespace {

struct Avx2 {
  static constexpr int64_t kRows = 6, kColumns = 16;
  static constexpr int64_t kLeft = 48 * 1024;
  static constexpr int64_t kDepth = 256;
  template <class T>
  static constexpr int64_t kUnit = 1;

  static __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 eight(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // The first n of them, and zeros.
  template <class T>
  [[gnu::always_inline]] static __m256 eight(const T* p, int64_t n) {
    if (n >= 8) return eight(p);
    T some[8] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return eight(some);
  }
  // As the type T has them.
  template <class T, class Source>
  [[gnu::always_inline]] static __m256 eight_as(const Source* p, int64_t n) {
    if constexpr (sizeof(T) < sizeof(Source)) {
      uint16_t some[8] = {};
      for (int64_t i = 0; i < std::min<int64_t>(n, 8); ++i) some[i] = float_to_bf16(p[i]);
      return eight(some);
    } else {
      return eight(p, n);
    }
  }
  static void store(uint32_t* to, __m256 x) { _mm256_storeu_ps(reinterpret_cast<float*>(to), x); }

  // Rows r[0..7] -> their transposition.
  static void transpose8(__m256 r[8]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    std::copy_n(t, 8, r);
  }

  // 8 lines of elements that lie one behind another along k: to[p * width + line]. Lines that are missing give zeros.
  // Writes 8 units at each p: those beyond `width` are written again with the next p, or follow the panel.
  template <class T, class Source>
  static void pack_lines(const Source* const* lines, int64_t have, int64_t count, uint32_t* to, int64_t width) {
    for (int64_t p = 0; p < count; p += 8) {
      __m256 r[8];
      const int64_t left = count - p;
      for (int i = 0; i < 8; ++i) r[i] = i < have ? eight_as<T>(lines[i] + p, left) : _mm256_setzero_ps();
      transpose8(r);
      for (int64_t i = 0; i < std::min<int64_t>(8, left); ++i) store(to + (p + i) * width, r[i]);
    }
  }

  // Elements that lie one behind another across the panel: line(p) is where those of depth p begin; `have` of `width`.
  template <int64_t width, class T, class Source, class Line>
  static void pack_across(Line line, int64_t have, int64_t count, uint32_t* to) {
    const auto pack = [&](int64_t n) __attribute__((always_inline)) {
      for (int64_t p = 0; p < count; ++p)
        for (int64_t at = 0; at < width; at += 8)
          store(to + p * width + at, eight_as<T>(line(p) + at, std::clamp<int64_t>(n - at, 0, 8)));
    };
    have == width ? pack(width) : pack(have);  // all of them: their number is known here
  }

  template <class T>
  static void pack_left(const MatrixView<T>& a, int64_t begin, int64_t have, int64_t from, int64_t count,
                        uint32_t* to) {
    if (!a.transposed) {
      const T* lines[kRows];
      for (int64_t i = 0; i < have; ++i) lines[i] = a.line(begin + i) + from;
      pack_lines<T>(lines, have, count, to, kRows);
    } else {
      pack_across<kRows, T, T>([&](int64_t p) { return a.line(from + p) + begin; }, have, count, to);
    }
  }

  template <class T, class Source>
  static void pack_right(const MatrixView<Source>& b, int64_t begin, int64_t have, int64_t from, int64_t count,
                         uint32_t* to) {
    if (b.transposed) {
      for (int64_t half = 0; half < kColumns; half += 8) {
        const Source* lines[8];
        const int64_t n = std::clamp<int64_t>(have - half, 0, 8);
        for (int64_t j = 0; j < n; ++j) lines[j] = b.line(begin + half + j) + from;
        pack_lines<T>(lines, n, count, to + half, kColumns);
      }
    } else {
      pack_across<kColumns, T, Source>([&](int64_t p) { return b.line(from + p) + begin; }, have, count, to);
    }
  }

  // out [rows, 16] = the first `rows` of a packed run times a packed panel.
  template <int rows>
  static void tile(int64_t units, const uint32_t* a, const uint32_t* b, float* out) {
    const float *left = reinterpret_cast<const float*>(a), *right = reinterpret_cast<const float*>(b);
    __m256 sums[rows][2];
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int64_t p = 0; p < units; ++p) {
      const __m256 b0 = _mm256_load_ps(right + p * kColumns), b1 = _mm256_load_ps(right + p * kColumns + 8);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const __m256 x = _mm256_broadcast_ss(left + p * kRows + i);
        sums[i][0] = _mm256_fmadd_ps(x, b0, sums[i][0]);
        sums[i][1] = _mm256_fmadd_ps(x, b1, sums[i][1]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      _mm256_store_ps(out + i * kColumns, sums[i][0]);
      _mm256_store_ps(out + i * kColumns + 8, sums[i][1]);
    }
  }
  using Tile = void (*)(int64_t, const uint32_t*, const uint32_t*, float*);
  template <class T>
  static constexpr Tile kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

  // to [rows, columns] = tile (+ to).
  static void put(const float* from, int64_t rows, int64_t columns, float* to, int64_t stride, bool add) {
    for (int64_t i = 0; i < rows; ++i, from += kColumns, to += stride)
      for (int64_t j = 0; j < columns; ++j) to[j] = add ? from[j] + to[j] : from[j];
  }
  // The same for bf16; `before` [rows, columns], where given, is what other depths summed up.
  static void put(const float* from, const float* before, int64_t width, int64_t rows, int64_t columns, uint16_t* to,
                  int64_t stride, bool add) {
    for (int64_t i = 0; i < rows; ++i, from += kColumns, to += stride)
      for (int64_t j = 0; j < columns; ++j) {
        float x = from[j];
        if (before != nullptr) x += before[i * width + j];
        if (add) x += bf16_to_float(to[j]);
        to[j] = float_to_bf16(x);
      }
  }
};

constexpr MatmulKernels kKernels = {product<Avx2>, product<Avx2>, product<Avx2>, product<Avx2>, product<Avx2>};

}  // namespace

const MatmulKernels& matmul_kernels_avx2() {
  return kKernels;
}

}  // namespace moiety
#endif
