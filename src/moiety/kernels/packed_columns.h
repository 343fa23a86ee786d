#pragma once
// Single columns of packed groups, for activations that stay in f32 (internal to kernels/; included by packed_avx2.cpp
// and packed_avx512.cpp, whose V computes for some rows at a time). Everything is in an unnamed namespace so that no
// copy is shared between them.
#include <cstdint>
#include <utility>

#include "moiety/kernels/packed_kernels.h"
#include "moiety/kernels/packed_layout.h"

namespace moiety {
namespace {

// Where the quant of element e of a block stands: in quad `quad`, from bit `from` of bytes on; and the bits above, if
// any, at bit `bit` of byte e % 4 of quad `above`.
struct ColumnPlace {
  int64_t quad, from, above, bit;
};
template <PackedLayout l>
constexpr int kQuantMask = (1 << l.quants / (2 * l.block)) - 1;  // l.quants are 16 rows'
template <PackedLayout l>
ColumnPlace place_of(int64_t e) {
  if constexpr (l.block == 32) {
    if constexpr (l.quants == 512) return {e / 4, 0, 0, 0};
    return {e % 16 / 4, 4 * (e / 16), 0, e / 4};
  } else if constexpr (l.min) {  // Q4_K, Q5_K
    return {8 * (e / 64) + e % 32 / 4, 4 * (e % 64 / 32), e % 32 / 4, e / 32};
  } else if constexpr (l.high > 0) {  // Q6_K
    return {e % 128 / 4, 4 * (e / 128), e % 64 / 4, 2 * (e / 64)};
  } else {  // of three values
    return {8 * (e / 128) + e % 32 / 4, 2 * (e % 128 / 32), 0, 0};
  }
}

// Column e of block b of the rows that V takes from `first` on, as they are stored: quants times scale, minimums.
template <class V, PackedLayout l>
[[gnu::always_inline]] inline typename V::Float column_values(const uint8_t* group, int64_t b, int64_t e,
                                                              int64_t first) {
  const ColumnPlace p = place_of<l>(e);
  const uint8_t *body = group + l.body_at(b), *ends = group + l.ends_at(b);
  const int64_t byte = 8 * (e % 4);
  const auto word = V::words(body + l.quad_at(p.quad) + 4 * first);
  auto q = V::bits(word, byte + p.from, kQuantMask<l>);
  if constexpr (l.high > 0) {
    const auto above = V::words(body + l.above_at(p.above) + 4 * first);
    constexpr int kBits = l.scales > 0 && !l.min ? 3 : 1;
    q = V::joined(q, V::bits(above, byte + p.bit, kBits));
  }
  if constexpr (l.e2m1) return V::mul(V::exponents(ends + first), V::number(V::e2m1_twice(q)));
  const auto value = V::number(V::less(q, l.offset));
  const uint8_t* halves = ends + 2 * first;
  const auto scale = V::halves(halves);
  if constexpr (l.scales == 0) {
    if constexpr (l.min) return V::fma(scale, value, V::halves(halves + 32));
    return V::mul(scale, value);
  } else {
    if constexpr (!l.min) return V::mul(V::mul(scale, V::signed_bytes(body + 16 * (e / 16) + first)), value);
    const int64_t g = e / 32;
    const auto minimum = V::mul(V::halves(halves + 32), V::every_second(body + 128 + 32 * (g / 2) + 2 * first, g % 2));
    return V::fms(V::mul(scale, V::unsigned_bytes(body + 16 * g + first)), value, minimum);
  }
}

template <class V, PackedLayout l, int T>
void columns(const uint8_t* group, int64_t, const QuantizedTiles::View& x, float* out, int64_t stride) {
  for (int64_t first = 0; first < kPackedRows; first += V::kRows) {
    typename V::Float sums[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = V::load(out + stride * t + first);
    for (int64_t u = 0; u < x.whole; ++u) {
      const int64_t column = x.columns[u];
      const auto w = column_values<V, l>(group, column / l.block, column % l.block, first);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t] = V::fma(w, V::all(x.outliers[u * T + t]), sums[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) V::store(out + stride * t + first, sums[t]);
  }
}

template <class V, PackedLayout l>
constexpr void fill_columns(PackedColumns (&to)[8]) {
  [&]<int... T>(std::integer_sequence<int, T...>) {
    ((to[T] = columns<V, l, T + 1>), ...);
  }
  (std::make_integer_sequence<int, 8>());
}

}  // namespace
}  // namespace moiety
