#pragma once
// Products of stored weight rows with activation rows. With block formats the activations are quantized once a row, the
// products of a block are exact in integers, and a block's sum is scaled in float32; with F32, F16 and BF16 everything
// is float32. Each weight is read once. No threads inside: callers split the rows. The instruction set is isa() of
// cpu.h.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "moiety/kernels/format.h"

namespace moiety {

/// How activations go with a weight format.
enum class ActivationKind : uint8_t {
  Float,      ///< F32, F16, BF16: as they are
  Blocks32,   ///< Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4: da = max|a| / 127 rounded to half, q = round half away (a / da)
  Blocks256,  ///< Q4_K, Q5_K, Q6_K, TQ1_0, TQ2_0: da = -M / 127 (M the signed extreme), q = nearest even (a / da)
};
/// Throws Error for a format that has no products (integers, F64, F8).
ActivationKind activation_kind(Format weights);

/// A row of activations in int8 with the sums that minimums and offsets need. Reusable: assigning keeps the memory.
/// One row serves all weight formats of its kind. A block that holds NaN or infinity makes every product NaN; a block
/// of zeros has scale 0. Arrays are 64-byte aligned and padded with zeros to a multiple of 256 elements.
class QuantizedRow {
 public:
  QuantizedRow() = default;
  QuantizedRow(QuantizedRow&&) noexcept = default;
  QuantizedRow& operator=(QuantizedRow&&) noexcept = default;

  /// x [cols]; cols must be a multiple of the kind's block. Throws Error otherwise, and for ActivationKind::Float.
  void assign(ActivationKind kind, const float* x, int64_t cols);

  ActivationKind kind() const { return kind_; }
  int64_t cols() const { return cols_; }
  const int8_t* q() const { return q_; }                     ///< [cols]
  const float* scale() const { return scale_; }              ///< [cols / block]
  const float* sum() const { return sum_; }                  ///< [cols / block] sum of q of the block
  const float* scaled_sum() const { return scaled_sum_; }    ///< [cols / block] scale * sum
  const float* scale_pairs() const { return scale_pairs_; }  ///< [cols / block][2] scale and scaled sum side by side
  const int16_t* sums16() const { return sums16_; }          ///< [cols / 16] sums of q, Blocks256 only
  const int16_t* sums32() const { return sums32_; }          ///< [cols / 32] sums of q, Blocks256 only

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte[], Free> memory_;
  size_t capacity_ = 0;
  ActivationKind kind_ = ActivationKind::Float;
  int64_t cols_ = 0;
  int8_t* q_ = nullptr;
  float *scale_ = nullptr, *sum_ = nullptr, *scaled_sum_ = nullptr, *scale_pairs_ = nullptr;
  int16_t *sums16_ = nullptr, *sums32_ = nullptr;
};

/// x [cols] quantized as products with `weights` want it.
inline void quantize_activations(Format weights, const float* x, int64_t cols, QuantizedRow& out) {
  out.assign(activation_kind(weights), x, cols);
}

/// y[r] = row r of `blocks` times x, r = 0..rows-1. Throws Error when x is of another kind or length than the rows.
void dot_rows(Format format, const std::byte* blocks, int64_t rows, int64_t cols, const QuantizedRow& x, float* y);
/// The same for several activation rows: y[t * y_stride + r]. The weights pass through the caches once.
void dot_rows(Format format, const std::byte* blocks, int64_t rows, int64_t cols, std::span<const QuantizedRow> x,
              float* y, int64_t y_stride);
/// y[r] = row r of F32, F16 or BF16 weights times x [cols], accumulated in float32.
void dot_rows_float(Format format, const std::byte* weights, int64_t rows, int64_t cols, const float* x, float* y);

}  // namespace moiety
