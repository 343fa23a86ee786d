#pragma once
// Channel-wise linear quantization of weights, symmetric, one half-precision scale a row (EdgeMoE, arXiv 2308.14352):
// s = half(max |w| / (2^(b-1) - 1)), q = clamp(round half to even(w / s)) with the scale as it was rounded, w' = q * s.
#include <cstddef>
#include <cstdint>
#include <span>

namespace moiety {

/// How the scale of 2-bit rows is found; wider codes always take the largest value.
enum class Int2Scale {
  max,  ///< the largest |w|: the codes are -1, 0, 1
  fit,  ///< q = clip(round(w / mean |w|), -1, 1), s = half(sum w q / sum q^2): the least squares for these codes
};

/// Largest code of b bits, 2^(b-1) - 1; the codes are -limit ... limit.
constexpr int64_t channel_code_limit(int bits) {
  return (int64_t{1} << (bits - 1)) - 1;
}
/// Bytes of one packed row: ceil(columns * bits / 8).
constexpr int64_t channel_row_bytes(int64_t columns, int bits) {
  return (columns * bits + 7) / 8;
}

/// Codes of one row; bits 2, 4 or 8. Returns the scale, a half. A row of zeros, or one whose scale is too small for a
/// half, gets scale 0 and codes 0. Error: a value that is not finite, a scale above the largest half.
uint16_t quantize_channel(std::span<const float> row, int bits, Int2Scale int2, int8_t* codes);

/// Codes + 2^(b-1), b bits each, the first in the lowest bits of the first byte; what fills the last byte is code 0.
/// `out`: channel_row_bytes.
void pack_channel(std::span<const int8_t> codes, int bits, std::byte* out);
/// The other way.
void unpack_channel(const std::byte* packed, int bits, std::span<int8_t> codes);

/// row[i] = q_i * scale in f32 of a packed row; scale a half.
void dequantize_channel(const std::byte* packed, uint16_t scale, int bits, std::span<float> row);

}  // namespace moiety
