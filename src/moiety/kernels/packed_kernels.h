#pragma once
// What packed.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/packed.h"

namespace moiety {

/// One group of 16 rows times one tile: out [rows of the tile][16], these `stride` apart.
using PackedProduct = void (*)(const uint8_t* group, int64_t blocks, const QuantizedTiles::View& x, float* out,
                               int64_t stride);

/// Adds to the same what elements of activations that were kept whole add: x.outliers[u] times the group's column
/// x.columns[u].
using PackedColumns = PackedProduct;

/// By rows of the tile less one.
struct PackedFormat {
  PackedProduct product[8];
  PackedColumns columns[8];
};
struct PackedKernels {
  PackedFormat q8_0, q4_0, q4_1, q5_0, q5_1, mxfp4, q4_k, q5_k, q6_k, ternary;
  int64_t (*peak)(int64_t rounds);
};

const PackedKernels& packed_kernels_avx2();
const PackedKernels& packed_kernels_avx512();

}  // namespace moiety
