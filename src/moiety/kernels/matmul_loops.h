#pragma once
// The loops around a tile of sums, for matmul_*.cpp: both operands are packed, the left one as runs of rows, the right
// one as panels of columns, which stay in the first caches while all rows of a block go over them. Unnamed, because
// files built for different instruction sets must not share a copy.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "moiety/kernels/matmul_kernels.h"

namespace moiety {
namespace {

// Grows, never shrinks; one for each thread.
class Scratch {
 public:
  uint32_t* get(int64_t words) {
    if (words > size_) {
      data_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, static_cast<size_t>((words + 15) / 16 * 64))));
      size_ = words;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint32_t, Free> data_;
  int64_t size_ = 0;
};

// What the next panel is packed from, asked for while the tiles of this one are computed: its lines lie far apart,
// which no processor foresees.
template <class T>
class Ahead {
 public:
  Ahead(const MatrixView<T>& b, int64_t column, int64_t columns, int64_t from, int64_t count, int64_t parts)
      : b_(b), lines_(b.transposed ? columns : count), begin_(b.transposed ? from : column) {
    if (columns <= 0 || count <= 0) lines_ = 0;
    first_ = b.transposed ? column : from;
    const int64_t bytes = (b.transposed ? count : columns) * static_cast<int64_t>(sizeof(T));
    pieces_ = (bytes + kLine - 1) / kLine + (bytes % kLine == 0 ? 0 : 1);
    each_ = (lines_ + parts - 1) / parts;
  }
  void fetch(int64_t part) const {
    const int64_t last = std::min(lines_, (part + 1) * each_);
    for (int64_t i = part * each_; i < last; ++i) {
      const char* at = reinterpret_cast<const char*>(b_.line(first_ + i) + begin_);
      for (int64_t p = 0; p < pieces_; ++p) __builtin_prefetch(at + p * kLine, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const MatrixView<T>& b_;
  int64_t lines_, begin_, first_ = 0, pieces_ = 0, each_ = 0;
};

// `Set` says what an instruction set does:
//   kRows, kColumns   of a tile
//   kBlock            rows of the left operand that are packed at a time, a multiple of kRows
//   kDepth            32-bit units along k that are packed at a time
//   kUnit<T>          elements of a unit
//   pack_left, pack_right<T>(view, first line, lines, first element, elements, to)   lines that are missing give
//                            zeros; elements of another type than T are rounded to it
//   kTiles<T>[rows](units, left, right, out [rows, kColumns])
//   put(out of a tile, [sums of other depths, their stride,] rows, columns, to, stride, add)
template <class Set, class T, class Right, class Out>
void product(int64_t m, int64_t n, int64_t k, const MatrixView<T>& a, const MatrixView<Right>& b, Out* out,
             int64_t stride, bool add) {
  constexpr bool rounds = sizeof(Out) == 2;
  constexpr int64_t kRows = Set::kRows, kColumns = Set::kColumns, kUnit = Set::template kUnit<T>;
  static thread_local Scratch left_memory, right_memory, sums_memory;
  const int64_t depths = std::max<int64_t>(1, (k + Set::kDepth * kUnit - 1) / (Set::kDepth * kUnit));
  const int64_t blocks = (m + Set::kBlock - 1) / Set::kBlock;
  if (m <= 0 || n <= 0) return;
  const int64_t block = ((m + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
  const int64_t depth = ((k + depths - 1) / depths + 1) / 2 * 2;  // elements
  const int64_t units = (depth + kUnit - 1) / kUnit;
  uint32_t* left = left_memory.get(block * units + 16);
  uint32_t* right = right_memory.get(kColumns * units);
  const int64_t width = (n + kColumns - 1) / kColumns * kColumns;
  float* sums = rounds && depths > 1 ? reinterpret_cast<float*>(sums_memory.get(block * width)) : nullptr;
  alignas(64) float result[kRows * kColumns];
  for (int64_t top = 0; top < m; top += block) {
    const int64_t rows = std::min(block, m - top);
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t from = d * depth, count = std::clamp<int64_t>(k - from, 0, depth);
      const int64_t used = (count + kUnit - 1) / kUnit;
      for (int64_t i = 0; i < rows; i += kRows)
        Set::pack_left(a, top + i, std::min(kRows, rows - i), from, count, left + i * used);
      for (int64_t j = 0; j < n; j += kColumns) {
        const int64_t columns = std::min(kColumns, n - j);
        Set::template pack_right<T>(b, j, columns, from, count, right);
        const Ahead<Right> ahead(b, j + kColumns, std::min(kColumns, n - j - kColumns), from, count,
                                 (rows + kRows - 1) / kRows);
        for (int64_t i = 0; i < rows; i += kRows) {
          ahead.fetch(i / kRows);
          const int64_t now = std::min(kRows, rows - i);
          Set::template kTiles<T>[now](used, left + i * used, right, result);
          Out* to = out + (top + i) * stride + j;
          if constexpr (!rounds)
            Set::put(result, now, columns, to, stride, add || d > 0);
          else if (d + 1 < depths)
            Set::put(result, now, columns, sums + i * width + j, width, d > 0);
          else
            Set::put(result, d > 0 ? sums + i * width + j : nullptr, width, now, columns, to, stride, add);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moiety
