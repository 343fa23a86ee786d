#pragma once
// A named, typed, read-only piece of a mapped file. Shapes are slowest dimension first (as in torch), whatever the file does.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moiety/kernels/format.h"

namespace moiety {

struct TensorInfo {
  std::string name;
  Format format = Format::F32;
  std::vector<int64_t> shape;  ///< [] is a scalar

  int64_t elements() const;
  int64_t rows() const;  ///< product of all but the last dimension
  int64_t cols() const;  ///< last dimension, 1 for a scalar
  int64_t bytes() const;
};

struct TensorView : TensorInfo {
  std::span<const std::byte> data;
  std::shared_ptr<const void> owner;  ///< keeps the mapping alive

  /// All values as float32, row by row.
  std::vector<float> to_float() const;
};

}  // namespace moiety
