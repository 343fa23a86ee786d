#include "moiety/kernels/channel_quant.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

void check_bits(int bits) {
  check(bits == 2 || bits == 4 || bits == 8, "rows are quantized to 2, 4 or 8 bits, not to {}", bits);
}

// One rounding: by way of a float that is rounded to odd.
uint16_t half_of(double value) {
  auto single = static_cast<float>(value);
  if (static_cast<double>(single) != value && std::isfinite(single)) {
    uint32_t bits = bits_of(single);
    if (std::abs(static_cast<double>(single)) > std::abs(value)) --bits;  // towards zero
    single = float_from_bits(bits | 1u);
  }
  return float_to_half(single);
}

uint16_t scale_of(double value) {
  const uint16_t scale = half_of(value);
  check((scale & 0x7fffu) < 0x7c00u, "a row needs the scale {:g}, above the largest half-precision number 65504",
        value);
  return scale;
}

}  // namespace

uint16_t quantize_channel(std::span<const float> row, int bits, Int2Scale int2, int8_t* codes) {
  check_bits(bits);
  double largest = 0.0, sum = 0.0;
  for (const float w : row) {
    check(std::isfinite(w), "a row holds {}, which cannot be quantized", w);
    const double magnitude = std::abs(static_cast<double>(w));
    largest = std::max(largest, magnitude);
    sum += magnitude;
  }
  const auto limit = static_cast<double>(channel_code_limit(bits));
  const auto encode = [&](double scale) {
    for (size_t i = 0; i < row.size(); ++i)
      codes[i] = static_cast<int8_t>(std::clamp(std::nearbyint(static_cast<double>(row[i]) / scale), -limit, limit));
  };
  uint16_t scale = 0;
  if (bits == 2 && int2 == Int2Scale::fit) {
    if (sum > 0.0) {
      encode(sum / static_cast<double>(row.size()));
      double product = 0.0, squares = 0.0;
      for (size_t i = 0; i < row.size(); ++i) {
        product += static_cast<double>(row[i]) * codes[i];
        squares += codes[i] * codes[i];
      }
      scale = scale_of(product / squares);  // the largest value is at least the mean: its code is not 0
    }
  } else {
    scale = scale_of(largest / limit);
    if (scale != 0) encode(half_to_float(scale));
  }
  if (scale == 0) std::fill_n(codes, row.size(), int8_t{0});
  return scale;
}

void pack_channel(std::span<const int8_t> codes, int bits, std::byte* out) {
  check_bits(bits);
  const int offset = 1 << (bits - 1), each = 8 / bits;
  const auto columns = static_cast<int64_t>(codes.size());
  for (int64_t byte = 0; byte < channel_row_bytes(columns, bits); ++byte) {
    unsigned value = 0;
    for (int j = 0; j < each; ++j) {
      const int64_t i = byte * each + j;
      const int code = (i < columns ? codes[static_cast<size_t>(i)] : 0) + offset;
      value |= static_cast<unsigned>(code) << (j * bits);
    }
    out[byte] = static_cast<std::byte>(value);
  }
}

void unpack_channel(const std::byte* packed, int bits, std::span<int8_t> codes) {
  check_bits(bits);
  const int offset = 1 << (bits - 1), each = 8 / bits;
  const unsigned mask = (1u << bits) - 1u;
  for (size_t i = 0; i < codes.size(); ++i) {
    const auto byte = std::to_integer<unsigned>(packed[i / static_cast<size_t>(each)]);
    codes[i] = static_cast<int8_t>(
        static_cast<int>(byte >> (static_cast<int>(i % static_cast<size_t>(each)) * bits) & mask) - offset);
  }
}

void dequantize_channel(const std::byte* packed, uint16_t scale, int bits, std::span<float> row) {
  check_bits(bits);
  const float s = half_to_float(scale);
  const int offset = 1 << (bits - 1), each = 8 / bits;
  const unsigned mask = (1u << bits) - 1u;
  // The values of all codes first: at most 256, and one look-up a weight.
  std::array<float, 256> value;
  for (int code = 0; code < 1 << bits; ++code) value[static_cast<size_t>(code)] = static_cast<float>(code - offset) * s;
  const size_t whole = row.size() / static_cast<size_t>(each);
  float* to = row.data();
  for (size_t byte = 0; byte < whole; ++byte) {
    const auto b = std::to_integer<unsigned>(packed[byte]);
    for (int j = 0; j < each; ++j) *to++ = value[b >> (j * bits) & mask];
  }
  for (size_t i = whole * static_cast<size_t>(each); i < row.size(); ++i)
    row[i] =
        value[std::to_integer<unsigned>(packed[whole]) >> (static_cast<int>(i % static_cast<size_t>(each)) * bits) &
              mask];
}

}  // namespace moiety
