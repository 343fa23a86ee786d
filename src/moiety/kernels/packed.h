#pragma once
// Products of block-quantized weights that were packed for them: 16 rows side by side, so that one instruction takes a
// step in 16 rows, a block's scales are one vector, and up to 8 rows of activations share what a weight costs to
// unpack. The same kernel serves one token and a whole prompt. Integer sums are exact, block sums are scaled in f32.
// Packed rows take as many bytes as the file's (Q4_K: 3 % more; TQ1_0: as many as TQ2_0). AVX2, and AVX-512 with VNNI,
// with the same bits; dot.h serves other machines.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "moiety/kernels/dot.h"
#include "moiety/kernels/format.h"

namespace moiety {

constexpr int64_t kPackedRows = 16;  ///< rows of a group

/// Whether this machine has products for packed rows of the format.
bool can_pack(Format format);

/// Groups of rows of a matrix [rows, cols].
int64_t packed_groups(int64_t rows);
/// Bytes of one group, a multiple of 64. Error: cols is no multiple of the block.
int64_t packed_group_bytes(Format format, int64_t cols);
/// Packs group `group` of a matrix in its file's order; rows that are missing are zeros.
void pack_group(Format format, const std::byte* blocks, int64_t rows, int64_t cols, int64_t group, std::byte* out);

/// Rows of activations in 8 bits, as QuantizedRow rounds them, 8 rows side by side. Elements that lie far above the
/// others of their block (more than 5 times the mean magnitude; at most one in 64 of a row, the first ones) stay in
/// f32 beside them: one such element would make the steps of its whole block large, and most of the error of 8 bits
/// comes from these blocks. A row's numbers do not depend on the rows beside it. Reusable.
class QuantizedTiles {
 public:
  static constexpr int64_t kRows = 8;
  static constexpr int64_t kShareWhole = 64;
  /// Room for n rows of `cols`; the rows themselves are filled tile by tile. Error: cols is no multiple of the block.
  void resize(ActivationKind kind, int64_t n, int64_t cols);
  int64_t tiles() const { return (n_ + kRows - 1) / kRows; }
  int64_t rows(int64_t tile) const { return n_ - tile * kRows < kRows ? n_ - tile * kRows : kRows; }
  int64_t size() const { return n_; }
  int64_t cols() const { return cols_; }
  ActivationKind kind() const { return kind_; }
  /// Quantizes the rows of a tile: row i at x + (index ? index[i] : i) * stride, i counted over all tiles.
  void fill(int64_t tile, const float* x, int64_t stride, const int64_t* index = nullptr);

  struct View {
    const int8_t* q;         ///< [blocks][rows][block]
    const float* scale;      ///< [blocks][rows]
    const float* minimum;    ///< [blocks][rows] scale times the sum of q (Blocks32)
    const int32_t* sums;     ///< [blocks][rows] (Blocks32) or [blocks][rows][16] sums of 16 (Blocks256)
    const int16_t* pairs;    ///< [blocks][rows][8] sums of 32 (Blocks256)
    const int32_t* largest;  ///< [blocks] largest sum of magnitudes of 32, over the rows (Blocks256)
    int64_t whole;           ///< columns in which some row has an element that is not among q
    const int32_t* columns;  ///< [whole] ascending
    const float* outliers;   ///< [whole][rows], 0 where a row has none
  };
  View view(int64_t tile) const;

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte[], Free> memory_;
  size_t capacity_ = 0;
  ActivationKind kind_ = ActivationKind::Blocks32;
  int64_t n_ = 0, cols_ = 0, block_ = 32, blocks_ = 0;
  int64_t most_ = 0;  // elements of a row that stay whole
  size_t scale_at_ = 0, minimum_at_ = 0, sums_at_ = 0, pairs_at_ = 0, largest_at_ = 0, columns_at_ = 0,
         outliers_at_ = 0;
  int32_t* columns(int64_t tile) const;  // how many, then which
};

/// Asks for the first bytes of groups from `first` on, for a product that comes soon.
void packed_prefetch(Format format, const std::byte* packed, int64_t cols, int64_t first);

/// y[t * stride + r] = row r of the packed matrix times activations t, for the rows of groups first ... last. Error: x
/// is of another kind or length.
void packed_products(Format format, const std::byte* packed, int64_t rows, int64_t cols, int64_t first, int64_t last,
                     const QuantizedTiles& x, float* y, int64_t stride);

/// Runs products of packed rows on registers alone, `rounds` times some, and returns how many operations these were,
/// two for a multiplication with its addition: what this processor allows at most. Error: it has no such products.
int64_t packed_peak(int64_t rounds);

}  // namespace moiety
