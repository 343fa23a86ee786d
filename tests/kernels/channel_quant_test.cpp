#include "moiety/kernels/channel_quant.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "message_of.h"
#include "moiety/base/random.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

struct Row {
  std::vector<float> w;
  std::vector<int8_t> q;
  float scale = 0.0f;
  std::vector<float> back;
};

Row quantized(std::vector<float> w, int bits, Int2Scale int2 = Int2Scale::max) {
  Row r{std::move(w), {}, 0.0f, {}};
  r.q.resize(r.w.size());
  const uint16_t s = quantize_channel(r.w, bits, int2, r.q.data());
  r.scale = half_to_float(s);
  std::vector<std::byte> packed(static_cast<size_t>(channel_row_bytes(static_cast<int64_t>(r.w.size()), bits)));
  pack_channel(r.q, bits, packed.data());
  std::vector<int8_t> again(r.q.size());
  unpack_channel(packed.data(), bits, again);
  EXPECT_EQ(r.q, again);
  r.back.resize(r.w.size());
  dequantize_channel(packed.data(), s, bits, r.back);
  return r;
}

std::vector<float> normal_row(size_t n, uint64_t seed, double scale = 1.0) {
  RandomStream random(seed, "row");
  std::vector<float> w(n);
  for (float& x : w) x = static_cast<float>(scale * random.normal());
  return w;
}

RC_GTEST_PROP(ChannelQuant, KeepsEveryWeightWithinHalfAStep, ()) {
  const int bits = *rc::gen::element(2, 4, 8);
  const auto n = *rc::gen::inRange<size_t>(1, 67);
  const double size = std::pow(2.0, *rc::gen::inRange(-9, 9));
  const Row r = quantized(normal_row(n, *rc::gen::arbitrary<uint64_t>(), size), bits);
  const auto limit = channel_code_limit(bits);
  for (size_t i = 0; i < n; ++i) {
    RC_ASSERT(std::abs(r.q[i]) <= limit);
    RC_ASSERT(r.back[i] == static_cast<float>(r.q[i]) * r.scale);
    // The scale was rounded to 11 bits, or where it is small to a step of 2^-24: the largest code moves by as much.
    const double scale = r.scale, moved = std::max(scale / 2048.0, std::ldexp(1.0, -25));
    RC_ASSERT(std::abs(r.back[i] - r.w[i]) <= scale * (0.5 + 1e-6) + static_cast<double>(limit) * moved);
  }
}

RC_GTEST_PROP(ChannelQuant, OfItsOwnResultIsTheSame, ()) {
  const int bits = *rc::gen::element(2, 4, 8);
  const auto int2 = *rc::gen::element(Int2Scale::max, Int2Scale::fit);
  const Row first =
      quantized(normal_row(*rc::gen::inRange<size_t>(1, 67), *rc::gen::arbitrary<uint64_t>()), bits, int2);
  const Row second = quantized(first.back, bits, int2);
  RC_ASSERT(first.q == second.q);
}

TEST(ChannelQuant, RoundsWithTheScaleThatIsStored) {
  // 1 / 7 is no half: its nearest is 0.14282; 0.5 / 0.14282 = 3.5009 rounds up, 0.5 / (1/7) would be a tie to 4 as
  // well, but 0.4999 / 0.14282 = 3.50021 becomes 4 where 0.4999 * 7 = 3.4993 would become 3.
  const Row r = quantized({1.0f, 0.4999f}, 4);
  EXPECT_EQ(r.scale, half_to_float(float_to_half(1.0f / 7.0f)));
  EXPECT_LT(r.scale, 1.0f / 7.0f);
  EXPECT_EQ(r.q[1], 4);
}

TEST(ChannelQuant, RoundsHalvesToTheEvenCode) {
  const Row r = quantized({127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f}, 8);
  EXPECT_EQ(r.scale, 1.0f);
  EXPECT_EQ(r.q, (std::vector<int8_t>{127, 0, 2, 2, 0, -2}));
}

TEST(ChannelQuant, LeavesZeroRowsZero) {
  for (const auto int2 : {Int2Scale::max, Int2Scale::fit}) {
    const Row r = quantized(std::vector<float>(9, 0.0f), 2, int2);
    EXPECT_EQ(r.scale, 0.0f);
    EXPECT_EQ(r.back, r.w);
  }
}

TEST(ChannelQuant, ScalesBelowTheSmallestHalfGiveZeros) {
  const Row r = quantized({1e-9f, -1e-9f}, 8);
  EXPECT_EQ(r.scale, 0.0f);
  EXPECT_EQ(r.q, (std::vector<int8_t>{0, 0}));
}

TEST(ChannelQuant, RefusesScalesAboveTheLargestHalf) {
  std::vector<int8_t> q(1);
  const std::vector<float> w = {1e6f};
  EXPECT_NE(message_of([&] { quantize_channel(w, 2, Int2Scale::max, q.data()); }).find("65504"), std::string::npos);
  EXPECT_EQ(message_of([&] { quantize_channel(w, 8, Int2Scale::max, q.data()); }), "");
}

TEST(ChannelQuant, RefusesWhatIsNoNumberAndOtherWidths) {
  std::vector<int8_t> q(2);
  const std::vector<float> bad = {1.0f, std::numeric_limits<float>::quiet_NaN()}, good = {1.0f, 2.0f};
  EXPECT_NE(message_of([&] { quantize_channel(bad, 4, Int2Scale::max, q.data()); }), "");
  EXPECT_NE(message_of([&] { quantize_channel(good, 3, Int2Scale::max, q.data()); }).find("2, 4 or 8"),
            std::string::npos);
}

// What the paper's own code book costs: 0.72 of a Gaussian row's energy, where fitted scales lose 0.21 and 4 bits 0.02.
TEST(ChannelQuant, LosesTheEnergyThatIsExpected) {
  const auto lost = [](int bits, Int2Scale int2) {
    const Row r = quantized(normal_row(4096, 7), bits, int2);
    double error = 0, all = 0;
    for (size_t i = 0; i < r.w.size(); ++i) {
      error += std::pow(r.w[i] - r.back[i], 2);
      all += std::pow(r.w[i], 2);
    }
    return error / all;
  };
  EXPECT_GT(lost(2, Int2Scale::max), 0.6);
  EXPECT_NEAR(lost(2, Int2Scale::fit), 0.21, 0.03);
  EXPECT_LT(lost(4, Int2Scale::max), 0.04);
  EXPECT_LT(lost(8, Int2Scale::max), 2e-4);
}

TEST(ChannelQuant, PacksTheFirstCodeLowestAndFillsWithZeroCodes) {
  std::vector<std::byte> out(1);
  pack_channel(std::vector<int8_t>{1, -1, 0}, 2, out.data());
  EXPECT_EQ(std::to_integer<int>(out[0]), 0b10'10'01'11);  // codes + 2, the fourth is what fills
  pack_channel(std::vector<int8_t>{-7}, 4, out.data());
  EXPECT_EQ(std::to_integer<int>(out[0]), 0b1000'0001);
  pack_channel(std::vector<int8_t>{-127}, 8, out.data());
  EXPECT_EQ(std::to_integer<int>(out[0]), 1);
}

}  // namespace
}  // namespace moiety
