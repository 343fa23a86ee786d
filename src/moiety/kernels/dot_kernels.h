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
/// Where a row of a tile goes (QuantizedTiles::View); a block's numbers stand `rows` places behind those of the block
/// before.
struct TileRow {
  int8_t* q;
  float *scale, *minimum;
  int32_t* sums;
  int16_t* pairs;
  int32_t* largest;  // raised to this row's
  int64_t rows;
};
/// Quantizes a row but for elements that lie far above the others of their block, the first `most` of them: their
/// places `at` and values `whole`. Returns how many.
using QuantizeTileRow = int64_t (*)(const float* x, int64_t blocks, const TileRow& to, int64_t most, int32_t* at,
                                    float* whole);

struct DotKernels {
  DotFloats f32, f16, bf16;
  DotBlocks q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, tq1_0, tq2_0, mxfp4;
  QuantizeBlock quantize_32, quantize_256;
  QuantizeTileRow tile_row_32, tile_row_256;
};

/// How the instruction set in use quantizes a block of the kind.
QuantizeBlock quantizer(ActivationKind kind);
QuantizeTileRow tile_row_quantizer(ActivationKind kind);

const DotKernels& dot_kernels_avx2();
const DotKernels& dot_kernels_avx512();

}  // namespace moiety
