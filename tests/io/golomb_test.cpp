#include "moiety/io/golomb.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "message_of.h"
#include "moiety/base/random.h"

namespace moiety {
namespace {

TernaryMasks random_signs(int64_t d, double p, uint64_t seed) {
  RandomStream random(seed, "signs");
  std::vector<int8_t> out(static_cast<size_t>(d));
  for (auto& s : out) s = random.chance(p) ? (random.chance(0.5) ? 1 : -1) : 0;
  return ternary_masks(out);
}

std::string bits_of(const GolombCode& code) {
  std::string out;
  for (int64_t i = 0; i < code.bits; ++i)
    out += (static_cast<int>(code.bytes[static_cast<size_t>(i / 8)]) >> (7 - i % 8) & 1) != 0 ? '1' : '0';
  return out;
}

TEST(TernaryMasks, KeepEntriesFromTheLeastSignificantBitOn) {
  std::vector<int8_t> signs(70, 0);
  signs[0] = 1;
  signs[3] = -1;
  signs[64] = -1;
  signs[69] = 1;
  const auto m = ternary_masks(signs);
  EXPECT_EQ(m.positive, (std::vector<uint64_t>{1, 32}));
  EXPECT_EQ(m.negative, (std::vector<uint64_t>{8, 1}));
  EXPECT_EQ(m.kept(), 4);
  EXPECT_EQ(m.kept(64), 2);
  EXPECT_EQ(m.kept(65), 3);
  EXPECT_EQ(m.kept(0), 0);
  EXPECT_EQ(ternary_signs(m), signs);
}

TEST(TernaryMasks, OtherSignsAreErrors) {
  EXPECT_NE(message_of([] { ternary_masks(std::vector<int8_t>{0, 1, 2}); }).find("sign 2 is 2"), std::string::npos);
  EXPECT_THROW(TernaryMasks(-1), Error);
  EXPECT_THROW(TernaryMasks(3).kept(4), Error);
}

TEST(Golomb, WritesGapsAsTheyAreDefined) {
  // Gaps 0, 5, 2 with two low bits: 0 00 +, 1 0 01 -, 0 10 +.
  const auto m = ternary_masks(std::vector<int8_t>{1, 0, 0, 0, 0, 0, -1, 0, 0, 1, 0});
  const auto code = golomb_encode(m, 2);
  EXPECT_EQ(bits_of(code),
            "0000"
            "10011"
            "0100");
  EXPECT_EQ(code.bits, 13);
  EXPECT_EQ(code.bytes, (std::vector<std::byte>{std::byte{0b00001001}, std::byte{0b10100000}}));
  EXPECT_EQ(bits_of(golomb_encode(m, 2, false)),
            "000"
            "1001"
            "010");
  EXPECT_EQ(bits_of(golomb_encode(m, 0)),
            "00"
            "1111101"
            "1100");
}

TEST(Golomb, ChoosesTheLowBits) {
  EXPECT_EQ(golomb_low_bits(0, 1000), 0);
  EXPECT_EQ(golomb_low_bits(1000, 1000), 0);
  EXPECT_EQ(golomb_low_bits(0, 0), 0);
  // ln(phi - 1) / ln(1 - p): 9.38 for 0.05, 2.16 for 0.2, 0.694 for 0.5, 0.525 for 0.6.
  EXPECT_EQ(golomb_low_bits(50, 1000), 4);
  EXPECT_EQ(golomb_low_bits(200, 1000), 2);
  EXPECT_EQ(golomb_low_bits(500, 1000), 0);
  // Cut at 0 from p = 0.618 on: the ratio is 0.21 for 0.9.
  EXPECT_EQ(golomb_low_bits(900, 1000), 0);
  EXPECT_EQ(golomb_low_bits(1, int64_t{1} << 40), 39);
  EXPECT_THROW(golomb_low_bits(2, 1), Error);
}

TEST(Golomb, KnowsWhatShannonAsks) {
  EXPECT_NEAR(ternary_entropy_bits(50, 1000), 336.4 + 16.0, 0.1);
  EXPECT_EQ(ternary_entropy_bits(0, 1000), 16.0);
  EXPECT_EQ(ternary_entropy_bits(1000, 1000), 1016.0);
}

TEST(Golomb, TakesAboutAsManyBitsAsAreThere) {
  for (const double p : {0.02, 0.05, 0.1, 0.2, 0.35, 0.5}) {
    const auto m = random_signs(200000, p, 7);
    const int64_t kept = m.kept();
    const auto code = golomb_encode(m, golomb_low_bits(kept, m.d));
    EXPECT_LT(static_cast<double>(code.bits), 1.05 * ternary_entropy_bits(kept, m.d)) << p;
    EXPECT_NEAR(static_cast<double>(code.bits) / static_cast<double>(kept), golomb_expected_bits(kept, m.d), 0.1) << p;
  }
}

RC_GTEST_PROP(Golomb, ComesBackBitForBit, ()) {
  const auto d = *rc::gen::inRange<int64_t>(0, 700);
  const double p = *rc::gen::element(0.0, 0.003, 0.05, 0.3, 0.8, 1.0);
  const auto m = random_signs(d, p, *rc::gen::arbitrary<uint32_t>());
  const auto b = *rc::gen::element(int64_t{0}, int64_t{1}, int64_t{5}, int64_t{56}, golomb_low_bits(m.kept(), d));
  const auto code = golomb_encode(m, b);
  RC_ASSERT(static_cast<int64_t>(code.bytes.size()) == (code.bits + 7) / 8);
  RC_ASSERT(golomb_decode(code.bytes, d, m.kept(), b) == m);
  auto places = m;
  for (size_t i = 0; i < places.positive.size(); ++i) places.positive[i] |= places.negative[i];
  places.negative.assign(places.negative.size(), 0);
  const auto bare = golomb_encode(places, b, false);
  RC_ASSERT(golomb_decode(bare.bytes, d, m.kept(), b, false) == places);
}

TEST(Golomb, ALongGapComesBack) {
  TernaryMasks m(100000);
  m.negative[99999 / 64] = uint64_t{1} << 99999 % 64;
  EXPECT_EQ(golomb_decode(golomb_encode(m, 0).bytes, m.d, 1, 0), m);
}

TEST(Golomb, DamagedCodesAreErrors) {
  const auto m = random_signs(300, 0.2, 3);
  const int64_t kept = m.kept(), b = 2;
  auto code = golomb_encode(m, b).bytes;
  const auto says = [&](const std::vector<std::byte>& bytes, int64_t d, int64_t n) {
    return message_of([&] { golomb_decode(bytes, d, n, b, true, "x.tv"); });
  };
  auto cut = code;
  cut.pop_back();
  EXPECT_NE(says(cut, m.d, kept).find("x.tv: the code ends with"), std::string::npos);
  EXPECT_NE(says({}, m.d, kept).find("the code ends with"), std::string::npos);
  auto more = code;
  more.push_back(std::byte{0});
  EXPECT_NE(says(more, m.d, kept).find("follow the last entry"), std::string::npos);
  EXPECT_NE(says(code, m.d, kept - 4).find("follow the last entry"), std::string::npos);
  EXPECT_NE(says(code, 200, kept).find("beyond the 200 entries"), std::string::npos);
  EXPECT_NE(says(std::vector<std::byte>(200, std::byte{0xff}), m.d, kept).find("beyond the 300"), std::string::npos);
  EXPECT_NE(says(code, 10, 11).find("11 of 10 entries"), std::string::npos);
  EXPECT_THROW(golomb_decode(code, m.d, kept, 57), Error);
  EXPECT_THROW(golomb_encode(m, -1), Error);
}

TEST(Golomb, PaddingHasToBeZero) {
  const auto m = ternary_masks(std::vector<int8_t>{1, 0, -1});
  auto code = golomb_encode(m, 0);  // 00 101
  ASSERT_EQ(code.bits, 5);
  code.bytes[0] |= std::byte{1};
  EXPECT_THROW(golomb_decode(code.bytes, 3, 2, 0), Error);
}

RC_GTEST_PROP(Similarity, IsThatOfTheSigns, ()) {
  const auto d = *rc::gen::inRange<int64_t>(1, 300);
  const auto a = random_signs(d, 0.4, *rc::gen::arbitrary<uint32_t>()),
             b = random_signs(d, 0.6, *rc::gen::arbitrary<uint32_t>());
  const auto x = ternary_signs(a), y = ternary_signs(b);
  int64_t dot = 0, apart = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    dot += x[i] * y[i];
    apart += x[i] != y[i] ? 1 : 0;
  }
  RC_ASSERT(ternary_dot(a, b) == dot);
  RC_ASSERT(ternary_hamming(a, b) == apart);
  if (a.kept() > 0 && b.kept() > 0) {
    const double both = static_cast<double>(a.kept()) * static_cast<double>(b.kept());
    RC_ASSERT(std::abs(ternary_cosine(a, b) - static_cast<double>(dot) / std::sqrt(both)) < 1e-12);
  }
}

TEST(Similarity, NothingIsLikeNothing) {
  EXPECT_EQ(ternary_cosine(TernaryMasks(5), random_signs(5, 1.0, 1)), 0.0);
  EXPECT_NE(message_of([] { ternary_dot(TernaryMasks(5), TernaryMasks(6)); }).find("5 entries"), std::string::npos);
}

}  // namespace
}  // namespace moiety
