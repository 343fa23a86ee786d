#include "moiety/kernels/format.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/each_isa.h"
#include "message_of.h"
#include "moiety/base/error.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

using Bytes = std::vector<uint8_t>;

std::byte* raw(Bytes& b) {
  return reinterpret_cast<std::byte*>(b.data());
}
const std::byte* raw(const Bytes& b) {
  return reinterpret_cast<const std::byte*>(b.data());
}

Bytes quantize(Format format, const std::vector<float>& x, const float* importance = nullptr) {
  Bytes blocks(static_cast<size_t>(row_bytes(format, static_cast<int64_t>(x.size()))));
  quantize_row(format, x.data(), raw(blocks), static_cast<int64_t>(x.size()), importance);
  return blocks;
}

std::vector<float> dequantize(Format format, const Bytes& blocks) {
  const FormatInfo& f = info(format);
  std::vector<float> x(blocks.size() / static_cast<size_t>(f.bytes) * static_cast<size_t>(f.block));
  dequantize_row(format, raw(blocks), x.data(), static_cast<int64_t>(x.size()));
  return x;
}

double mean_square_error(const std::vector<float>& a, const std::vector<float>& b, const float* weights = nullptr) {
  double sum = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double w = weights != nullptr ? weights[i] : 1.0;
    sum += w * (a[i] - b[i]) * (a[i] - b[i]);
    norm += w;
  }
  return sum / norm;
}

using FormatTest = EachIsa;

TEST(Half, EveryHalfSurvivesTheRoundTrip) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float x = half_to_float(static_cast<uint16_t>(h));
    if (std::isnan(x)) {
      EXPECT_TRUE((h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0) << h;
      EXPECT_TRUE(std::isnan(half_to_float(float_to_half(x))));
    } else {
      EXPECT_EQ(float_to_half(x), h);
    }
  }
}

TEST(Half, ValuesOfKnownHalves) {
  EXPECT_EQ(half_to_float(0x3c00), 1.f);
  EXPECT_EQ(half_to_float(0xc000), -2.f);
  EXPECT_EQ(half_to_float(0x7bff), 65504.f);
  EXPECT_EQ(half_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(half_to_float(0x03ff), 1023 * 0x1p-24f);
  EXPECT_EQ(half_to_float(0x0400), 0x1p-14f);
  EXPECT_EQ(half_to_float(0xfc00), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::signbit(half_to_float(0x8000)));
}

TEST(Half, RoundsToNearestEven) {
  EXPECT_EQ(float_to_half(1.f + 0x1p-11f), 0x3c00);      // tie: to even
  EXPECT_EQ(float_to_half(1.f + 3 * 0x1p-11f), 0x3c02);  // tie: to even
  EXPECT_EQ(float_to_half(1.f + 0x1.1p-11f), 0x3c01);
  EXPECT_EQ(float_to_half(65519.f), 0x7bff);
  EXPECT_EQ(float_to_half(65520.f), 0x7c00);
  EXPECT_EQ(float_to_half(0x1p-25f), 0x0000);    // tie with 0
  EXPECT_EQ(float_to_half(0x1.8p-24f), 0x0002);  // tie between 1 and 2
  EXPECT_EQ(float_to_half(-0x1.1p-25f), 0x8001);
  EXPECT_EQ(float_to_half(1e30f), 0x7c00);
}

RC_GTEST_PROP(Half, RoundingPicksTheNearestNeighbour, (uint32_t bits)) {
  const float x = float_from_bits(bits);
  RC_PRE(std::fabs(x) < 65504.f);
  const uint16_t h = float_to_half(x);
  const double error = std::fabs(static_cast<double>(half_to_float(h)) - x);
  if ((h & 0x7fff) != 0) RC_ASSERT(error <= std::fabs(static_cast<double>(half_to_float(h - 1)) - x));
  RC_ASSERT(error <= std::fabs(static_cast<double>(half_to_float(h + 1)) - x));
}

TEST(Bf16, RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(float_to_bf16(1.f), 0x3f80);
  EXPECT_EQ(float_to_bf16(float_from_bits(0x3f808000)), 0x3f80);  // tie
  EXPECT_EQ(float_to_bf16(float_from_bits(0x3f818000)), 0x3f82);  // tie
  EXPECT_EQ(float_to_bf16(float_from_bits(0x3f808001)), 0x3f81);
  EXPECT_EQ(float_to_bf16(float_from_bits(0x7f800001)), 0x7fc0);  // a NaN whose upper half would be infinity
  EXPECT_EQ(float_to_bf16(-std::numeric_limits<float>::infinity()), 0xff80);
}

TEST(FormatTable, NamesAndSizes) {
  EXPECT_EQ(find_format("q4_k"), &info(Format::Q4_K));
  EXPECT_EQ(find_format("Q4_K"), &info(Format::Q4_K));
  EXPECT_EQ(find_format("bf16")->gguf_id, 30);
  EXPECT_EQ(find_format("Q4_KX"), nullptr);
  EXPECT_EQ(find_format(""), nullptr);
  EXPECT_EQ(row_bytes(Format::Q6_K, 512), 420);
  EXPECT_EQ(row_bytes(Format::F32, 3), 12);
  EXPECT_NE(message_of([] { row_bytes(Format::Q4_K, 576); }).find("256"), std::string::npos);
  EXPECT_THROW(row_bytes(Format::F64, std::numeric_limits<int64_t>::max()), Error);
  EXPECT_THROW(row_bytes(Format::F64, -8), Error);
}

// ---- plain formats --------------------------------------------------------------------------------------------------

template <class T>
void expect_numbers(Format format, const std::vector<T>& values) {
  std::vector<float> out(values.size());
  dequantize_row(format, reinterpret_cast<const std::byte*>(values.data()), out.data(),
                 static_cast<int64_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(out[i], static_cast<float>(values[i])) << info(format).name << i;
}

TEST_F(FormatTest, NumbersBecomeFloats) {
  for_each_isa([] {
    expect_numbers<float>(Format::F32, {1.5f, -2.f, 1e38f});
    expect_numbers<double>(Format::F64, {1.5, -2e100, 1e-300, 0.1});
    expect_numbers<int8_t>(Format::I8, {-128, -1, 0, 127});
    expect_numbers<uint8_t>(Format::U8, {0, 128, 255});
    expect_numbers<int16_t>(Format::I16, {-32768, 32767, -1});
    expect_numbers<uint16_t>(Format::U16, {65535, 1});
    expect_numbers<int32_t>(Format::I32, {-2147483647 - 1, 2147483647, 16777217});
    expect_numbers<uint32_t>(Format::U32, {4294967295u, 1});
    expect_numbers<int64_t>(Format::I64, {std::numeric_limits<int64_t>::min(), 1ll << 62, -3});
    expect_numbers<uint64_t>(Format::U64, {std::numeric_limits<uint64_t>::max(), 7});
    EXPECT_EQ(dequantize(Format::BOOL, {0, 1, 1}), (std::vector<float>{0, 1, 1}));
  });
}

TEST_F(FormatTest, HalvesAndBfloatsOfEveryLength) {
  for_each_isa([] {
    for (size_t n = 0; n < 40; ++n) {
      std::vector<uint16_t> h(n);
      for (size_t i = 0; i < n; ++i) h[i] = static_cast<uint16_t>(i * 1031 + 17);
      std::vector<float> out(n);
      dequantize_row(Format::F16, reinterpret_cast<const std::byte*>(h.data()), out.data(), static_cast<int64_t>(n));
      for (size_t i = 0; i < n; ++i) EXPECT_TRUE(out[i] == half_to_float(h[i]) || (h[i] & 0x7fff) > 0x7c00) << i;
      dequantize_row(Format::BF16, reinterpret_cast<const std::byte*>(h.data()), out.data(), static_cast<int64_t>(n));
      for (size_t i = 0; i < n; ++i) EXPECT_EQ(bits_of(out[i]), static_cast<uint32_t>(h[i]) << 16);
    }
  });
}

TEST_F(FormatTest, EightBitFloats) {
  for_each_isa([] {
    const auto a = dequantize(Format::F8_E4M3, {0x00, 0x01, 0x07, 0x08, 0x38, 0x7e, 0xfe, 0xb8, 0x80, 0x7f, 0xff});
    EXPECT_EQ(a[0], 0.f);
    EXPECT_EQ(a[1], 0x1p-9f);
    EXPECT_EQ(a[2], 7 * 0x1p-9f);
    EXPECT_EQ(a[3], 0x1p-6f);
    EXPECT_EQ(a[4], 1.f);
    EXPECT_EQ(a[5], 448.f);
    EXPECT_EQ(a[6], -448.f);
    EXPECT_EQ(a[7], -1.f);
    EXPECT_TRUE(std::signbit(a[8]));
    EXPECT_TRUE(std::isnan(a[9]) && std::isnan(a[10]));
    const auto b = dequantize(Format::F8_E5M2, {0x3c, 0x7b, 0x7c, 0x01, 0xbc});
    EXPECT_EQ(b[0], 1.f);
    EXPECT_EQ(b[1], 57344.f);
    EXPECT_TRUE(std::isinf(b[2]));
    EXPECT_EQ(b[3], 0x1p-16f);
    EXPECT_EQ(b[4], -1.f);
  });
}

TEST(Quantize, PlainFormats) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(dequantize(Format::F16, quantize(Format::F16, {1.f, 65504.f, inf})),
            (std::vector<float>{1.f, 65504.f, inf}));
  EXPECT_EQ(dequantize(Format::BF16, quantize(Format::BF16, {1.f, -3e38f})),
            (std::vector<float>{1.f, float_from_bits(0xff62u << 16)}));
  EXPECT_EQ(dequantize(Format::F32, quantize(Format::F32, {0.1f})), (std::vector<float>{0.1f}));
  EXPECT_NE(message_of([] { quantize(Format::F16, {0.f, 70000.f}); }).find("element 1"), std::string::npos);
  EXPECT_THROW(quantize(Format::I8, {1.f}), Error);
}

// ---- block formats --------------------------------------------------------------------------------------------------

const Format kBlockFormats[] = {Format::Q8_0, Format::Q4_0, Format::Q4_1,  Format::Q5_0,  Format::Q5_1, Format::Q4_K,
                                Format::Q5_K, Format::Q6_K, Format::TQ1_0, Format::TQ2_0, Format::MXFP4};

// Decodes one element straight from the format's description.
float element(Format format, const uint8_t* p, int i) {
  const auto half = [p](int at) { return half_to_float(static_cast<uint16_t>(p[at] | p[at + 1] << 8)); };
  const auto nibble = [&](int at) { return i < 16 ? p[at + i] & 15 : p[at + i - 16] >> 4; };
  const auto high = [&](int at) { return p[at + i / 8] >> (i % 8) & 1; };
  volatile float product = 0;  // keeps the compiler from fusing
  switch (format) {
    case Format::Q8_0:
      return half(0) * static_cast<float>(static_cast<int8_t>(p[2 + i]));
    case Format::Q4_0:
      return half(0) * static_cast<float>(nibble(2) - 8);
    case Format::Q4_1:
      product = half(0) * static_cast<float>(nibble(4));
      return product + half(2);
    case Format::Q5_0:
      return half(0) * static_cast<float>((nibble(6) | high(2) << 4) - 16);
    case Format::Q5_1:
      product = half(0) * static_cast<float>(nibble(8) | high(4) << 4);
      return product + half(2);
    case Format::MXFP4: {
      const float table[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
      return static_cast<float>(std::ldexp(static_cast<double>(table[nibble(1)]), p[0] - 127));
    }
    case Format::Q4_K:
    case Format::Q5_K: {
      const int g = i / 32, l = i % 32;
      const uint8_t* s = p + 4;
      const int sc = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
      const int mn = g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6) << 4;
      const int byte = p[(format == Format::Q4_K ? 16 : 48) + 32 * (g / 2) + l];
      int q = g % 2 == 0 ? byte & 15 : byte >> 4;
      if (format == Format::Q5_K) q += 16 * (p[16 + l] >> g & 1);
      product = half(0) * static_cast<float>(sc);
      product = product * static_cast<float>(q);
      volatile float min = half(2) * static_cast<float>(mn);
      return product - min;
    }
    case Format::Q6_K: {
      const int n = i / 128, part = i % 128 / 32, l = i % 32;
      const uint8_t *L = p + 64 * n, *H = p + 128 + 32 * n;
      const int low = part == 0 ? L[l] & 15 : part == 1 ? L[l + 32] & 15 : part == 2 ? L[l] >> 4 : L[l + 32] >> 4;
      product = half(208) * static_cast<float>(static_cast<int8_t>(p[192 + i / 16]));
      return product * static_cast<float>((low | (H[l] >> (2 * part) & 3) << 4) - 32);
    }
    case Format::TQ2_0:
      return half(64) * static_cast<float>((p[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3) - 1);
    default: {
      const int at = i < 160 ? i % 32 : i < 240 ? 32 + i % 16 : 48 + i % 4;
      const int digit = i < 160 ? i / 32 : i < 240 ? (i - 160) / 16 : (i - 240) / 4;
      const int power[] = {1, 3, 9, 27, 81};
      return half(52) * static_cast<float>(((p[at] * power[digit] % 256) * 3 >> 8) - 1);
    }
  }
}

// Random bytes with finite scales.
Bytes random_blocks(Format format, int blocks, unsigned seed) {
  const FormatInfo& f = info(format);
  std::mt19937 random(seed);
  Bytes b(static_cast<size_t>(blocks * f.bytes));
  for (uint8_t& v : b) v = static_cast<uint8_t>(random());
  const auto finite_half = [&](uint8_t* p) {
    const uint16_t h = float_to_half(static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 777.f);
    std::memcpy(p, &h, 2);
  };
  for (int k = 0; k < blocks; ++k) {
    uint8_t* p = b.data() + k * f.bytes;
    switch (format) {
      case Format::Q6_K:
        finite_half(p + 208);
        break;
      case Format::TQ1_0:
        finite_half(p + 52);
        break;
      case Format::TQ2_0:
        finite_half(p + 64);
        break;
      case Format::MXFP4:
        p[0] = static_cast<uint8_t>(100 + random() % 50);
        break;
      case Format::Q4_1:
      case Format::Q5_1:
      case Format::Q4_K:
      case Format::Q5_K:
        finite_half(p + 2);
        [[fallthrough]];
      default:
        finite_half(p);
    }
  }
  return b;
}

TEST_F(FormatTest, EveryPathDecodesAsTheDescriptionSays) {
  for_each_isa([] {
    for (Format format : kBlockFormats) {
      const FormatInfo& f = info(format);
      for (int blocks : {1, 2, 5}) {
        const Bytes b = random_blocks(format, blocks, 7u * static_cast<unsigned>(blocks));
        const auto x = dequantize(format, b);
        for (int i = 0; i < blocks * f.block; ++i)
          ASSERT_EQ(bits_of(x[static_cast<size_t>(i)]),
                    bits_of(element(format, b.data() + i / f.block * f.bytes, i % f.block)))
              << f.name << " element " << i;
      }
    }
  });
}

// An empty row has no memory: no path may touch or copy it.
TEST_F(FormatTest, EmptyRows) {
  for_each_isa([] {
    for (const FormatInfo& f : formats()) {
      EXPECT_EQ(row_bytes(f.format, 0), 0) << f.name;
      EXPECT_NO_THROW(dequantize_row(f.format, nullptr, nullptr, 0)) << f.name;
    }
  });
  for (const FormatInfo& f : formats()) {
    const bool encodes = message_of([&] { quantize(f.format, std::vector<float>(256, 1.f)); }).empty();
    EXPECT_EQ(message_of([&] { quantize_row(f.format, nullptr, nullptr, 0); }).empty(), encodes) << f.name;
  }
}

TEST_F(FormatTest, SubnormalHalfScales) {
  for_each_isa([] {
    for (int h : {0x0001, 0x8001, 0x03ff, 0x0400}) {
      Bytes b(34, 0);
      b[0] = static_cast<uint8_t>(h);
      b[1] = static_cast<uint8_t>(h >> 8);
      b[2] = 3;
      EXPECT_EQ(dequantize(Format::Q8_0, b)[0], 3 * half_to_float(static_cast<uint16_t>(h)));
    }
  });
}

TEST_F(FormatTest, ScaleExponentsOfMxfp4) {
  for_each_isa([] {
    for (int e = 0; e < 255; ++e) {
      Bytes b(17, 0x21);  // magnitudes .5 and 1
      b[0] = static_cast<uint8_t>(e);
      const auto x = dequantize(Format::MXFP4, b);
      EXPECT_EQ(x[0], static_cast<float>(std::ldexp(0.5, e - 127))) << e;
      EXPECT_EQ(x[16], static_cast<float>(std::ldexp(1.0, e - 127))) << e;
    }
    Bytes bad(34, 0);
    bad[17] = 255;
    EXPECT_NE(message_of([&] { dequantize(Format::MXFP4, bad); }).find("block 1"), std::string::npos);
  });
}

TEST(Quantize, TernaryBlocksOfTheSpecification) {
  std::vector<float> x(256);
  for (int i = 0; i < 256; ++i) x[static_cast<size_t>(i)] = 0.5f * static_cast<float>(i % 3 - 1);
  Bytes one(54), two(66);
  const int tq1[3] = {69, 108, 207}, tq1b[3] = {148, 187, 49}, tail[4] = {48, 146, 187, 48}, tq2[3] = {24, 97, 134};
  for (size_t i = 0; i < 32; ++i) one[i] = static_cast<uint8_t>(tq1[i % 3]);
  for (size_t i = 0; i < 16; ++i) one[32 + i] = static_cast<uint8_t>(tq1b[i % 3]);
  for (size_t i = 0; i < 4; ++i) one[48 + i] = static_cast<uint8_t>(tail[i]);
  one[53] = 56;
  for (size_t i = 0; i < 64; ++i) two[i] = static_cast<uint8_t>(tq2[i % 3]);
  two[65] = 56;
  EXPECT_EQ(quantize(Format::TQ1_0, x), one);
  EXPECT_EQ(quantize(Format::TQ2_0, x), two);
  EXPECT_EQ(dequantize(Format::TQ1_0, one), x);
  EXPECT_EQ(dequantize(Format::TQ2_0, two), x);
}

TEST(Quantize, Mxfp4BlockOfTheSpecification) {
  std::vector<float> x(32);
  for (int i = 0; i < 32; ++i) x[static_cast<size_t>(i)] = static_cast<float>(i - 16);
  const Bytes expected = {129, 14, 14, 29, 29, 45, 45, 60, 60, 76, 75, 75, 90, 90, 89, 89, 96};
  EXPECT_EQ(quantize(Format::MXFP4, x), expected);
  const std::vector<float> back = {-16, -16, -12, -12, -12, -12, -8, -8, -8, -6, -6, -4, -4, -2, -2, 0,
                                   0,   0,   2,   2,   4,   4,   6,  6,  8,  8,  8,  12, 12, 12, 12, 16};
  EXPECT_EQ(dequantize(Format::MXFP4, expected), back);
}

TEST(Quantize, Mxfp4TiesAndLimits) {
  std::vector<float> x(32, 0.f);
  x[0] = 4.f;     // e = 127: scale 1
  x[1] = 0.25f;   // tie of 0 and .5
  x[2] = -0.25f;  // never -0
  x[3] = 2.5f;    // tie of 2 and 3
  x[4] = 5.f;     // tie of 4 and 6
  x[5] = -5.5f;
  x[6] = 7.9f;  // saturates
  const auto y = dequantize(Format::MXFP4, quantize(Format::MXFP4, x));
  EXPECT_EQ((std::vector<float>{y.begin(), y.begin() + 7}), (std::vector<float>{4, 0, 0, 2, 4, -6, 6}));
  EXPECT_FALSE(std::signbit(y[2]));
  const Bytes zero = quantize(Format::MXFP4, std::vector<float>(32, -0.f));
  EXPECT_EQ(zero, Bytes(17, 0));
  const auto tiny = quantize(Format::MXFP4, std::vector<float>(32, 0x1p-149f));
  EXPECT_EQ(tiny[0], 0);
  const auto huge = dequantize(Format::MXFP4, quantize(Format::MXFP4, std::vector<float>(32, 0x1p127f)));
  EXPECT_EQ(huge[0], 0x1p127f);
}

TEST(Quantize, ZeroBlocks) {
  for (float zero : {0.f, -0.f}) {
    const std::vector<float> x(256, zero);
    for (Format format : kBlockFormats) {
      const auto y = dequantize(format, quantize(format, x));
      for (float v : y) ASSERT_EQ(v, 0.f) << info(format).name;
    }
    const Bytes q4 = quantize(Format::Q4_0, std::vector<float>(32, zero));
    EXPECT_EQ(q4[0], 0x00);
    EXPECT_EQ(q4[1], 0x80);
    EXPECT_EQ(q4[2], 0x88);
    const Bytes q5 = quantize(Format::Q5_0, std::vector<float>(32, zero));
    EXPECT_EQ(q5[1], 0x80);
    EXPECT_EQ(q5[2] & q5[3] & q5[4] & q5[5], 0xff);
    EXPECT_EQ(q5[6], 0x00);
    EXPECT_EQ(quantize(Format::Q8_0, std::vector<float>(32, zero)), Bytes(34, 0));
  }
  EXPECT_EQ(quantize(Format::TQ2_0, std::vector<float>(256, 0.f))[0], 0x55);
}

TEST(Quantize, SignedExtremeOfCentredFormats) {
  std::vector<float> x(32, 0.25f);
  x[3] = 8.f;
  x[9] = -8.f;  // same magnitude, later: does not count
  const Bytes b = quantize(Format::Q4_0, x);
  EXPECT_EQ(half_to_float(static_cast<uint16_t>(b[0] | b[1] << 8)), -1.f);
  EXPECT_EQ(b[2 + 3] & 15, 0);
  EXPECT_EQ(b[2 + 9] & 15, 15);
}

TEST(Quantize, RoundsHalvesAwayFromZero) {
  std::vector<float> x(32, 0.f);
  x[0] = 127.f;
  x[1] = 0.5f;
  x[2] = -2.5f;
  x[3] = 0.49999997f;
  const Bytes b = quantize(Format::Q8_0, x);
  EXPECT_EQ(static_cast<int8_t>(b[2 + 1]), 1);
  EXPECT_EQ(static_cast<int8_t>(b[2 + 2]), -3);
  EXPECT_EQ(static_cast<int8_t>(b[2 + 3]), 0);
}

TEST(Quantize, TinyValuesDoNotBreak) {
  for (float tiny : {1e-45f, 1e-40f, 1e-38f, 1e-30f, 1e-7f})
    for (Format format : kBlockFormats) {
      std::vector<float> x(256, -tiny);
      x[7] = tiny;
      const auto y = dequantize(format, quantize(format, x));
      for (float v : y) ASSERT_LE(std::fabs(v), 1.34f * tiny) << info(format).name << ' ' << tiny;
    }
}

TEST(Quantize, RefusesWhatAFormatCannotHold) {
  for (Format format : kBlockFormats) {
    for (float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> x(512, 1.f);
      x[300] = bad;
      EXPECT_NE(message_of([&] { quantize(format, x); }).find("element 300"), std::string::npos) << info(format).name;
    }
    if (format == Format::MXFP4) continue;  // its scale reaches all of float32
    std::vector<float> x(512, 1.f);
    x[300] = 3e38f;
    const std::string message = message_of([&] { quantize(format, x); });
    EXPECT_NE(message.find("element 300"), std::string::npos) << info(format).name << ": " << message;
    EXPECT_NE(message.find("half"), std::string::npos) << message;
    x[299] = -3e38f;  // max - min is infinite
    EXPECT_THROW(quantize(format, x), Error) << info(format).name;
  }
}

// Largest error of one block by the format's step, for formats that round every element to the nearest level.
RC_GTEST_PROP(Quantize, ErrorsStayBelowHalfAStep, ()) {
  std::vector<float> x(64);
  const float scale = std::exp2(static_cast<float>(*rc::gen::inRange(-10, 10)));
  for (float& v : x) v = scale * static_cast<float>(*rc::gen::inRange(-100000, 100001)) / 100000.f;
  for (auto [format, levels] : {std::pair{Format::Q8_0, 127.},
                                {Format::Q4_0, 8.},
                                {Format::Q5_0, 16.},
                                {Format::Q4_1, 7.5},
                                {Format::Q5_1, 15.5}}) {
    const auto y = dequantize(format, quantize(format, x));
    for (size_t b = 0; b < 64; b += 32) {
      double largest = 0;
      for (size_t i = b; i < b + 32; ++i) largest = std::max(largest, std::fabs(static_cast<double>(x[i])));
      // Centred formats cannot reach the value opposite to the extreme: a whole step there. Half precision of scales
      // adds 2^-11.
      const bool centred = format == Format::Q4_0 || format == Format::Q5_0;
      const double step = largest / levels * (1 + 1e-3);
      for (size_t i = b; i < b + 32; ++i) {
        const double bound = (centred ? 1.0 : 0.5) * step + largest * 0x1p-10 + (2 * levels + 1) * 0x1p-25;
        RC_ASSERT(std::fabs(static_cast<double>(x[i]) - y[i]) <= bound);
      }
    }
  }
}

RC_GTEST_PROP(Quantize, TernaryRowsAreExact, ()) {
  std::vector<float> x(512);
  const float g = half_to_float(static_cast<uint16_t>(*rc::gen::inRange(1, 0x7c00)));
  for (float& v : x) v = g * static_cast<float>(*rc::gen::inRange(-1, 2));
  RC_ASSERT(dequantize(Format::TQ1_0, quantize(Format::TQ1_0, x)) == x);
  RC_ASSERT(dequantize(Format::TQ2_0, quantize(Format::TQ2_0, x)) == x);
}

// Rows of decoded blocks come back: re-quantizing what a format can express exactly is close to exact.
TEST(Quantize, KFormatsReachTheirError) {
  const auto x = gaussian(256 * 64, 3, 0.02f);
  double square = 0;
  for (float v : x) square += static_cast<double>(v) * v;
  const double variance = square / static_cast<double>(x.size());
  // Signal to noise of Gaussian data; a missing search, sign or scale costs several dB.
  const auto decibel = [&](Format f) {
    return 10 * std::log10(variance / mean_square_error(x, dequantize(f, quantize(f, x))));
  };
  EXPECT_GT(decibel(Format::Q4_K), 21.5);
  EXPECT_GT(decibel(Format::Q5_K), 27.5);
  EXPECT_GT(decibel(Format::Q6_K), 33.5);
  EXPECT_GT(decibel(Format::Q4_K), decibel(Format::Q4_0) + 1);
  EXPECT_GT(decibel(Format::Q5_K), decibel(Format::Q5_0) + 1);
}

TEST(Quantize, ImportanceMovesTheErrorAway) {
  const auto x = gaussian(256 * 16, 5);
  std::vector<float> importance(x.size());
  for (size_t i = 0; i < x.size(); ++i) importance[i] = i % 4 == 0 ? 100.f : 1.f;
  for (Format format : {Format::Q4_K, Format::Q5_K, Format::Q6_K}) {
    const double with =
        mean_square_error(x, dequantize(format, quantize(format, x, importance.data())), importance.data());
    const double without = mean_square_error(x, dequantize(format, quantize(format, x)), importance.data());
    EXPECT_LT(with, without) << info(format).name;
    const std::vector<float> zeros(x.size(), 0.f);  // of no use as weights: falls back
    EXPECT_NEAR(mean_square_error(x, dequantize(format, quantize(format, x, zeros.data()))),
                mean_square_error(x, dequantize(format, quantize(format, x))), 1e-9);
  }
}

TEST(Quantize, KFormatsOfOffsetAndConstantRows) {
  for (Format format : {Format::Q4_K, Format::Q5_K, Format::Q6_K})
    for (float offset : {-5.f, 3.f, 1000.f}) {
      std::vector<float> x(256, offset);
      for (float v : dequantize(format, quantize(format, x)))
        ASSERT_NEAR(v, offset, std::fabs(offset) * 0.02f) << info(format).name;
    }
}

}  // namespace
}  // namespace moiety
