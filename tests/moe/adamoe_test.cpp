#include "moiety/moe/adamoe.h"

#include <gtest/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

AdaMoeConfig config_of(int64_t nulls, int64_t top_k) {
  AdaMoeConfig c;
  c.null_experts = nulls;
  c.top_k = top_k;
  c.coef = 1.0;
  return c;
}

TEST(AdaMoe, WithoutNullExpertsItIsTopKWithGatesThatSumToOne) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  Linear rows(6, 5);
  auto experts = gated_experts(5, 6, 3);
  TopKRouterOptions options;
  options.top_k = 2;
  options.normalize = true;
  Mixture plain(std::make_shared<TopKRouter>(rows, options), experts);
  Mixture none(std::make_shared<NullRouter>(rows, Linear(nullptr), config_of(0, 2)), experts);
  const auto x = torch::randn({2, 7, 6});
  Pass pass;
  EXPECT_LT(distance(plain.forward(x, pass), none.forward(x, pass)), 1e-6);
}

TEST(AdaMoe, ATokenOfNullExpertsOnlyGetsNothing) {
  torch::manual_seed(2);
  Linear rows(torch::zeros({4, 3}).requires_grad_());
  auto experts = gated_experts(4, 3, 2);
  Mixture layer(std::make_shared<NullRouter>(rows, Linear(torch::full({5, 3}, 1e4).requires_grad_()), config_of(5, 3)),
                experts);
  auto x = torch::rand({1, 6, 3}).requires_grad_();
  Pass pass;
  const auto y = layer.forward(x, pass);
  EXPECT_TRUE((y == 0).all().item<bool>());
  y.sum().backward();
  EXPECT_TRUE(x.grad().isfinite().all().item<bool>());
}

TEST(AdaMoe, GatesOfTrueExpertsSumToOneOrToNothing) {
  torch::manual_seed(3);
  const auto choice = adamoe_choose(torch::randn({40, 9}), 4, 3);
  const auto has = (choice.routing.experts >= 0).any(-1);
  EXPECT_TRUE(has.any().item<bool>() && !has.all().item<bool>());
  EXPECT_LT(distance(choice.routing.gates.sum(-1), has.to(torch::kFloat32)), 1e-6);
  EXPECT_TRUE(((choice.routing.experts >= 0) == (choice.slots < 4)).all().item<bool>());
}

TEST(AdaMoe, NullRowsLearnFromTheLossAlone) {
  torch::manual_seed(4);
  Linear gate(3, 4), nulls(3, 4);
  Mixture layer(std::make_shared<NullRouter>(gate, nulls, config_of(4, 3)), gated_experts(4, 3, 2));
  Pass pass;
  pass.training = true;
  const auto y = layer.forward(torch::randn({1, 9, 3}), pass);
  y.square().sum().backward({}, /*retain_graph=*/true);
  EXPECT_TRUE(!nulls->weight.grad().defined() || nulls->weight.grad().abs().max().item<double>() < 1e-7);
  loss_of(pass, "adamoe.balance").backward();
  EXPECT_GT(nulls->weight.grad().abs().max().item<double>(), 1e-4);
}

TEST(AdaMoe, LossAtItsEnds) {
  EXPECT_NEAR(adamoe_balance_loss(torch::zeros({6, 9}), 4, 3).item<double>(), 1.0, 1e-6);
  EXPECT_NEAR(adamoe_pooled_loss(torch::zeros({2, 6, 9}), 4, 3).item<double>(), 3.0, 1e-6);
  // All slots and all mass on the null experts: (n + m) / m.
  auto logits = torch::zeros({6, 9});
  logits.narrow(1, 4, 5).fill_(100.0);
  EXPECT_NEAR(adamoe_balance_loss(logits, 4, 3).item<double>(), 9.0 / 5.0, 1e-5);
  // Null experts are one class: which of them takes the slots is all the same.
  torch::manual_seed(5);
  const auto some = torch::randn({7, 9});
  const auto swapped = torch::cat({some.narrow(1, 0, 4), some.narrow(1, 4, 5).flip(1)}, 1);
  EXPECT_NEAR(adamoe_balance_loss(some, 4, 3).item<double>(), adamoe_balance_loss(swapped, 4, 3).item<double>(), 1e-6);
}

TEST(AdaMoe, AConstantOnAllLogitsChangesNothing) {
  torch::manual_seed(6);
  const auto logits = torch::randn({8, 7}), moved = logits + 3.0 * torch::randn({8, 1});
  EXPECT_TRUE(torch::equal(adamoe_choose(logits, 4, 3).slots, adamoe_choose(moved, 4, 3).slots));
  EXPECT_LT(distance(adamoe_choose(logits, 4, 3).routing.gates, adamoe_choose(moved, 4, 3).routing.gates), 1e-5);
}

TEST(AdaMoe, CopiedRowsLetTrueExpertsWinTheirTies) {
  const auto rows = torch::randn({3, 5}), nulls = null_rows_of(rows, 6);
  EXPECT_TRUE(torch::equal(nulls, torch::cat({rows, rows})));
  const auto own = torch::randn({10, 3});
  const auto choice = adamoe_choose(torch::cat({own, own, own}, 1), 3, 1);
  EXPECT_TRUE((choice.slots < 3).all().item<bool>());
  EXPECT_THROW(null_rows_of(rows, 4), Error);
}

TEST(AdaMoe, ImpossibleSettingsAreErrors) {
  EXPECT_THROW(NullRouter(Linear(3, 4), Linear(3, 2), config_of(2, 7)), Error);
  EXPECT_THROW(NullRouter(Linear(3, 4), Linear(5, 2), config_of(2, 3)), Error);
  auto pooled = config_of(4, 5);
  pooled.variant = "pooled";
  EXPECT_THROW(NullRouter(Linear(3, 4), Linear(3, 4), pooled), Error);
  EXPECT_THROW(parse<AdaMoeConfig>({{"null_experts", -1}}, "run.yaml"), Error);
}

TEST(AdaMoe, LowRankExpertsBesideAFrozenMatrix) {
  torch::manual_seed(7);
  torch::NoGradGuard frozen;
  Linear base(torch::randn({4, 3}));
  LinearStack a(2, 3, 2), b(2, 2, 4);
  const auto router = std::make_shared<NullRouter>(Linear(3, 2), Linear(3, 2), config_of(2, 2));
  const auto x = torch::randn({1, 6, 3});
  Pass pass;
  const Routing r = router->route(x[0], pass.at("q_proj"), pass);
  auto want = base(x[0]);
  for (int64_t t = 0; t < 6; ++t)
    for (int64_t k = 0; k < 2; ++k)
      if (const auto e = r.experts[t][k].item<int64_t>(); e >= 0)
        want[t] += r.gates[t][k] * 2.0 * b->weight[e].mv(a->weight[e].mv(x[0][t]));
  base->attach(std::make_shared<AdaMoeBeside>("q_proj", router, std::make_shared<LoraExperts>(a, b, 2.0)));
  EXPECT_LT(distance(project(base, x, pass)[0], want), 1e-5);
  // The matrix alone is what it was, and nobody can pass by what stands beside it.
  EXPECT_TRUE(torch::equal(base->multiply(x), torch::matmul(x, base->weight.t())));
  EXPECT_THROW(base(x), Error);
  EXPECT_THROW(base->attach(nullptr), Error);
}

}  // namespace
}  // namespace moiety
