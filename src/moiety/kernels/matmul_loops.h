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

// Asks for `bytes` of memory, which no processor foresees where lines of a matrix lie far apart.
inline void ask_for(const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const char* at = static_cast<const char*>(from);
  for (int64_t p = 0; p < bytes + kLine - 1; p += kLine) __builtin_prefetch(at + std::min(p, bytes - 1), 0, 2);
}

// What a panel is packed from, `width` lines across it and `count` elements along k, asked for in `parts` while the
// tiles of the panel before are computed.
template <class T>
class Ahead {
 public:
  // `along`: lines of the matrix lie along k.
  Ahead(const MatrixView<T>& v, bool along, int64_t begin, int64_t width, int64_t from, int64_t count, int64_t parts)
      : v_(v), first_(along ? begin : from), lines_(along ? width : count), element_(along ? from : begin) {
    if (width <= 0 || count <= 0) lines_ = 0;
    bytes_ = (along ? count : width) * static_cast<int64_t>(sizeof(T));
    each_ = (lines_ + parts - 1) / parts;
  }
  void fetch(int64_t part) const {
    const int64_t last = std::min(lines_, (part + 1) * each_);
    for (int64_t i = part * each_; i < last; ++i) ask_for(v_.line(first_ + i) + element_, bytes_);
  }

 private:
  const MatrixView<T>& v_;
  int64_t first_, lines_, element_, bytes_ = 0, each_ = 0;
};

// `Set` says what an instruction set does:
//   kRows, kColumns   of a tile
//   kLeft             units of the left operand that are packed at a time: as many as the second cache keeps beside
//                     what streams through it
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
  if (m <= 0 || n <= 0) return;
  const int64_t depth = ((k + depths - 1) / depths + 1) / 2 * 2;  // elements
  const int64_t units = (depth + kUnit - 1) / kUnit;
  const int64_t most = std::max<int64_t>(1, Set::kLeft / std::max<int64_t>(units, 1) / kRows) * kRows;
  const int64_t blocks = (m + most - 1) / most;
  const int64_t block = ((m + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
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
      const int64_t tiles = (rows + kRows - 1) / kRows;
      for (int64_t j = 0; j < n; j += kColumns) {
        const int64_t columns = std::min(kColumns, n - j);
        Set::template pack_right<T>(b, j, columns, from, count, right);
        const bool turn = j + kColumns >= n;  // to the next depth
        const int64_t next = turn ? 0 : j + kColumns, behind = turn ? from + depth : from;
        const Ahead<Right> ahead(b, b.transposed, next, std::min(kColumns, n - next), behind,
                                 std::min(depth, k - behind), tiles);
        for (int64_t i = 0; i < rows; i += kRows) {
          const int64_t now = std::min(kRows, rows - i);
          if (j == 0) {
            Set::pack_left(a, top + i, now, from, count, left + i * used);
            Ahead<T>(a, !a.transposed, top + i + now, std::min(kRows, rows - i - now), from, count, 1).fetch(0);
          }
          ahead.fetch(i / kRows);
          Out* to = out + (top + i) * stride + j;
          for (int64_t r = 0; r < now; ++r) ask_for(to + r * stride, columns * static_cast<int64_t>(sizeof(Out)));
          Set::template kTiles<T>[now](used, left + i * used, right, result);
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
