#include "moiety/compress/edgemoe.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "message_of.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

TEST(EdgeMoeBits, BoundsAreTheNarrowestWidthWithinTheToleranceAndTheNextNarrower) {
  const auto pair = [](const std::vector<int64_t>& widths, const std::vector<double>& losses, double p) {
    const auto b = bit_bounds(widths, losses, p);
    return std::pair{b.low, b.high};
  };
  EXPECT_EQ(pair({2, 4, 8, 32}, {0.5, 0.03, 0.01, 0.0}, 0.02), (std::pair<int64_t, int64_t>{4, 8}));
  EXPECT_EQ(pair({32, 8, 2, 4}, {0.0, 0.01, 0.5, 0.03}, 0.02), (std::pair<int64_t, int64_t>{4, 8}));  // any order
  EXPECT_EQ(pair({2, 4, 8, 32}, {0.01, 0.03, 0.01, 0.0}, 0.02), (std::pair<int64_t, int64_t>{2, 2}));
  EXPECT_EQ(pair({2, 4, 8, 32}, {0.5, 0.02, 0.01, 0.0}, 0.02), (std::pair<int64_t, int64_t>{2, 4}));  // equal is within
  EXPECT_EQ(pair({2, 4}, {0.5, 0.4}, 0.02), (std::pair<int64_t, int64_t>{4, 32}));                    // none: 32
}

TEST(EdgeMoeBits, OrderRisesAndLowestIndexWinsTies) {
  EXPECT_EQ(sensitivity_order(std::vector<double>{0.3, -0.1, 0.3, 0.0, -0.1}), (std::vector<int64_t>{1, 4, 3, 0, 2}));
}

TEST(EdgeMoeBits, WalkGoesUpWhileTheNextIsWithinAndDownUntilItIs) {
  // Loss k / 100: the tolerance is met up to k = 20.
  const auto loss = [](int64_t k) { return static_cast<double>(k) / 100.0; };
  EXPECT_EQ(walk_bits(64, 12, 4, 0.2, loss), 20);
  EXPECT_EQ(walk_bits(64, 13, 4, 0.2, loss), 17);  // 21 is beyond
  EXPECT_EQ(walk_bits(64, 32, 5, 0.2, loss), 17);  // 32, 27, 22, 17
  EXPECT_EQ(walk_bits(64, 3, 1, -0.5, loss), 0);   // never met: 0
  EXPECT_EQ(walk_bits(18, 99, 1, 0.2, loss), 18);  // clamped, and no more than all
  EXPECT_EQ(walk_bits(64, 3, 5, 0.01, loss), 0);   // a step beyond 0 ends there
}

TEST(EdgeMoeBits, LeastSensitiveGetTheNarrowWidth) {
  EdgeMoeConfig config;
  config.k0 = 2;
  config.step = 1;
  const auto a = assign_bits(config, {0.5, 0.03, 0.01, 0.0}, std::vector<double>{0.4, 0.1, 0.3, 0.2},
                             [](int64_t k, const std::vector<int64_t>&) { return k <= 2 ? 0.015 : 0.03; });
  EXPECT_EQ(a.k, 2);
  EXPECT_EQ(a.bits, (std::vector<int64_t>{8, 4, 8, 4}));
}

TEST(EdgeMoeBits, OneWidthForAllIsNotMeasured) {
  EdgeMoeConfig config;
  int measured = 0;
  const auto a = assign_bits(config, {0.01, 0.0, 0.0, 0.0}, std::vector<double>{0.4, 0.1},
                             [&](int64_t, const std::vector<int64_t>&) { return ++measured, 0.0; });
  EXPECT_EQ(a.k, 2);
  EXPECT_EQ(a.bits, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(measured, 0);
}

// The bits passed to the measurement are those of that k, and the second pass ends where one more would be too much.
RC_GTEST_PROP(EdgeMoeBits, SecondPassEndsAtTheLastWithin, ()) {
  const auto n = *rc::gen::inRange<int64_t>(1, 80), most = *rc::gen::inRange<int64_t>(0, 81);
  EdgeMoeConfig config;
  config.k0 = *rc::gen::inRange<int64_t>(-1, n + 3);
  config.step = *rc::gen::inRange<int64_t>(0, 9);
  std::vector<double> sensitivity(static_cast<size_t>(n));
  for (auto& s : sensitivity) s = *rc::gen::inRange(0, 5);
  const auto a =
      assign_bits(config, {0.5, 0.03, 0.01, 0.0}, sensitivity, [&](int64_t k, const std::vector<int64_t>& bits) {
        RC_ASSERT(std::count(bits.begin(), bits.end(), 4) == k);
        RC_ASSERT(std::count(bits.begin(), bits.end(), 8) == n - k);
        return k <= most ? 0.01 : 0.5;
      });
  RC_ASSERT(a.k == std::min(n, most));
  for (int64_t i = 0; i < n; ++i)
    RC_ASSERT(a.bits[static_cast<size_t>(a.order[static_cast<size_t>(i)])] == (i < a.k ? 4 : 8));
}

TEST(EdgeMoeConfig, RefusesWhatCannotBe) {
  const auto said = [](const nlohmann::json& j) { return message_of([&] { parse<EdgeMoeConfig>(j, "edgemoe"); }); };
  EXPECT_EQ(said({{"tolerance", 0.0}}), "");
  EXPECT_NE(said({{"tolerance", -0.1}}), "");
  EXPECT_NE(said({{"tolerance", 1.0}}).find("below 1"), std::string::npos);
  EXPECT_NE(said({{"widths", {2, 3}}}).find("2, 4, 8, 16 or 32"), std::string::npos);
  EXPECT_NE(said({{"widths", {4, 4}}}).find("twice"), std::string::npos);
  EXPECT_NE(said({{"widths", nlohmann::json::array()}}), "");
  EXPECT_NE(said({{"int2_scale", "min"}}), "");
}

// A model whose accuracy falls by a known amount for every expert and width.
class Fake : public EdgeMoeModel {
 public:
  explicit Fake(std::vector<double> weight) : weight_(std::move(weight)), bits_(weight_.size(), 32) {}
  int64_t experts() const override { return static_cast<int64_t>(weight_.size()); }
  void set_bits(const std::vector<int64_t>& bits) override { bits_ = bits; }
  double accuracy() override {
    ++evaluations;
    double loss = 0.0;
    for (size_t i = 0; i < bits_.size(); ++i)
      loss += weight_[i] * (bits_[i] == 2 ? 1.0 : bits_[i] == 4 ? 0.1 : bits_[i] == 8 ? 0.001 : 0.0);
    return 0.25 * (1.0 - loss);
  }
  std::vector<bool> unused() override {
    std::vector<bool> out;
    for (const double w : weight_) out.push_back(w == 0.0);
    return out;
  }
  const std::vector<int64_t>& bits() const { return bits_; }
  int evaluations = 0;

 private:
  std::vector<double> weight_;
  std::vector<int64_t> bits_;
};

TEST(EdgeMoeSearch, MeasuresLossesRelativeToTheWholeModel) {
  Fake model({0.1, 0.3, 0.0, 0.2});
  EdgeMoeMeasurements measured;
  EdgeMoeConfig config;
  config.tolerance = 0.1;
  const auto s = search_bits(model, config, measured, {});
  EXPECT_DOUBLE_EQ(s.full, 0.25);
  EXPECT_NEAR(s.uniform_loss[0], 0.6, 1e-12);
  EXPECT_NEAR(s.uniform_loss[1], 0.06, 1e-12);
  EXPECT_NEAR(s.uniform_loss[3], 0.0, 1e-12);
  // Others at 4 bits, not whole: 0.06 + 0.9 * weight.
  EXPECT_NEAR(s.sensitivity[0], 0.06 + 0.09, 1e-12);
  EXPECT_NEAR(s.sensitivity[2], 0.06, 1e-12);
  // 4 bits are within the tolerance, 2 are not. In the order 2, 0, 3, 1: 0.06 at k = 1, 0.15 at k = 2.
  EXPECT_EQ(s.assignment.k, 1);
  EXPECT_EQ(model.bits(), (std::vector<int64_t>{4, 4, 2, 4}));
  EXPECT_LE(s.loss, config.tolerance);
}

TEST(EdgeMoeSearch, GoesOnFromWhatWasMeasured) {
  const TemporaryFolder folder;
  const std::string file = (folder / "m.json").string();
  EdgeMoeConfig config;
  config.tolerance = 0.1;
  Fake first({0.1, 0.3, 0.0, 0.2});
  auto measured = EdgeMoeMeasurements::load(file, "x");
  // Stopped after the fourth evaluation.
  struct Stop {};
  int left = 4;
  EXPECT_THROW(search_bits(first, config, measured,
                           [&] {
                             measured.save(file);
                             if (--left == 0) throw Stop();
                           }),
               Stop);
  Fake whole({0.1, 0.3, 0.0, 0.2}), again({0.1, 0.3, 0.0, 0.2});
  EdgeMoeMeasurements none, kept = EdgeMoeMeasurements::load(file, "x");
  const auto a = search_bits(whole, config, none, {}), b = search_bits(again, config, kept, {});
  EXPECT_EQ(again.evaluations, whole.evaluations - 4);
  EXPECT_EQ(a.assignment.bits, b.assignment.bits);
  EXPECT_EQ(a.sensitivity, b.sensitivity);
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_TRUE(EdgeMoeMeasurements::load(file, "another").accuracy.empty());
}

TEST(EdgeMoeSearch, DoesNotEvaluateExpertsThatNoTokenReaches) {
  Fake all({0.1, 0.3, 0.1, 0.2}), some({0.1, 0.3, 0.0, 0.2});
  EdgeMoeMeasurements a, b;
  EdgeMoeConfig config;
  config.tolerance = 0.3;
  EXPECT_EQ(search_bits(all, config, a, {}).sensitivity.size(), 4u);
  const auto s = search_bits(some, config, b, {});
  EXPECT_EQ(s.sensitivity[2], s.uniform_loss[1]);
}

// The larger the tolerance, the fewer bits.
TEST(EdgeMoeSearch, FewerBitsForALargerTolerance) {
  int64_t before = 1 << 20;
  for (const double p : {0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9}) {
    Fake model({0.05, 0.2, 0.01, 0.15, 0.3, 0.02, 0.11, 0.07});
    EdgeMoeMeasurements measured;
    EdgeMoeConfig config;
    config.tolerance = p;
    const auto s = search_bits(model, config, measured, {});
    const int64_t bits = std::accumulate(model.bits().begin(), model.bits().end(), int64_t{0});
    EXPECT_LE(bits, before) << p;
    EXPECT_LE(s.loss, p + 1e-12);
    before = bits;
  }
}

}  // namespace
}  // namespace moiety
