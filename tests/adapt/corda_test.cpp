#include "moiety/adapt/corda.h"

#include <gtest/gtest.h>

#include <limits>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/lora.h"

namespace moiety {
namespace {

using torch::Tensor;

Tensor covariance(int64_t n, uint64_t seed = 1) {
  torch::manual_seed(seed);
  CordaCovariance c;
  for (int i = 0; i < 8; ++i) c.add(torch::randn({12, n}) * torch::arange(1, n + 1));
  return c.value();
}

double relative(const Tensor& a, const Tensor& b) {
  return (a - b).norm().item<double>() / b.norm().item<double>();
}

TEST(CordaCovariance, IsTheMeanOfSamplesOverTheirLargestEntry) {
  const auto one = torch::tensor({{1.0, 2.0}, {0.0, -8.0}}), other = torch::tensor({{-1.0, -3.0}});
  CordaCovariance c;
  c.add(one);
  c.add(other);
  // The largest with its sign: 2 and -1.
  const auto want = (torch::matmul(one.t(), one) / 4.0 + torch::matmul(other.t(), other)) / 2.0;
  EXPECT_LT(distance(c.value(), want), 1e-6);
  EXPECT_EQ(c.samples(), 2);
}

TEST(CordaCovariance, DoesNotKnowScalesOrTheOrderOfSamples) {
  torch::manual_seed(2);
  std::vector<Tensor> samples;
  for (int i = 0; i < 4; ++i) samples.push_back(torch::randn({3 + i, 5}));
  CordaCovariance one, other;
  for (int i = 0; i < 4; ++i) one.add(samples[static_cast<size_t>(i)]);
  for (int i = 3; i >= 0; --i) other.add(samples[static_cast<size_t>(i)] * 7.0);
  EXPECT_LT(distance(one.value(), other.value()), 1e-4);
}

TEST(CordaCovariance, GoesOnFromASum) {
  torch::manual_seed(3);
  const auto a = torch::randn({3, 4}), b = torch::randn({2, 4});
  CordaCovariance whole, first, second;
  whole.add(a);
  whole.add(b);
  first.add(a);
  second.restore(first.sum().clone(), first.samples());
  second.add(b);
  EXPECT_TRUE(torch::equal(whole.value(), second.value()));
}

TEST(CordaCovariance, BadSamplesAreErrors) {
  const auto says = [](const Tensor& x) {
    return message_of([&] {
      CordaCovariance c("layers.7.down_proj");
      c.add(torch::ones({2, 3}));
      c.add(x);
    });
  };
  EXPECT_NE(says(torch::full({2, 3}, std::numeric_limits<float>::quiet_NaN()))
                .find("non-finite activation at layers.7.down_proj, sample 1"),
            std::string::npos);
  EXPECT_NE(says(torch::zeros({2, 3})).find("cannot be scaled"), std::string::npos);
  EXPECT_NE(says(torch::ones({2, 4})).find("has 4 features, those before 3"), std::string::npos);
  EXPECT_NE(says(torch::ones({0, 3})).find("no rows"), std::string::npos);
  EXPECT_NE(message_of([] { CordaCovariance("q").value(); }).find("no calibration data"), std::string::npos);
}

TEST(CordaWatch, SeesRealTokensAndChangesNothing) {
  torch::manual_seed(4);
  const auto x = torch::randn({2, 3, 4});
  const auto watch = std::make_shared<CordaWatch>("q_proj");
  Linear matrix(torch::randn({5, 4}));
  matrix->attach(watch);
  Pass pass;
  pass.mask = torch::tensor({{1, 1, 1}, {0, 1, 1}}).to(torch::kBool);
  EXPECT_TRUE(torch::equal(project(matrix, x, pass), matrix->multiply(x)));
  CordaCovariance want;
  want.add(x[0]);
  want.add(x[1].slice(0, 1, 3));
  EXPECT_LT(distance(watch->covariance.value(), want.value()), 1e-6);
}

TEST(CordaDamped, RaisesTheDampingUntilTheInverseHolds) {
  EXPECT_EQ(damped(torch::eye(4)).lambda, 0.01);
  // One direction of 1e8 among ones of 0: an inverse in single precision needs more.
  auto c = torch::zeros({6, 6});
  c[0][0] = 1.0;
  const auto d = damped(c);
  EXPECT_LT(distance(torch::matmul(d.matrix, d.inverse), torch::eye(6, torch::kFloat64)), 1e-6);
  EXPECT_THROW(damped(torch::full({2, 2}, std::numeric_limits<float>::infinity())), Error);
  EXPECT_THROW(damped(torch::ones({2, 3})), Error);
  EXPECT_NE(message_of([] {
              damped(torch::zeros({3, 3}), "layers.0.q_proj");
            }).find("layers.0.q_proj"),
            std::string::npos);
}

class Decompose : public testing::TestWithParam<const char*> {};

TEST_P(Decompose, ResidualAndAdapterAreTheMatrix) {
  torch::manual_seed(5);
  const auto c = covariance(8);
  for (const auto& w : {torch::randn({6, 8}), torch::randn({10, 8})})
    for (const double alpha : {3.0, 12.0}) {
      const auto d = corda_decompose(w, c, GetParam(), 3, alpha);
      EXPECT_EQ(d.a.sizes(), (std::vector<int64_t>{3, 8}));
      EXPECT_LT(relative(d.residual + alpha / 3.0 * torch::matmul(d.b, d.a), w), 1e-5);
      // Neither half is nothing.
      EXPECT_GT(d.a.norm().item<double>() * d.b.norm().item<double>(), 1e-3);
    }
}

TEST_P(Decompose, WholeRankLeavesNothing) {
  torch::manual_seed(6);
  const auto w = torch::randn({6, 8});
  EXPECT_LT(corda_decompose(w, covariance(8), GetParam(), 6, 6.0).residual.abs().max().item<double>(), 1e-4);
}

TEST_P(Decompose, AnEvenMomentGivesTheComponentsOfTheMatrix) {
  torch::manual_seed(7);
  const auto w = torch::randn({6, 8});
  const auto d = corda_decompose(w, torch::eye(8) * 3.0, GetParam(), 2, 2.0);
  const auto [u, s, v] = torch::linalg_svd(w, false);
  const int64_t begin = std::string(GetParam()) == "ipm" ? 0 : 4;
  const auto want = torch::matmul(u.narrow(1, begin, 2) * s.narrow(0, begin, 2), v.narrow(0, begin, 2));
  EXPECT_LT(distance(torch::matmul(d.b, d.a), want), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Modes, Decompose, testing::Values("ipm", "kpm"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Corda, LargestAndSmallestComponentsTogetherAreTheMatrix) {
  torch::manual_seed(8);
  const auto w = torch::randn({6, 8}), c = covariance(8);
  const auto k = corda_decompose(w, c, "kpm", 2, 2.0), i = corda_decompose(w, c, "ipm", 4, 4.0);
  EXPECT_LT(relative(torch::matmul(k.b, k.a) + torch::matmul(i.b, i.a), w), 1e-4);
}

TEST(Corda, ComponentsThatAreZeroAreLeftOut) {
  torch::manual_seed(9);
  const auto w = torch::matmul(torch::randn({6, 3}), torch::randn({3, 8})), c = covariance(8);
  const auto d = corda_decompose(w, c, "kpm", 2, 2.0);
  EXPECT_EQ(d.skipped, 3);
  EXPECT_GT(d.a.norm().item<double>() * d.b.norm().item<double>(), 1e-3);
  EXPECT_NE(message_of([&] {
              corda_decompose(w, c, "kpm", 4, 4.0, "layers.0.q_proj");
            }).find("layers.0.q_proj has 3 components"),
            std::string::npos);
  // The largest are all there is.
  EXPECT_LT(corda_decompose(w, c, "ipm", 3, 3.0).residual.abs().max().item<double>(), 1e-4);
}

TEST(Corda, BadInputIsAnError) {
  const auto w = torch::randn({6, 8}), c = covariance(8);
  EXPECT_NE(message_of([&] { corda_decompose(w, c, "spm", 2, 2.0); }).find("ipm and kpm"), std::string::npos);
  EXPECT_NE(message_of([&] { corda_decompose(w, c, "ipm", 7, 2.0); }).find("1 to 6 are possible"), std::string::npos);
  EXPECT_NE(message_of([&] { corda_decompose(w, c, "ipm", 0, 2.0); }).find("rank 0"), std::string::npos);
  EXPECT_NE(message_of([&] {
              corda_decompose(w, covariance(7), "ipm", 2, 2.0, "layers.0.q_proj");
            }).find("of 7 features, the matrix has 8"),
            std::string::npos);
  EXPECT_NE(message_of([&] { corda_decompose(w, c, "ipm", 2, 0.0); }).find("alpha"), std::string::npos);
}

TEST(CordaCompress, IsTheBestUnderTheMoment) {
  torch::manual_seed(10);
  const auto w = torch::randn({6, 8}, torch::kFloat64), c = covariance(8);
  const auto m = damped(c).matrix;
  const auto error = [&](const Tensor& kept) { return torch::matmul(w - kept, m).square().sum().item<double>(); };
  const auto s = std::get<1>(torch::linalg_svd(torch::matmul(w, m), false));
  for (const int64_t drop : {1, 3, 5}) {
    const double own = error(corda_compress(w, "corda", c, drop));
    EXPECT_LT(own, error(corda_compress(w, "svd", {}, drop)));
    EXPECT_LT(own, error(corda_compress(w, "asvd", torch::arange(1, 9), drop)));
    EXPECT_NEAR(own / s.slice(0, 6 - drop, 6).square().sum().item<double>(), 1.0, 1e-6);
  }
}

TEST(CordaCompress, NothingDroppedIsTheMatrix) {
  torch::manual_seed(11);
  const auto w = torch::randn({6, 8});
  EXPECT_LT(relative(corda_compress(w, "corda", covariance(8), 0), w), 1e-5);
  EXPECT_LT(relative(corda_compress(w, "asvd", torch::rand({8}) + 0.1, 0), w), 1e-5);
  EXPECT_EQ(corda_compress(w, "svd", {}, 6).abs().max().item<double>(), 0.0);
  EXPECT_THROW(corda_compress(w, "svd", {}, 7), Error);
  EXPECT_THROW(corda_compress(w, "asvd", torch::rand({7}), 1), Error);
  EXPECT_THROW(corda_compress(w, "pca", {}, 1), Error);
}

TEST(Corda, BecomesALoraOverTheBaseAsItWas) {
  torch::manual_seed(12);
  const auto w = torch::randn({6, 8});
  const double alpha = 3.0;
  const auto start = corda_decompose(w, covariance(8), "ipm", 2, alpha);
  const LoraPair before{start.a, start.b},
      after{start.a + 0.3 * torch::randn({2, 8}), start.b + 0.3 * torch::randn({6, 2})};
  const auto lora = corda_to_lora(before, after);
  EXPECT_EQ(lora.a.size(0), 4);
  const auto trained = start.residual + alpha / 2.0 * torch::matmul(after.b, after.a);
  // Twice the alpha over twice the rank.
  EXPECT_LT(relative(w + 2.0 * alpha / 4.0 * torch::matmul(lora.b, lora.a), trained), 1e-5);
  EXPECT_THROW(corda_to_lora(before, {torch::zeros({3, 8}), torch::zeros({6, 3})}), Error);
}

TEST(Corda, AModelAnswersAsBeforeItIsTakenApart) {
  torch::manual_seed(13);
  const torch::NoGradGuard frozen;
  const auto model = make_causal(model_with({{{"slug", "lora"}, {"rank", 3}, {"alpha", 3.0}, {"target", "q_proj"}}}));
  const auto ids = torch::arange(18, torch::kInt64).view({2, 9});
  const auto before = logits_of(*model, ids);
  std::map<std::string, Tensor> stored;
  for (const auto& t : model->stored()) stored[t.name] = t.value();
  for (const std::string layer : {"0", "1"}) {
    auto w = stored.at("model.layers." + layer + ".self_attn.q_proj.weight");
    const auto d = corda_decompose(w, covariance(16), "ipm", 3, 3.0);
    w.copy_(d.residual);
    stored.at("model.layers." + layer + ".adapters.q_proj.lora_A").copy_(d.a);
    stored.at("model.layers." + layer + ".adapters.q_proj.lora_B").copy_(d.b);
  }
  EXPECT_LT(distance(logits_of(*model, ids), before), 1e-4);
}

}  // namespace
}  // namespace moiety
