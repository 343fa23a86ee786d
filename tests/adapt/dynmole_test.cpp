#include "moiety/adapt/dynmole.h"

#include <gtest/gtest.h>

#include <cmath>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/soft_router.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json dynmole(const json& more = json::object()) {
  json part = {{"slug", "dynmole"}, {"experts", 4}, {"rank", 2}, {"dropout", 0.0}};
  part.update(more);
  return part;
}

// Without the rule of the entropy.
DynMoleRule by_sum() {
  DynMoleRule r;
  r.entropy_threshold = 1.0;
  return r;
}

double h(const Tensor& p, double q = 1.1, double eps = 1e-5, const std::string& type = "tsallis") {
  return entropy(p, q, eps, true, type).item<double>();
}

std::shared_ptr<RoutedLora> part_of(const Tensor& rows, const Tensor& a, const Tensor& b, const DynMoleRule& rule) {
  return std::make_shared<RoutedLora>("q_proj", std::make_shared<DynMoleRouter>(Linear(rows), rule), a, b, 2.0);
}

TEST(DynMole, EntropyAtItsEnds) {
  const auto even = torch::full({6}, 1.0 / 6.0, torch::kFloat64);
  const auto one = torch::tensor({0.0, 0.0, 1.0, 0.0, 0.0, 0.0}, torch::kFloat64);
  for (const char* type : {"tsallis", "renyi"})
    for (const double q : {0.5, 1.0, 1.1, 2.0}) {
      EXPECT_NEAR(h(even, q, 1e-9, type), 1.0, 1e-4) << type << q;
      EXPECT_NEAR(h(one, q, 1e-9, type), 0.0, q < 1.0 ? 1e-2 : 1e-4) << type << q;
    }
  EXPECT_GT(h(even), 0.999);
  EXPECT_LE(h(even), 1.0);
  EXPECT_LT(std::abs(h(one)), 1e-3);
}

TEST(DynMole, EntropyIsShannonsAtOne) {
  const auto p = torch::tensor({0.6, 0.3, 0.1}, torch::kFloat64);
  const double shannon = -(0.6 * std::log(0.6) + 0.3 * std::log(0.3) + 0.1 * std::log(0.1));
  EXPECT_NEAR(entropy(p, 1.0, 1e-12, false, "tsallis").item<double>(), shannon, 1e-9);
  EXPECT_NEAR(h(p, 1.0, 1e-12), shannon / std::log(3.0), 1e-9);
  // Near to one without an eps, so is Tsallis'.
  EXPECT_NEAR(h(p, 1.0001, 1e-300), h(p, 1.0, 1e-300), 1e-3);
}

TEST(DynMole, EntropyRisesTowardsEven) {
  const auto p = torch::tensor({0.7, 0.2, 0.06, 0.04}, torch::kFloat64);
  double last = -1.0;
  for (const double share : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    const double now = h(p * (1.0 - share) + share / 4.0);
    EXPECT_GT(now, last);
    last = now;
  }
  EXPECT_NEAR(h(p.flip(0)), h(p), 1e-12);
}

TEST(DynMole, EntropyHasTheGradientOfItsFormula) {
  torch::manual_seed(1);
  for (const char* type : {"tsallis", "renyi"})
    for (const double q : {1.0, 1.1}) {
      const auto p = torch::rand({3, 4}, torch::kFloat64).requires_grad_();
      EXPECT_LT(gradient_error([&] { return entropy(p, q, 1e-5, true, type).sum(); }, p), 1e-6) << type << q;
    }
}

TEST(DynMole, TheExpertThatCrossesTheSumIsLeftOut) {
  DynMoleRule r = by_sum();
  r.top_p = 0.75;
  r.keep_top_k = 1;
  const auto mask = [&](std::vector<double> p) {
    return dynmole_choose(torch::tensor(p, torch::kFloat64), r).mask.to(torch::kInt64);
  };
  EXPECT_TRUE(torch::equal(mask({0.1, 0.4, 0.3, 0.2}), torch::tensor({0, 1, 1, 0})));
  // More than the sum at once: the best one stays.
  EXPECT_TRUE(torch::equal(mask({0.1, 0.8, 0.06, 0.04}), torch::tensor({0, 1, 0, 0})));
  r.keep_top_k = 2;
  EXPECT_TRUE(torch::equal(mask({0.1, 0.8, 0.06, 0.04}), torch::tensor({1, 1, 0, 0})));
  // Equal ones: the lower index first.
  EXPECT_TRUE(torch::equal(mask({0.25, 0.25, 0.25, 0.25}), torch::tensor({1, 1, 1, 0})));
}

TEST(DynMole, WeightsAreNotRenormalized) {
  DynMoleRule r = by_sum();
  const auto p = torch::tensor({0.1, 0.4, 0.3, 0.2}, torch::kFloat64);
  EXPECT_NEAR(dynmole_choose(p, r).weights.sum().item<double>(), 0.7, 1e-12);
  r.top_p = 1.0;
  EXPECT_TRUE(torch::equal(dynmole_choose(p, r).weights, p));
  r.top_p = 0.1;
  r.keep_top_k = 4;
  EXPECT_TRUE(torch::equal(dynmole_choose(p, r).weights, p));
}

TEST(DynMole, AnUnsureTokenTakesAll) {
  const DynMoleRule r;
  const auto even = torch::full({2, 6}, 1.0 / 6.0);
  EXPECT_TRUE(dynmole_choose(even, r).mask.all().item<bool>());
  EXPECT_NEAR(dynmole_choose(even, r).weights.sum().item<double>(), 2.0, 1e-5);
  EXPECT_FALSE(dynmole_choose(even, by_sum()).mask.all().item<bool>());
  // Strictly above the threshold.
  DynMoleRule at = r;
  const auto p = torch::tensor({0.5, 0.3, 0.1, 0.1}, torch::kFloat64);
  at.entropy_threshold = dynmole_choose(p, r).entropy.item<double>();
  EXPECT_FALSE(dynmole_choose(p, at).mask.all().item<bool>());
  at.entropy_threshold -= 1e-9;
  EXPECT_TRUE(dynmole_choose(p, at).mask.all().item<bool>());
}

TEST(DynMole, GradientsEqualCentralDifferences) {
  torch::manual_seed(2);
  const auto w = f64({5, 4}, false), rows = f64({3, 4}), a = f64({3, 2, 4}), b = f64({3, 5, 2}), x = f64({4, 4});
  const auto part = part_of(rows, a, b, DynMoleRule());
  const auto f = [&] {
    Pass pass;
    return applied(*part, w, x, pass).square().sum();
  };
  for (const Tensor& t : {rows, a, b, x}) EXPECT_LT(gradient_error(f, t), 1e-5);
}

TEST(DynMole, AllExpertsAreASoftMixture) {
  torch::manual_seed(3);
  const torch::NoGradGuard frozen;
  const auto w = torch::randn({5, 4}), rows = torch::randn({3, 4}), a = torch::randn({3, 2, 4}),
             b = torch::randn({3, 5, 2}), x = torch::randn({6, 4});
  DynMoleRule r = by_sum();
  r.keep_top_k = 3;
  RoutedLora soft("q_proj", std::make_shared<SoftRouter>(Linear(rows)), a, b, 2.0);
  Pass pass;
  EXPECT_LT(distance(applied(*part_of(rows, a, b, r), w, x, pass), applied(soft, w, x, pass)), 1e-6);
}

TEST(DynMole, ExpertsThatNobodyChoosesHaveNoGradient) {
  torch::manual_seed(4);
  auto rows = torch::zeros({3, 4});
  rows[0][0] = 3.0;
  rows[1][0] = 2.0;
  auto x = torch::randn({5, 4});
  x.select(1, 0).fill_(1.0);
  const auto a = torch::randn({3, 2, 4}).requires_grad_(), b = torch::randn({3, 5, 2}).requires_grad_();
  Pass pass;
  applied(*part_of(rows, a, b, by_sum()), torch::randn({5, 4}), x, pass).square().sum().backward();
  EXPECT_EQ(a.grad()[2].abs().max().item<double>(), 0.0);
  EXPECT_GT(a.grad()[1].abs().max().item<double>(), 0.0);
}

TEST(DynMole, LossHasTheGradientOfItsFormula) {
  torch::manual_seed(5);
  const auto logits = f64({6, 4});
  EXPECT_LT(gradient_error([&] { return dynmole_loss(logits, DynMoleRule(), 0.3, 0.7).loss; }, logits), 1e-6);
  EXPECT_EQ(dynmole_loss(logits, DynMoleRule(), 0.0, 0.0).loss.item<double>(), 0.0);
}

TEST(DynMole, PaddingDoesNotCountInTheBalance) {
  torch::manual_seed(6);
  const auto logits = torch::randn({6, 4});
  const auto valid = torch::tensor({1, 1, 0, 1, 0, 1}).to(torch::kBool);
  const auto with = dynmole_loss(logits, DynMoleRule(), 1.0, 1.0, valid),
             alone = dynmole_loss(logits.index_select(0, valid.nonzero().squeeze(1)), DynMoleRule(), 1.0, 1.0);
  EXPECT_NEAR(with.balance.item<double>(), alone.balance.item<double>(), 1e-6);
  EXPECT_NEAR(with.entropy.item<double>(), dynmole_loss(logits, DynMoleRule(), 1.0, 1.0).entropy.item<double>(), 1e-6);
  EXPECT_THROW(dynmole_loss(logits, DynMoleRule(), 1.0, 1.0, valid.slice(0, 0, 4)), Error);
}

TEST(DynMole, OneStepMakesTheRouterDecisive) {
  torch::manual_seed(7);
  const auto logits = torch::randn({8, 4}).requires_grad_();
  const auto before = dynmole_loss(logits, DynMoleRule(), 0.0, 1.0);
  before.loss.backward();
  const torch::NoGradGuard frozen;
  EXPECT_LT(dynmole_loss(logits - 0.5 * logits.grad(), DynMoleRule(), 0.0, 1.0).entropy.item<double>(),
            before.entropy.item<double>());
}

TEST(DynMole, AllMatricesOfAModelPool) {
  torch::manual_seed(8);
  const auto model = make_causal(model_with(json::array({dynmole({{"balance_coef", 0.5}, {"entropy_coef", 0.25}})})),
                                 {.trainable = true});
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass);
  std::vector<Tensor> logits;
  for (const auto& r : trace.records) logits.push_back(r.routing.logits);
  ASSERT_EQ(logits.size(), 14u);
  const auto want = dynmole_loss(torch::cat(logits), DynMoleRule(), 0.5, 0.25);
  EXPECT_NEAR(loss_of(pass, "dynmole.balance").item<double>(), 0.5 * want.balance.item<double>(), 1e-5);
  EXPECT_NEAR(loss_of(pass, "dynmole.entropy").item<double>(), 0.25 * want.entropy.item<double>(), 1e-5);
}

TEST(DynMole, BadInputIsAnError) {
  const auto p = torch::full({4}, 0.25);
  EXPECT_THROW(entropy(p, 0.0, 1e-5, true, "tsallis"), Error);
  EXPECT_THROW(entropy(p, 2.1, 1e-5, true, "tsallis"), Error);
  EXPECT_THROW(entropy(p, 1.1, 0.0, true, "tsallis"), Error);
  EXPECT_THROW(entropy(p, 1.1, 1e-5, true, "gini"), Error);
  const auto says = [](const json& more) {
    return message_of([&] { make_causal(model_with(json::array({dynmole(more)}))); });
  };
  EXPECT_NE(says({{"keep_top_k", 5}}).find("keep_top_k is 5, and there are 4 experts"), std::string::npos);
  EXPECT_NE(says({{"keep_top_k", 0}}).find("keep_top_k"), std::string::npos);
  EXPECT_NE(says({{"entropy_index", 1.001}}).find("nearly 1"), std::string::npos);
  EXPECT_NE(says({{"entropy_index", 0.0}}).find("entropy_index"), std::string::npos);
  EXPECT_NE(says({{"entropy_index", 2.5}}).find("entropy_index"), std::string::npos);
  EXPECT_NE(says({{"entropy_eps", 0.0}}).find("entropy_eps"), std::string::npos);
  EXPECT_NE(says({{"entropy_threshold", 0.0}}).find("entropy_threshold"), std::string::npos);
  EXPECT_NE(says({{"top_p", 0.0}}).find("top_p"), std::string::npos);
  EXPECT_NE(says({{"top_p", 1.1}}).find("top_p"), std::string::npos);
  EXPECT_NE(says({{"entropy_type", "gini"}}).find("entropy_type"), std::string::npos);
}

TEST(DynMoleInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(dynmole());
}

TEST(DynMoleInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(dynmole({{"balance_coef", 0.5}, {"dropout", 0.3}}));
}

}  // namespace
}  // namespace moiety
