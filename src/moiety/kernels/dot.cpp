#include "moiety/kernels/dot.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "moiety/base/error.h"
#include "moiety/kernels/cpu.h"
#include "moiety/kernels/dot_loops.h"

namespace moiety {
namespace {

const DotKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512:
      return dot_kernels_avx512();
    case Isa::Avx2:
      return dot_kernels_avx2();
    default:
      break;
  }
#endif
  return kPlain;
}

DotBlocks kernel_of(const DotKernels& k, Format format) {
  switch (format) {
    case Format::Q8_0:
      return k.q8_0;
    case Format::Q4_0:
      return k.q4_0;
    case Format::Q4_1:
      return k.q4_1;
    case Format::Q5_0:
      return k.q5_0;
    case Format::Q5_1:
      return k.q5_1;
    case Format::Q4_K:
      return k.q4_k;
    case Format::Q5_K:
      return k.q5_k;
    case Format::Q6_K:
      return k.q6_k;
    case Format::TQ1_0:
      return k.tq1_0;
    case Format::TQ2_0:
      return k.tq2_0;
    case Format::MXFP4:
      return k.mxfp4;
    default:
      fail("{} weights take float activations, not quantized ones", info(format).name);
  }
}

int block_of(ActivationKind kind) {
  return kind == ActivationKind::Blocks32 ? 32 : 256;
}

}  // namespace

QuantizeBlock quantizer(ActivationKind kind) {
  return kind == ActivationKind::Blocks32 ? kernels().quantize_32 : kernels().quantize_256;
}
QuantizeTileRow tile_row_quantizer(ActivationKind kind) {
  return kind == ActivationKind::Blocks32 ? kernels().tile_row_32 : kernels().tile_row_256;
}

ActivationKind activation_kind(Format weights) {
  switch (weights) {
    case Format::F32:
    case Format::F16:
    case Format::BF16:
      return ActivationKind::Float;
    case Format::Q4_K:
    case Format::Q5_K:
    case Format::Q6_K:
    case Format::TQ1_0:
    case Format::TQ2_0:
      return ActivationKind::Blocks256;
    default:
      break;
  }
  check(is_block(weights), "there are no products with {} weights; dequantize them first", info(weights).name);
  return ActivationKind::Blocks32;
}

void QuantizedRow::Free::operator()(std::byte* p) const {
  ::operator delete[](p, std::align_val_t{64});
}

void QuantizedRow::assign(ActivationKind kind, const float* x, int64_t cols) {
  check(kind != ActivationKind::Float, "float activations are not quantized");
  const int block = block_of(kind);
  check(cols >= 0 && cols % block == 0, "{} activations are not a multiple of the block of {}", cols, block);
  const int64_t padded = (cols + 255) / 256 * 256;
  const int64_t scales = (padded / block + 15) / 16 * 16;  // in whole vectors
  const int64_t sums = kind == ActivationKind::Blocks256 ? (padded / 16 + padded / 32 + 31) / 32 * 32 : 0;
  const auto bytes = static_cast<size_t>(padded + 5 * scales * 4 + sums * 2);
  if (bytes > capacity_) {
    memory_.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
    capacity_ = bytes;
  }
  kind_ = kind;
  cols_ = cols;
  std::byte* p = memory_.get();
  q_ = reinterpret_cast<int8_t*>(p);
  scale_ = reinterpret_cast<float*>(p + padded);
  sum_ = scale_ + scales;
  scaled_sum_ = sum_ + scales;
  scale_pairs_ = scaled_sum_ + scales;
  sums16_ = reinterpret_cast<int16_t*>(scale_pairs_ + 2 * scales);
  sums32_ = sums16_ + padded / 16;
  if (bytes > 0 && cols != padded) std::memset(p + cols, 0, static_cast<size_t>(padded - cols));

  const QuantizeBlock quantize = quantizer(kind);
  const int64_t blocks = cols / block;
  for (int64_t b = 0; b < blocks; ++b) {
    int8_t* q = q_ + b * block;
    scale_[b] = quantize(x + b * block, q);
    int32_t sum = 0;
    if (kind == ActivationKind::Blocks32) {
      for (int i = 0; i < 32; ++i) sum += q[i];
    } else {
      for (int g = 0; g < 16; ++g) {
        int32_t part = 0;
        for (int i = 16 * g; i < 16 * g + 16; ++i) part += q[i];
        sums16_[16 * b + g] = static_cast<int16_t>(part);
        sum += part;
      }
      for (int g = 0; g < 8; ++g)
        sums32_[8 * b + g] = static_cast<int16_t>(sums16_[16 * b + 2 * g] + sums16_[16 * b + 2 * g + 1]);
    }
    sum_[b] = static_cast<float>(sum);
    scaled_sum_[b] = scale_[b] * sum_[b];
    scale_pairs_[2 * b] = scale_[b];
    scale_pairs_[2 * b + 1] = scaled_sum_[b];
  }
  for (int64_t b = blocks; b < scales; ++b)
    scale_[b] = sum_[b] = scaled_sum_[b] = scale_pairs_[2 * b] = scale_pairs_[2 * b + 1] = 0.f;
}

void dot_rows(Format format, const std::byte* blocks, int64_t rows, int64_t cols, std::span<const QuantizedRow> x,
              float* y, int64_t y_stride) {
  const int64_t stride = row_bytes(format, cols);
  const DotBlocks kernel = kernel_of(kernels(), format);
  const auto* w = reinterpret_cast<const uint8_t*>(blocks);
  const int64_t count = cols / info(format).block;
  const ActivationKind kind = activation_kind(format);
  for (const QuantizedRow& row : x)
    check(row.kind() == kind && row.cols() == cols,
          "{} activations, quantized for {}, do not fit {} rows of {} columns", row.cols(),
          row.kind() == kind ? "this format" : "another format", info(format).name, cols);
  const auto view = [](const QuantizedRow& r) {
    return ActivationView{r.q(), r.scale(), r.sum(), r.scaled_sum(), r.scale_pairs(), r.sums16(), r.sums32()};
  };
  if (x.size() == 1) return kernel(w, rows, count, view(x[0]), y);
  // A few rows at a time stay in the first-level cache while all activations pass over them.
  constexpr int64_t kChunk = 8;
  for (int64_t r = 0; r < rows; r += kChunk)
    for (size_t t = 0; t < x.size(); ++t)
      kernel(w + r * stride, std::min(kChunk, rows - r), count, view(x[t]), y + static_cast<int64_t>(t) * y_stride + r);
}

void dot_rows(Format format, const std::byte* blocks, int64_t rows, int64_t cols, const QuantizedRow& x, float* y) {
  dot_rows(format, blocks, rows, cols, std::span(&x, 1), y, rows);
}

void dot_rows_float(Format format, const std::byte* weights, int64_t rows, int64_t cols, const float* x, float* y) {
  const DotKernels& k = kernels();
  const DotFloats kernel = format == Format::F32    ? k.f32
                           : format == Format::F16  ? k.f16
                           : format == Format::BF16 ? k.bf16
                                                    : nullptr;
  check(kernel != nullptr, "{} weights take quantized activations, not float ones", info(format).name);
  kernel(reinterpret_cast<const uint8_t*>(weights), rows, cols, x, y);
}

}  // namespace moiety
