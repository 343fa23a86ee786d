#include "moiety/moe/dynamic_routing.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

torch::Tensor counts(const Routing& r) {
  return (r.experts >= 0).sum(-1);
}

RC_GTEST_PROP(TopP, TakesExpertsUntilTheSumPassesP, ()) {
  const auto experts = *rc::gen::inRange<int64_t>(1, 9);
  const double p = *rc::gen::inRange(0, 100) / 100.0;
  torch::manual_seed(*rc::gen::arbitrary<uint16_t>());
  const auto scores = torch::softmax(2.0 * torch::randn({6, experts}), -1);
  const Routing r = top_p_choice(scores, p), more = top_p_choice(scores, std::min(1.0, p + 0.2));
  for (int64_t t = 0; t < 6; ++t) {
    const int64_t n = counts(r)[t].item<int64_t>();
    RC_ASSERT(n >= 1 && n <= experts);
    float before = 0.f, sum = 0.f;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t e = r.experts[t][k].item<int64_t>();
      RC_ASSERT(r.gates[t][k].item<float>() == scores[t][e].item<float>());
      before = sum;
      sum += scores[t][e].item<float>();
    }
    RC_ASSERT(before <= static_cast<float>(p) || n == 1);
    RC_ASSERT(sum > static_cast<float>(p) || n == experts);
    RC_ASSERT(counts(more)[t].item<int64_t>() >= n);
    RC_ASSERT(torch::equal(more.experts[t].narrow(0, 0, n), r.experts[t].narrow(0, 0, n)));
  }
}

TEST(TopP, EvenScoresAndTheEnds) {
  const auto even = torch::full({3, 8}, 0.125);
  EXPECT_TRUE((counts(top_p_choice(even, 0.4)) == 4).all().item<bool>());
  EXPECT_TRUE((counts(top_p_choice(even, 0.0)) == 1).all().item<bool>());
  EXPECT_TRUE((counts(top_p_choice(even, 1.0)) == 8).all().item<bool>());
  EXPECT_TRUE(torch::equal(top_p_choice(even, 0.4).experts[0].narrow(0, 0, 4), torch::arange(4)));
  EXPECT_TRUE((counts(top_p_choice(even, 0.4, 1, 2)) == 2).all().item<bool>());
  EXPECT_TRUE((counts(top_p_choice(even, 0.0, 3)) == 3).all().item<bool>());
  EXPECT_THROW(top_p_choice(even, 1.1), Error);
  EXPECT_THROW(top_p_choice(even, std::nan("")), Error);
  EXPECT_THROW(top_p_choice(even, 0.5, 3, 2), Error);
}

TEST(TopP, FullThresholdIsTheDenseMixture) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  Linear rows(6, 4);
  auto experts = gated_experts(4, 6, 3);
  DynamicRoutingConfig config;
  config.p = 1.0;
  Mixture layer(std::make_shared<TopPRouter>(rows, config), experts);
  TopKRouterOptions all;
  all.top_k = 4;
  Mixture dense(std::make_shared<TopKRouter>(rows, all), experts);
  const auto x = torch::randn({1, 5, 6});
  Pass pass;
  EXPECT_LT(distance(layer.forward(x, pass), dense.forward(x, pass)), 1e-6);
}

TEST(TopP, LossesOfEvenScores) {
  const auto even = torch::full({5, 8}, 0.125);
  const Routing r = top_p_choice(even, 0.4);
  EXPECT_NEAR(dynamic_balance_loss(r.experts, even).item<double>(), 4.0, 1e-6);
  EXPECT_NEAR(entropy_loss(torch::zeros({5, 8})).item<double>(), std::log(8.0), 1e-6);
}

TEST(TopP, GradientsOfTheLossesAreTheClosedForms) {
  torch::manual_seed(2);
  auto logits = torch::randn({6, 5}, torch::kFloat64).requires_grad_();
  const auto p = torch::softmax(logits, -1);
  entropy_loss(logits).backward();
  const auto entropy = -(p * p.log()).sum(-1, true);
  EXPECT_LT(distance(logits.grad(), -p * (p.log() + entropy) / 6.0), 1e-12);
  logits.mutable_grad().reset();
  const Routing r = top_p_choice(torch::softmax(logits, -1), 0.5);
  dynamic_balance_loss(r.experts, r.scores).backward();
  const auto chosen = r.experts.masked_fill(r.experts < 0, 0);
  const auto f = torch::zeros({5}, torch::kFloat64)
                     .index_add(0, chosen.reshape({-1}), (r.experts >= 0).to(torch::kFloat64).reshape({-1})) /
                 6.0;
  EXPECT_LT(distance(logits.grad(), 5.0 / 6.0 * p * (f - (p * f).sum(-1, true))), 1e-12);
}

TEST(TopP, RoutingDoesNotDependOnTheBatch) {
  torch::manual_seed(3);
  TopPRouter router(Linear(6, 5), {});
  const auto x = torch::randn({8, 6});
  Pass pass;
  const Routing all = router.route(x, pass.at("ffn"), pass);
  for (int64_t t = 0; t < 8; ++t) {
    const Routing one = router.route(x.narrow(0, t, 1), pass.at("ffn"), pass);
    EXPECT_TRUE(torch::equal(one.experts[0], all.experts[t]));
  }
}

}  // namespace
}  // namespace moiety
