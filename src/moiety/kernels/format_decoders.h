#pragma once
// The decoders of one instruction set, indexed by Format (internal to kernels/).
#include <cstdint>

namespace moiety {

/// Decodes `n` elements (a multiple of the block) at `blocks` into `out`.
using Decoder = void (*)(const uint8_t* blocks, float* out, int64_t n);

const Decoder* decoders_avx2();
const Decoder* decoders_avx512();

}  // namespace moiety
