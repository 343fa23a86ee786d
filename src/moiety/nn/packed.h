#pragma once
// Block matrices packed for products (kernels/packed.h), and several such products at once on all threads.
#include <cstddef>
#include <memory>
#include <span>

#include "moiety/io/tensor_view.h"
#include "moiety/kernels/packed.h"

namespace moiety {

class PackedMatrix {
 public:
  /// Packs a mapped matrix [rows, cols], on all threads. Error: can_pack says no.
  explicit PackedMatrix(const TensorView& blocks);
  /// Over memory that holds the groups already and outlives this.
  PackedMatrix(Format format, int64_t rows, int64_t cols, const std::byte* packed);
  Format format() const { return format_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t groups() const { return packed_groups(rows_); }
  const std::byte* data() const { return data_.get(); }
  int64_t bytes() const;

 private:
  Format format_;
  int64_t rows_, cols_;
  std::shared_ptr<const std::byte> data_;  // a piece of a block of memory that several matrices share
};

/// y [x.size(), stride] = x times the matrix, transposed.
struct PackedJob {
  const PackedMatrix* matrix;
  const QuantizedTiles* x;
  float* y;
  int64_t stride;
};
/// Runs all jobs, their rows side by side on all threads. Jobs write to memory of their own.
void run_jobs(std::span<const PackedJob> jobs);

/// Tiles, their size set, that are to be filled from rows of `from`; see QuantizedTiles::fill.
struct TileJob {
  QuantizedTiles* x;
  const float* from;
  int64_t stride;
  const int64_t* index = nullptr;
};
void quantize_all(std::span<const TileJob> jobs);

/// Rows of activations for matrices of several formats: rounded once for all that take them in the same way.
class TilesByKind {
 public:
  /// The next rows are others.
  void forget() { filled_[0] = filled_[1] = false; }
  /// Tiles [n, cols] for products with a matrix of the format; fill(tiles) rounds the rows, if need be.
  template <class Fill>
  const QuantizedTiles* get(Format format, int64_t n, int64_t cols, const Fill& fill) {
    const ActivationKind kind = activation_kind(format);
    const int which = kind == ActivationKind::Blocks32 ? 0 : 1;
    if (!filled_[which]) {
      tiles_[which].resize(kind, n, cols);
      fill(tiles_[which]);
      filled_[which] = true;
    }
    return &tiles_[which];
  }

 private:
  QuantizedTiles tiles_[2];
  bool filled_[2] = {false, false};
};

}  // namespace moiety
