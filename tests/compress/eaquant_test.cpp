#include "moiety/compress/eaquant.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

#include "message_of.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

const auto kF64 = torch::kFloat64;

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

SmoothingLayer layer_of(int64_t experts, int64_t hidden, int64_t width) {
  torch::manual_seed(1);
  SmoothingLayer l;
  l.act_max = torch::rand({experts, hidden}, kF64) * 4.0;
  l.router = torch::randn({experts, hidden}, kF64);
  l.gate = torch::randn({experts, width, hidden}, kF64);
  l.up = torch::randn({experts, width, hidden}, kF64);
  l.tokens = torch::arange(1, experts + 1, torch::kInt64);
  l.router_prob = torch::softmax(torch::randn({experts}, kF64), 0);
  return l;
}

// s_e of every expert by the definition.
Tensor vectors(const SmoothingLayer& l, double alpha) {
  std::vector<Tensor> out;
  for (int64_t e = 0; e < l.gate.size(0); ++e) {
    const auto w = torch::maximum(l.gate[e].abs().amax(0), l.up[e].abs().amax(0));
    out.push_back((l.act_max[e].clamp_min(1e-5).pow(alpha) / w.clamp_min(1e-5).pow(1.0 - alpha)).clamp_min(1e-5));
  }
  return torch::stack(out);
}

TEST(EaquantSmoothing, AggregatesScalesAndNotActivations) {
  const auto l = layer_of(3, 5, 4);
  const auto s = vectors(l, 0.6);
  EXPECT_LT(distance(smoothing_scale(l, 0.6, "max"), s.amax(0)), 1e-12);
  EXPECT_LT(distance(smoothing_scale(l, 0.6, "frequency"), (s * (l.tokens.to(kF64) / 6.0).unsqueeze(1)).sum(0)), 1e-12);
  EXPECT_LT(distance(smoothing_scale(l, 0.6, "router"), (s * l.router_prob.unsqueeze(1)).sum(0)), 1e-12);
  auto ratio = torch::zeros({3}, kF64);
  for (int64_t e = 0; e < 3; ++e)
    for (const auto& w : {l.gate[e], l.up[e]})
      ratio[e] = torch::maximum(ratio[e], (w.abs().amax(0) / w.abs().mean(0)).max());
  EXPECT_LT(distance(smoothing_scale(l, 0.6, "weight"), (s * (ratio / ratio.sum()).unsqueeze(1)).sum(0)), 1e-12);
}

TEST(EaquantSmoothing, TheRouterVotesOnlyWhenAsked) {
  auto l = layer_of(3, 5, 4);
  l.router.mul_(1e-3);  // small weights: a large vector
  const auto without = smoothing_scale(l, 0.6, "max"), with = smoothing_scale(l, 0.6, "max", true);
  const auto own = smoothing_scale(l, 0.6, "none");
  EXPECT_LT(distance(own, smoothing_vector(l.act_max.amax(0), {l.router}, 0.6)), 1e-12);
  EXPECT_LT(distance(with, torch::maximum(without, own)), 1e-12);
  EXPECT_GT(distance(with, without), 1e-3);
  // Tokens of no expert are tokens of the router all the same.
  l.router_max = l.act_max.amax(0) * 3.0;
  EXPECT_GT(distance(smoothing_scale(l, 0.6, "none"), own), 1e-3);
  EXPECT_LT(distance(smoothing_scale(l, 0.6, "max"), without), 1e-12);
  l.shared_gate = l.shared_up = torch::full({2, 5}, 1e-3, kF64);
  EXPECT_GT(distance(smoothing_scale(l, 0.6, "max"), without), 1e-3);
}

TEST(EaquantSmoothing, LeavesTheLayersFunction) {
  const auto l = layer_of(3, 5, 4);
  const auto x = torch::randn({6, 5}, kF64);
  auto weight = torch::rand({5}, kF64) + 0.5;
  const auto read = [&](const Tensor& w) { return torch::matmul(x * weight, w.transpose(-1, -2)); };
  const auto router = read(l.router), gate = read(l.gate[1]);
  fold_smoothing(smoothing_scale(l, 0.6, "max"), {weight}, {l.router, l.gate, l.up});
  EXPECT_LT(distance(read(l.router), router), 1e-12);
  EXPECT_LT(distance(read(l.gate[1]), gate), 1e-12);
}

TEST(EaquantSmoothing, BadInputIsAnError) {
  auto l = layer_of(2, 4, 3);
  EXPECT_NE(message_of([&] { smoothing_scale(l, 1.0, "max"); }).find("between 0 and 1"), std::string::npos);
  EXPECT_NE(message_of([&] { smoothing_scale(l, 0.5, "mean"); }).find("frequency"), std::string::npos);
  l.tokens.zero_();
  EXPECT_THROW(smoothing_scale(l, 0.5, "frequency"), Error);
  l.act_max[0][1] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NE(message_of([&] { smoothing_scale(l, 0.5, "max"); }).find("not finite"), std::string::npos);
}

TEST(EaquantExtremes, AreExponentialMeans) {
  ChannelExtremes e;
  e.add(torch::tensor({{1.0, -2.0}, {3.0, -1.0}}));
  e.add(torch::tensor({{5.0, 4.0}}));
  EXPECT_LT(distance(e.high, torch::tensor({0.9 * 3.0 + 0.5, 0.9 * -1.0 + 0.4})), 1e-6);
  EXPECT_LT(distance(e.low, torch::tensor({0.9 * 1.0 + 0.5, 0.9 * -2.0 + 0.4})), 1e-6);
}

TEST(EaquantOutliers, ArePulledTowardsTheLargestNormalChannel) {
  auto high = torch::linspace(1.0, 2.0, 20, kF64), low = -torch::linspace(1.0, 2.0, 20, kF64);
  high[3] = 40.0;
  low[7] = -30.0;
  auto s = outlier_scale(high, low);
  EXPECT_NEAR(s[3].item<double>(), std::pow(40.0 / 2.0, 0.7), 1e-9);
  EXPECT_NEAR(s[7].item<double>(), std::pow(30.0 / 2.0, 0.7), 1e-9);
  EXPECT_EQ((s == 1.0).sum().item<int64_t>(), 18);
  // An outlier on both sides takes the larger.
  low[7] = -1.5;
  low[3] = -90.0;
  s = outlier_scale(high, low);
  EXPECT_NEAR(s[3].item<double>(), std::pow(90.0 / 2.0, 0.7), 1e-9);
  EXPECT_EQ((s == 1.0).sum().item<int64_t>(), 19);
}

TEST(EaquantOutliers, SideWithoutASignIsLeftOut) {
  // All lows are at least 0 but one outlier below: nothing normal to compare with.
  auto high = torch::linspace(1.0, 2.0, 12, kF64), low = torch::linspace(0.0, 0.1, 12, kF64);
  low[4] = -9.0;
  EXPECT_TRUE((outlier_scale(high, low) == 1.0).all().item<bool>());
  high[4] = 90.0;
  const auto s = outlier_scale(high, low);
  EXPECT_NEAR(s[4].item<double>(), std::pow(90.0 / 2.0, 0.7), 1e-9);
  EXPECT_TRUE(torch::isfinite(s).all().item<bool>());
}

TEST(EaquantOutliers, BoundMovesToTheGapBetweenTwoKinds) {
  // 1 ... 2 is normal; 6 and 6.2 exceed the first bound, but the gap is above them.
  auto high = torch::cat({torch::linspace(1.0, 2.0, 30, kF64), torch::tensor({6.0, 6.2, 50.0}, kF64)});
  const auto s = outlier_scale(high, -torch::ones({33}, kF64));
  EXPECT_EQ(s[30].item<double>(), 1.0);
  EXPECT_EQ(s[31].item<double>(), 1.0);
  EXPECT_NEAR(s[32].item<double>(), std::pow(50.0 / 6.2, 0.7), 1e-9);
}

TEST(EaquantRotation, IsOrthogonalWithAFlatFirstRow) {
  const auto q = flat_rotation(16, 5);
  EXPECT_LT(distance(torch::matmul(q, q.t()), torch::eye(16, kF64)), 1e-12);
  EXPECT_LT(distance(q[0], torch::full({16}, 0.25, kF64)), 1e-12);
  EXPECT_TRUE(torch::equal(flat_rotation(16, 5), q));
  EXPECT_GT(distance(flat_rotation(16, 6), q), 1e-3);
}

Tensor with_outliers() {
  torch::manual_seed(2);
  auto x = torch::randn({20, 24}, kF64);
  x.select(1, 5).mul_(40.0);
  x.select(1, 14).mul_(-25.0);
  return x;
}

double range(const Tensor& x) {
  return (x.max() - x.min()).item<double>();
}

TEST(EaquantRotation, SpreadsOutliers) {
  const auto x = with_outliers();
  const auto r = greedy_rotation(x, 8, 32, 1);
  EXPECT_LT(distance(torch::matmul(r, r.t()), torch::eye(8, kF64)), 1e-10);
  EXPECT_LT(range(rotate_blocks(x, r)), 0.7 * range(x));
  // No step may make it worse.
  EXPECT_LT(distance(greedy_rotation(torch::ones({3, 8}, kF64), 8, 32, 1), torch::eye(8, kF64)), 1e-12);
  EXPECT_LT(distance(greedy_rotation(x, 8, 0, 1), torch::eye(8, kF64)), 1e-12);
}

TEST(EaquantRotation, LeavesProductsAndCanBeUndone) {
  const auto x = with_outliers(), w = torch::randn({7, 24}, kF64);
  const Rotation r = find_rotation(x, 8, 16, 3);
  EXPECT_LT(distance(torch::matmul(r.apply(x), r.apply(w).t()), torch::matmul(x, w.t())), 1e-9);
  EXPECT_LT(distance(r.undo(r.apply(x)), x), 1e-10);
  const Rotation again = find_rotation(x, 8, 16, 3);
  EXPECT_TRUE(torch::equal(again.first, r.first) && torch::equal(again.perm, r.perm));
  EXPECT_NE(message_of([&] { find_rotation(x, 16, 4, 1); }).find("8 would do"), std::string::npos);
  EXPECT_THROW(rotate_blocks(x, torch::eye(5, kF64)), Error);
}

TEST(EaquantPermutation, DealsChannelsInASnake) {
  const auto x = torch::tensor({{1.0, -9.0, 3.0, 8.0, 2.0, 7.0}}, kF64);
  // By size: 1, 3, 5, 2, 4, 0; blocks of 2: first gets 1, then 2; second 3, then ... backwards.
  EXPECT_TRUE(torch::equal(zigzag_permutation(x, 2), torch::tensor({1, 0, 3, 4, 5, 2}, torch::kInt64)));
  // Equal sizes stay in their order.
  EXPECT_TRUE(torch::equal(zigzag_permutation(torch::ones({1, 4}), 2), torch::tensor({0, 3, 1, 2}, torch::kInt64)));
}

TEST(EaquantPermutation, BalancesBlocks) {
  torch::manual_seed(3);
  for (int i = 0; i < 10; ++i) {
    const auto x = torch::randn({1, 32}, kF64) * torch::linspace(0.1, 5.0, 32, kF64);
    const auto sums = [&](const Tensor& v) { return range(v.abs().view({4, 8}).sum(1)); };
    const auto perm = zigzag_permutation(x, 8);
    EXPECT_TRUE(torch::equal(std::get<0>(perm.sort()), torch::arange(32, torch::kInt64)));
    EXPECT_LT(sums(x.index_select(1, perm)), sums(x));
  }
}

TEST(EaquantQuantizer, RoundsToTheGrid) {
  const auto w = torch::tensor({{-1.0, 0.3, 2.0}, {5.0, 5.0, 5.0}}, kF64);
  const auto q = quantize_rows(w, 2, 1.0);
  EXPECT_NEAR(q.scale[0].item<double>(), 1.0, 1e-12);
  EXPECT_LT(distance(q.values[0], torch::tensor({-1.0, 0.0, 2.0}, kF64)), 1e-12);
  EXPECT_GT(q.scale[1].item<double>(), 0.0);
  // Rows of one sign: their range is their own, 0 is not part of it.
  const auto high = torch::tensor({{10.0, 10.4, 11.0}}, kF64);
  EXPECT_LT(distance(quantize_rows(high, 4, 1.0).values, high), 0.04);
  EXPECT_GT(distance(quantize_rows(high, 4, 1.0, /*clamp_zero=*/true).values, high), 1.0);
}

TEST(EaquantQuantizer, ErrsByHalfAStepInsideItsRange) {
  torch::manual_seed(4);
  const auto w = torch::randn({9, 31}, kF64);
  for (const int64_t bits : {2, 4, 8, 16}) {
    const auto q = quantize_rows(w, bits, 1.0);
    EXPECT_TRUE(((w - q.values).abs() <= q.scale * 1.0001).all().item<bool>());  // the ends lose up to a half more
    EXPECT_LT((w - q.values).abs().median().item<double>(), q.scale.max().item<double>() / 2.0);
  }
  EXPECT_LT(distance(quantize_rows(w, 16, 1.0).values, w), 1e-3);
  EXPECT_THROW(quantize_rows(w, 1, 1.0), Error);
  EXPECT_THROW(quantize_rows(w, 17, 1.0), Error);
}

TEST(EaquantQuantizer, ASearchedRatioIsNoWorseThanTheExtremes) {
  torch::manual_seed(5);
  auto w = torch::randn({12, 40}, kF64);
  w.select(1, 0).mul_(6.0);
  const auto error = [&](const QuantizedRows& q) { return (w - q.values).square().sum(1); };
  const auto searched = search_rows(w, 3), plain = quantize_rows(w, 3, 1.0);
  EXPECT_TRUE((error(searched) <= error(plain) + 1e-12).all().item<bool>());
  EXPECT_GT((searched.ratio < 1.0).sum().item<int64_t>(), 0);
  // A row of two values is exact at several ratios: the smallest of those within rounding wins.
  const auto zeros = search_rows(torch::zeros({1, 4}, kF64), 4);
  EXPECT_NEAR(zeros.ratio.item<double>(), 0.35, 1e-12);
}

TEST(EaquantQuantizer, MinmaxShrinksBothExtremes) {
  const auto w = torch::tensor({{-2.0, 0.1, 4.0}}, kF64);
  const auto q = quantize_weight(w, 8, "minmax", 0.5);
  EXPECT_NEAR(q.values.max().item<double>(), 2.0, 0.02);
  EXPECT_NEAR(q.values.min().item<double>(), -1.0, 0.02);
  EXPECT_NEAR(q.ratio.item<double>(), 0.5, 1e-12);
  EXPECT_THROW(quantize_weight(w, 8, "max", 0.5), Error);
}

TEST(EaquantQuantizer, ActivationsAreQuantizedTokenByToken) {
  torch::manual_seed(6);
  const auto x = torch::randn({2, 5, 16}, kF64);
  auto scaled = x.clone();
  scaled[0][3].mul_(100.0);
  const auto one = quantize_activations(x, 4, 0.9), other = quantize_activations(scaled, 4, 0.9);
  EXPECT_LT(distance(other[0][3], one[0][3] * 100.0), 1e-9);
  EXPECT_TRUE(torch::equal(other[1], one[1]));
}

struct Routed {
  Tensor router, x;
  explicit Routed(int64_t experts = 8, int64_t tokens = 40) {
    torch::manual_seed(7);
    router = torch::randn({experts, 12}, kF64);
    router.select(1, 2).mul_(5.0);
    x = torch::randn({tokens, 12}, kF64);
  }
};

TEST(EaquantRouter, TakesOneRatioForTheMatrixByKl) {
  const Routed r;
  const auto q = calibrate_router(r.router, r.x, 3, 2, "kl", 1.0);
  EXPECT_TRUE((q.ratio == q.ratio[0]).all().item<bool>());
  // Nothing smaller among the ratios, nor as small before it.
  const auto kl = [&](double ratio) {
    const auto w = quantize_rows(r.router, 3, ratio, true).values;
    const auto logp = torch::log_softmax(r.x.matmul(r.router.t()), 1), logq = torch::log_softmax(r.x.matmul(w.t()), 1);
    return (logp.exp() * (logp - logq)).sum().item<double>() / 40.0;
  };
  EXPECT_NEAR(kl(q.ratio[0].item<double>()), q.kl, 1e-9);
  for (int j = 0; j <= 100; ++j) EXPECT_GE(kl(0.35 + 0.65 * j / 100.0), q.kl - 1e-12);
  EXPECT_GE(q.kl, 0.0);  // over all experts it is a divergence
}

TEST(EaquantRouter, KlOverTheChosenAloneMayBeNegative) {
  bool negative = false;
  for (int seed = 0; seed < 20 && !negative; ++seed) {
    torch::manual_seed(seed);
    const auto router = torch::randn({6, 8}, kF64), x = torch::randn({5, 8}, kF64);
    negative = calibrate_router(router, x, 2, 1, "kl", 0.0).kl < 0.0;
  }
  EXPECT_TRUE(negative);
}

TEST(EaquantRouter, RowsHaveRatiosOfTheirOwnBesideTheKl) {
  const Routed r;
  const auto both = calibrate_router(r.router, r.x, 3, 2, "mse+kl", 0.0);
  EXPECT_GT((both.ratio != both.ratio[0]).sum().item<int64_t>(), 0);
  const auto rows = calibrate_router(r.router, r.x, 3, 2, "mse", 0.0);
  EXPECT_TRUE(torch::equal(rows.values, search_rows(r.router, 3).values));
}

TEST(EaquantRouter, ManyBitsKeepTheChoice) {
  const Routed r;
  EXPECT_EQ(calibrate_router(r.router, r.x, 16, 3, "kl", 0.5).overlap, 1.0);
  const auto few = calibrate_router(r.router, r.x, 2, 3, "kl", 0.5).overlap;
  EXPECT_GT(few, 0.0);
  EXPECT_LT(few, 1.0);
}

TEST(EaquantRouter, BadInputIsAnError) {
  const Routed r;
  const auto says = [&](const std::string& loss, int64_t k, double kappa, const Tensor& x) {
    return message_of([&] { calibrate_router(r.router, x, 4, k, loss, kappa); });
  };
  EXPECT_NE(says("l1", 2, 0.0, r.x).find("mse+kl"), std::string::npos);
  EXPECT_NE(says("kl", 9, 0.0, r.x).find("cannot choose 9"), std::string::npos);
  EXPECT_NE(says("kl", 2, 1.5, r.x), "");
  EXPECT_NE(says("kl", 2, 0.0, torch::empty({0, 12}, kF64)), "");
}

TEST(EaquantBalance, TakesWholeSamplesUntilTheCap) {
  // Three samples of three tokens; expert 0 takes two tokens of the first and three of the second.
  const auto selected = torch::tensor({{{0l}, {1l}, {0l}}, {{0l}, {0l}, {0l}}, {{1l}, {0l}, {0l}}}, torch::kInt64);
  const auto b = balance_tokens(selected, 3, 4);
  EXPECT_TRUE(torch::equal(b.index, torch::tensor({{0, 2, 3, 4}, {1, 6, -1, -1}, {-1, -1, -1, -1}}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(b.count, torch::tensor({4, 2, 0}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(b.fallback, torch::tensor({0, 0, 1}, torch::kUInt8)));
  // An expert that has reached its cap sees no further sample.
  EXPECT_TRUE(torch::equal(balance_tokens(selected, 3, 2).index[0], torch::tensor({0, 2}, torch::kInt64)));
  EXPECT_THROW(balance_tokens(selected, 1, 4), Error);
}

TEST(EaquantBalance, CapIsCutAndNotRounded) {
  EXPECT_EQ(balance_cap(7, 2, 12, 2.0), 6);
  EXPECT_EQ(balance_cap(64, 8, 4096, 2.0), 1024);
  EXPECT_THROW(balance_cap(8, 2, 16, 0.0), Error);
}

TEST(EaquantConfigTest, NamesWhatIsOutOfRange) {
  EXPECT_NE(message_of([] {
              parse<EaquantConfig>({{"weight_bits", 1}}, "run.yaml");
            }).find("weight_bits"),
            std::string::npos);
  EXPECT_NE(message_of([] { parse<EaquantConfig>({{"alpha", 1.0}}, "run.yaml"); }).find("alpha"), std::string::npos);
  EXPECT_EQ(parse<EaquantConfig>(nlohmann::json::object(), "run.yaml").block_size, 128);
}

}  // namespace
}  // namespace moiety
