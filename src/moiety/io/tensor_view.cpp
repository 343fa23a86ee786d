#include "moiety/io/tensor_view.h"

#include <fmt/ranges.h>

#include "moiety/base/error.h"

namespace moiety {
namespace {

int64_t product(const TensorInfo& tensor, size_t dims) {
  int64_t value = 1;
  for (size_t i = 0; i < dims; ++i) {
    check(tensor.shape[i] >= 0 && !__builtin_mul_overflow(value, tensor.shape[i], &value),
          "tensor {}: the shape [{}] is negative or overflows 64 bits", tensor.name, fmt::join(tensor.shape, ", "));
  }
  return value;
}

}  // namespace

int64_t TensorInfo::elements() const {
  return product(*this, shape.size());
}

int64_t TensorInfo::rows() const {
  return shape.empty() ? 1 : product(*this, shape.size() - 1);
}

int64_t TensorInfo::cols() const {
  return shape.empty() ? 1 : shape.back();
}

int64_t TensorInfo::bytes() const {
  int64_t value = 0;
  check(!__builtin_mul_overflow(rows(), row_bytes(format, cols()), &value), "tensor {}: its size overflows 64 bits",
        name);
  return value;
}

std::vector<float> TensorView::to_float() const {
  const int64_t n_rows = rows(), n_cols = cols();
  std::vector<float> values(static_cast<size_t>(elements()));
  if (values.empty()) return values;
  const int64_t stride = row_bytes(format, n_cols);
  for (int64_t r = 0; r < n_rows; ++r)
    dequantize_row(format, data.data() + r * stride, values.data() + r * n_cols, n_cols);
  return values;
}

}  // namespace moiety
