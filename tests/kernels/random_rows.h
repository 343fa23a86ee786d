#pragma once
// Block-quantized rows for tests of products.
#include <cstring>
#include <random>
#include <vector>

#include "moiety/kernels/format.h"
#include "moiety/kernels/half.h"

namespace moiety {

// Where a block's scale, and the minimum behind it, stand.
struct ScaleBytes {
  int at, count;
};
inline ScaleBytes scale_bytes(Format format) {
  switch (format) {
    case Format::Q6_K:
      return {208, 2};
    case Format::TQ1_0:
      return {52, 2};
    case Format::TQ2_0:
      return {64, 2};
    case Format::MXFP4:
      return {0, 1};
    case Format::Q4_1:
    case Format::Q5_1:
    case Format::Q4_K:
    case Format::Q5_K:
      return {0, 4};
    default:
      return {0, 2};
  }
}

// Any bit pattern of the quants, scales that are finite.
inline std::vector<std::byte> random_rows(Format format, int64_t rows, int64_t cols, unsigned seed) {
  const FormatInfo& f = info(format);
  std::mt19937 random(seed);
  std::vector<std::byte> b(static_cast<size_t>(rows * row_bytes(format, cols)));
  for (std::byte& v : b) v = static_cast<std::byte>(random());
  const auto put_half = [&](std::byte* p) {
    const uint16_t h = float_to_half(static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 777.f);
    std::memcpy(p, &h, 2);
  };
  const ScaleBytes scale = scale_bytes(format);
  for (size_t at = 0; at < b.size(); at += static_cast<size_t>(f.bytes)) {
    std::byte* p = b.data() + at + scale.at;
    if (scale.count == 1) *p = static_cast<std::byte>(120 + random() % 8);
    for (int i = scale.count; i >= 2; i -= 2) put_half(p + i - 2);
  }
  return b;
}

}  // namespace moiety
