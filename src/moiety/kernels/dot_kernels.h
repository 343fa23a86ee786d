#pragma once
// What dot.cpp asks of one instruction set (internal to kernels/).
#include <cstdint>

#include "moiety/kernels/dot.h"

namespace moiety {

/// The arrays of a QuantizedRow.
struct ActivationView {
  const int8_t* q;
  const float* scale;
  const float* sum;
  const float* scaled_sum;
  const float* scale_pairs;
  const int16_t* sums16;
  const int16_t* sums32;
};

/// y[r] = row r times the activations; rows are `blocks` blocks long and contiguous.
using DotBlocks = void (*)(const uint8_t* w, int64_t rows, int64_t blocks, const ActivationView& a, float* y);
using DotFloats = void (*)(const uint8_t* w, int64_t rows, int64_t cols, const float* x, float* y);

/// Quantizes one block; q and the return value's meaning as in QuantizedRow.
using QuantizeBlock = float (*)(const float* x, int8_t* q);

struct DotKernels {
  DotFloats f32, f16, bf16;
  DotBlocks q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, tq1_0, tq2_0, mxfp4;
  QuantizeBlock quantize_32, quantize_256;
};

/// How the instruction set in use quantizes a block of the kind.
QuantizeBlock quantizer(ActivationKind kind);

const DotKernels& dot_kernels_avx2();
const DotKernels& dot_kernels_avx512();

}  // namespace moiety
