// Block formats of GGUF files: decoding, reference rounding, products with quantized activations.
#include <torch/torch.h>

#include <algorithm>
#include <cctype>
#include <vector>

#include "conform.h"
#include "moiety/base/error.h"
#include "moiety/kernels/dot.h"
#include "moiety/kernels/format.h"

namespace moiety::conform {
namespace {

Format format_of(const Case& c) {
  const std::string name = c.config.at("type").get<std::string>();
  const FormatInfo* found = find_format(name);
  check(found != nullptr, "there is no format {}", name);
  return found->format;
}

const std::byte* bytes_of(const torch::Tensor& t) {
  return static_cast<const std::byte*>(t.data_ptr());
}

// Columns of a row that takes `bytes` bytes.
int64_t columns(Format format, int64_t bytes) {
  const FormatInfo& f = info(format);
  check(bytes % f.bytes == 0, "rows of {} bytes do not hold whole blocks of {}", bytes, f.name);
  return bytes / f.bytes * f.block;
}

// The sizes of `t` with another last one.
std::vector<int64_t> with_last(const torch::Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

Outputs dequantize(const Case& c) {
  const Format format = format_of(c);
  const torch::Tensor blocks = c.in("blocks").to(torch::kUInt8);
  const int64_t stride = blocks.size(-1), rows = blocks.numel() / std::max<int64_t>(stride, 1);
  const int64_t cols = columns(format, stride);
  torch::Tensor values = torch::empty(with_last(blocks, cols));
  for (int64_t r = 0; r < rows; ++r)
    dequantize_row(format, bytes_of(blocks) + r * stride, values.data_ptr<float>() + r * cols, cols);
  return {{"values", values}};
}

Outputs quantize(const Case& c) {
  const Format format = format_of(c);
  const torch::Tensor values = c.in("values").to(torch::kFloat32);
  const int64_t cols = values.size(-1), rows = values.numel() / std::max<int64_t>(cols, 1);
  const int64_t stride = row_bytes(format, cols);
  torch::Tensor blocks = torch::empty(with_last(values, stride), torch::kUInt8);
  for (int64_t r = 0; r < rows; ++r)
    quantize_row(format, values.data_ptr<float>() + r * cols, static_cast<std::byte*>(blocks.data_ptr()) + r * stride,
                 cols);
  return {{"blocks", blocks}};
}

Outputs dot(const Case& c) {
  const Format format = format_of(c);
  const torch::Tensor blocks = c.in("blocks").to(torch::kUInt8), x = c.in("x").to(torch::kFloat32);
  const int64_t stride = blocks.size(-1), rows = blocks.numel() / std::max<int64_t>(stride, 1);
  const int64_t cols = columns(format, stride);
  check(x.numel() == cols, "x has {} values for rows of {}", x.numel(), cols);
  QuantizedRow activations;
  quantize_activations(format, x.data_ptr<float>(), cols, activations);
  torch::Tensor y = torch::empty({rows});
  dot_rows(format, bytes_of(blocks), rows, cols, activations, y.data_ptr<float>());
  return {{"y", y}};
}

std::string lower(std::string_view name) {
  std::string text(name);
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char ch) { return std::tolower(ch); });
  return text;
}

[[maybe_unused]] const bool registered = [] {
  for (const FormatInfo& each : formats()) {
    const std::string name = lower(each.name);
    ops()["gguf-formats/dequantize_" + name] = dequantize;
    if (each.can_quantize) ops()["gguf-formats/quantize_" + name] = quantize;
    if (is_block(each.format)) ops()["gguf-formats/dot_" + name] = dot;
  }
  return true;
}();

}  // namespace
}  // namespace moiety::conform
