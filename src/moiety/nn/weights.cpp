#include "moiety/nn/weights.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/nn/parallel.h"

namespace moiety {

torch::Dtype torch_dtype(Format format) {
  switch (format) {
    case Format::F32:
      return torch::kFloat32;
    case Format::F16:
      return torch::kFloat16;
    case Format::BF16:
      return torch::kBFloat16;
    case Format::F64:
      return torch::kFloat64;
    case Format::I8:
      return torch::kInt8;
    case Format::U8:
      return torch::kUInt8;
    case Format::I16:
      return torch::kInt16;
    case Format::U16:
      return torch::kUInt16;
    case Format::I32:
      return torch::kInt32;
    case Format::U32:
      return torch::kUInt32;
    case Format::I64:
      return torch::kInt64;
    case Format::U64:
      return torch::kUInt64;
    case Format::BOOL:
      return torch::kBool;
    case Format::F8_E4M3:
      return torch::kFloat8_e4m3fn;
    case Format::F8_E5M2:
      return torch::kFloat8_e5m2;
    default:
      fail("format {} is made of blocks and has no torch dtype: decode it first", info(format).name);
  }
}

Format format_of(torch::Dtype dtype) {
  for (const FormatInfo& f : formats())
    if (!is_block(f.format) && torch_dtype(f.format) == dtype) return f.format;
  fail("tensors of dtype {} cannot be stored; convert to float32, float16 or bfloat16", torch::toString(dtype));
}

torch::Tensor as_tensor(const TensorView& view) {
  const auto options = torch::TensorOptions().dtype(torch_dtype(view.format));
  void* data = const_cast<std::byte*>(view.data.data());
  const bool aligned = reinterpret_cast<uintptr_t>(data) % static_cast<size_t>(info(view.format).bytes) == 0;
  auto tensor = torch::from_blob(
      data, view.shape, [owner = view.owner](void*) {}, options);
  return aligned && data != nullptr ? tensor : tensor.clone();
}

TensorView view_of(const torch::Tensor& t, Format format) {
  const auto held = std::make_shared<torch::Tensor>(t.detach().to(torch::kCPU, torch_dtype(format)).contiguous());
  TensorView v;
  v.format = format;
  v.shape = held->sizes().vec();
  v.data = {static_cast<const std::byte*>(held->const_data_ptr()), static_cast<size_t>(held->nbytes())};
  v.owner = held;
  return v;
}

torch::Tensor dequantize(const TensorView& view) {
  auto out = torch::empty(view.shape, torch::kFloat32);
  const int64_t rows = view.rows(), cols = view.cols();
  const int64_t bytes = row_bytes(view.format, cols);
  float* data = out.data_ptr<float>();
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      dequantize_row(view.format, view.data.data() + r * bytes, data + r * cols, cols);
  });
  return out;
}

TensorView slice_rows(const TensorView& view, int64_t begin, int64_t end) {
  check(view.shape.size() >= 2, "tensor '{}' has {} dimension(s): only matrices and stacks can be cut into rows",
        view.name, view.shape.size());
  check(begin >= 0 && begin <= end && end <= view.shape[0], "rows {} to {} of tensor '{}' do not exist: it has {}",
        begin, end, view.name, view.shape[0]);
  TensorView out = view;
  const auto bytes = static_cast<size_t>(view.bytes() / std::max<int64_t>(1, view.shape[0]));
  out.shape[0] = end - begin;
  out.data = view.data.subspan(begin * bytes, (end - begin) * bytes);
  return out;
}

TensorView select_first(const TensorView& view, int64_t index) {
  TensorView out = slice_rows(view, index, index + 1);
  out.shape.erase(out.shape.begin());
  return out;
}

}  // namespace moiety
