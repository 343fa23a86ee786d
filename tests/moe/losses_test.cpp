#include "moiety/moe/losses.h"

#include <gtest/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"
#include "moiety/moe/router.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

torch::Tensor choices_of(const torch::Tensor& scores, int64_t k) {
  return top_k(scores, k).second;
}

TEST(BalanceLoss, IsOneWhenScoresAreEven) {
  const auto scores = torch::full({6, 4}, 0.25);
  for (const int64_t k : {1, 2, 3})
    EXPECT_NEAR(balance_loss(load_of(choices_of(scores, k), scores), static_cast<double>(k)).item<double>(), 1.0, 1e-6);
}

TEST(BalanceLoss, IsExpertsOverSlotsWhenOneSetTakesAll) {
  auto scores = torch::zeros({5, 6});
  scores.narrow(1, 0, 2).fill_(0.5);
  EXPECT_NEAR(balance_loss(load_of(choices_of(scores, 2), scores), 2.0).item<double>(), 3.0, 1e-6);
}

TEST(BalanceLoss, PaddingAndEmptySequencesDoNotCount) {
  torch::manual_seed(1);
  const auto scores = torch::softmax(torch::randn({12, 5}), -1);
  const auto choices = choices_of(scores, 2);
  Pass pass;
  pass.batch = 3;
  pass.mask = torch::tensor({1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0}).view({3, 4}).to(torch::kBool);
  const auto loss = balance_loss(load_of(choices, scores, token_groups(pass, 12, true)), 2.0);
  const auto of = [&](int64_t from, int64_t n) {
    return balance_loss(load_of(choices.narrow(0, from, n), scores.narrow(0, from, n)), 2.0).item<double>();
  };
  EXPECT_NEAR(loss.item<double>(), (of(0, 3) + of(4, 4)) / 2.0, 1e-6);
}

TEST(BalanceLoss, PackedSequencesAreGroupsOfTheirOwn) {
  torch::manual_seed(2);
  const auto scores = torch::softmax(torch::randn({8, 4}), -1);
  const auto choices = choices_of(scores, 1);
  Pass pass;
  pass.batch = 1;
  pass.segments = torch::tensor({1, 1, 1, 2, 2, 2, 0, 0}, torch::kInt64).view({1, 8});
  const auto loss = balance_loss(load_of(choices, scores, token_groups(pass, 8, true)), 1.0);
  const auto of = [&](int64_t from, int64_t n) {
    return balance_loss(load_of(choices.narrow(0, from, n), scores.narrow(0, from, n)), 1.0).item<double>();
  };
  EXPECT_NEAR(loss.item<double>(), (of(0, 3) + of(3, 3)) / 2.0, 1e-6);
}

TEST(DeviceBalanceLoss, IsOneForEvenScoresAndEqualGroups) {
  const auto scores = torch::full({6, 6}, 1.0 / 6.0);
  auto choices = torch::arange(6, torch::kInt64).view({6, 1});
  const auto load = load_of(choices, scores);
  EXPECT_NEAR(device_balance_loss(load, 1.0, torch::tensor({0, 1, 2, 0, 1, 2}, torch::kInt64)).item<double>(), 1.0,
              1e-6);
  EXPECT_THROW(device_balance_loss(load, 1.0, torch::tensor({0, 2, 2, 0, 2, 2}, torch::kInt64)), Error);
  EXPECT_THROW(device_balance_loss(load, 1.0, torch::tensor({0, 1}, torch::kInt64)), Error);
}

TEST(Losses, GradientsEqualFiniteDifferences) {
  torch::manual_seed(3);
  auto logits = torch::randn({6, 4}, torch::kFloat64).requires_grad_();
  const auto choices = choices_of(logits.detach(), 2);  // counts are constants
  const auto devices = torch::tensor({0, 1, 1, 0}, torch::kInt64);
  const auto scores = [&] { return torch::softmax(logits, -1); };
  EXPECT_LT(gradient_error([&] { return balance_loss(load_of(choices, scores()), 2.0); }, logits), 1e-8);
  EXPECT_LT(gradient_error([&] { return device_balance_loss(load_of(choices, scores()), 2.0, devices); }, logits),
            1e-8);
  EXPECT_LT(gradient_error([&] { return z_loss(logits); }, logits), 1e-7);
  EXPECT_LT(gradient_error([&] { return entropy_loss(logits); }, logits), 1e-8);
  EXPECT_LT(gradient_error([&] { return pooled_balance_loss(choices, scores()); }, logits), 1e-8);
}

TEST(EntropyLoss, HasFiniteGradientsAtTheEdges) {
  auto logits = torch::zeros({2, 3});
  logits[0][1] = 200.0;
  logits[1][0] = -std::numeric_limits<float>::infinity();
  logits.requires_grad_();
  const auto loss = entropy_loss(logits);
  EXPECT_NEAR(loss.item<double>(), std::log(2.0) / 2.0, 1e-6);
  loss.backward();
  EXPECT_TRUE(logits.grad().isfinite().all().item<bool>());
}

TEST(PooledBalance, PoolsTheSitesOfAPass) {
  torch::manual_seed(4);
  TopKRouterOptions options;
  options.top_k = 2;
  TopKRouter first(Linear(5, 4), options), second(Linear(5, 4), options);
  for (auto* router : {&first, &second}) router->losses.push_back(std::make_shared<PooledBalance>("aux", 0.5));
  const auto x = torch::randn({7, 5}), z = torch::randn({7, 5});
  Pass pass;
  pass.training = true;
  const Routing a = first.route(x, pass.at("ffn"), pass), b = second.route(z, pass.at("ffn"), pass);
  EXPECT_TRUE(pass.losses.empty());
  pass.finish();
  ASSERT_EQ(pass.losses.size(), 1u);
  const auto whole = pooled_balance_loss(torch::cat({a.experts, b.experts}), torch::cat({a.scores, b.scores}));
  EXPECT_NEAR(pass.losses[0].second.item<double>(), 0.5 * whole.item<double>(), 1e-6);
  pass.finish();
  EXPECT_EQ(pass.losses.size(), 1u);
}

TEST(Router, AddsNoLossWithoutTraining) {
  TopKRouterOptions options;
  TopKRouter router(Linear(5, 4), options);
  router.losses.push_back(std::make_shared<ExpertBalance>("balance", 1.0, false));
  Pass pass;
  router.route(torch::randn({3, 5}), pass.at("ffn"), pass);
  EXPECT_TRUE(pass.losses.empty());
}

TEST(ChoiceBias, MovesTowardsTheMeanLoad) {
  auto bias = torch::zeros({4});
  update_choice_bias(bias, torch::tensor({8, 0, 4, 4}, torch::kInt64), 0.001);
  EXPECT_TRUE(torch::allclose(bias, torch::tensor({-0.001f, 0.001f, 0.f, 0.f})));
}

}  // namespace
}  // namespace moiety
