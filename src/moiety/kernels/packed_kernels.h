#pragma once
// What packed.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/packed.h"

namespace moiety {

/// One group of 16 rows times one tile: out [rows of the tile][16].
using PackedProduct = void (*)(const uint8_t* group, int64_t blocks, const QuantizedTiles::View& x, float* out);

/// By rows of the tile less one.
struct PackedKernels {
  PackedProduct q8_0[8], q4_0[8], q4_1[8], q5_0[8], q5_1[8], q4_k[8], q5_k[8], q6_k[8];
};

const PackedKernels& packed_kernels_avx2();
const PackedKernels& packed_kernels_avx512();

}  // namespace moiety
