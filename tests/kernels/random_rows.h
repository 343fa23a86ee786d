#pragma once
// Block-quantized rows for tests of products.
#include <cstring>
#include <random>
#include <vector>

#include "moiety/kernels/format.h"
#include "moiety/kernels/half.h"

namespace moiety {

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
  for (size_t at = 0; at < b.size(); at += static_cast<size_t>(f.bytes)) {
    std::byte* p = b.data() + at;
    switch (format) {
      case Format::Q6_K:
        put_half(p + 208);
        break;
      case Format::TQ1_0:
        put_half(p + 52);
        break;
      case Format::TQ2_0:
        put_half(p + 64);
        break;
      case Format::MXFP4:
        p[0] = static_cast<std::byte>(120 + random() % 8);
        break;
      case Format::Q4_1:
      case Format::Q5_1:
      case Format::Q4_K:
      case Format::Q5_K:
        put_half(p + 2);
        [[fallthrough]];
      default:
        put_half(p);
    }
  }
  return b;
}

}  // namespace moiety
