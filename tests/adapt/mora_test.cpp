#include "moiety/adapt/mora.h"

#include <gtest/gtest.h>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/models/weights_source.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json mora(const json& more = json::object()) {
  json part = {{"slug", "mora"}, {"rank", 4}, {"top_k", 3}};
  part.update(more);
  return part;
}

MoraConfig config_of(int64_t top_k, double temperature, double threshold = 0.0, double scaling = 1.0) {
  MoraConfig c;
  c.top_k = top_k;
  c.temperature = temperature;
  c.threshold = threshold;
  c.scaling = scaling;
  return c;
}

struct Ranks {
  Tensor old_a = f64({2, 4}), old_b = f64({5, 2}), a = f64({3, 4}), b = f64({5, 3});
  std::shared_ptr<Mora> part(const MoraConfig& c) const {
    return std::make_shared<Mora>("q_proj", old_a, old_b, a, b, c);
  }
};

TEST(Mora, ScoresAreSignedAndOfLengthOne) {
  torch::manual_seed(1);
  const auto z = torch::randn({7, 5});
  const auto choice = mora_choose(z, 3, 0.1, 0.0, true);
  EXPECT_LT(distance(choice.scores.square().sum(-1), torch::ones({7})), 1e-5);
  EXPECT_TRUE(torch::equal(choice.scores < 0, z < 0));
  EXPECT_TRUE(((choice.weights > 0).sum(-1) <= 3).all().item<bool>());
  EXPECT_LT(distance(choice.weights.sum(-1), torch::ones({7})), 1e-5);
  // The largest, not the farthest from zero.
  EXPECT_EQ(mora_choose(torch::tensor({{-9.0, 1.0, 0.5}}), 2, 0.1, 0.0, true).weights[0][0].item<double>(), 0.0);
}

TEST(Mora, AtLeastTwoRanksAndAtMostAll) {
  const auto z = torch::tensor({{3.0, 2.0, 1.0}});
  EXPECT_EQ((mora_choose(z, 1, 10.0, 0.0, true).weights > 0).sum().item<int64_t>(), 2);
  EXPECT_EQ((mora_choose(z, 9, 10.0, 0.0, true).weights > 0).sum().item<int64_t>(), 3);
  // Equal ones: the lower indices.
  EXPECT_EQ(mora_choose(torch::ones({1, 3}), 2, 1.0, 0.0, true).weights[0][2].item<double>(), 0.0);
}

TEST(Mora, LowScoresDoNothingOutsideOfTraining) {
  const auto z = torch::tensor({{3.0, 1.0, -1.0}}, torch::kFloat64);
  const auto training = mora_choose(z, 3, 1.0, 0.5, true).weights, still = mora_choose(z, 3, 1.0, 0.5, false).weights;
  EXPECT_EQ((training > 0).sum().item<int64_t>(), 3);
  EXPECT_EQ(still[0][0].item<double>(), training[0][0].item<double>());
  EXPECT_EQ(still[0][1].item<double>(), 0.0);
  EXPECT_EQ(mora_choose(z, 3, 1.0, 1.1, false).weights.abs().max().item<double>(), 0.0);
  EXPECT_TRUE(torch::equal(mora_choose(z, 3, 1.0, 0.0, false).weights, training));
}

TEST(Mora, EqualsTheFormula) {
  torch::manual_seed(2);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  const auto z = torch::matmul(x, torch::cat({r.old_a, r.a}).t());
  const auto weights = mora_choose(z, 3, 0.3, 0.0, true).weights;
  Pass pass;
  const auto want = torch::matmul(x, w.t()) + torch::matmul((weights * z).slice(1, 0, 2), r.old_b.t()) +
                    0.5 * torch::matmul((weights * z).slice(1, 2, 5), r.b.t());
  EXPECT_LT(distance(applied(*r.part(config_of(3, 0.3, 0.0, 0.5)), w, x, pass), want), 1e-10);
}

TEST(Mora, GradientsEqualCentralDifferencesAndOldRanksHaveNone) {
  torch::manual_seed(3);
  const Ranks r;
  const auto part = r.part(config_of(3, 0.5, 0.0, 0.5));
  const auto w = f64({5, 4}, false), x = f64({4, 4});
  const auto f = [&] {
    Pass pass;
    pass.training = true;
    return applied(*part, w, x, pass).square().sum();
  };
  for (const Tensor& t : {r.a, r.b, x}) EXPECT_LT(gradient_error(f, t), 1e-4);
  EXPECT_FALSE(r.old_a.grad().defined() || r.old_b.grad().defined());
  EXPECT_EQ(part->parameters().size(), 2u);
}

TEST(Mora, ATokenOfZerosIsNoDivisionByZero) {
  torch::manual_seed(4);
  const Ranks r;
  const auto x = torch::zeros({1, 4}, torch::kFloat64).requires_grad_();
  Pass pass;
  pass.training = true;
  const auto y = applied(*r.part(config_of(3, 0.5)), f64({5, 4}, false), x, pass);
  EXPECT_EQ(y.abs().max().item<double>(), 0.0);
  y.sum().backward();
  for (const Tensor& t : {x, r.a, r.b}) EXPECT_TRUE(t.grad().isfinite().all().item<bool>());
  const auto weights = mora_choose(torch::zeros({1, 5}), 3, 0.5, 0.0, true).weights;
  EXPECT_LT(distance(weights, torch::tensor({{1., 1., 1., 0., 0.}}) / 3.0), 1e-6);
}

TEST(Mora, ALongerInputAddsAsMuchMore) {
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto w = torch::zeros({5, 4}, torch::kFloat64), x = f64({7, 4}, false);
  const auto part = r.part(config_of(3, 0.3));
  Pass pass;
  EXPECT_LT(distance(applied(*part, w, 3.0 * x, pass), 3.0 * applied(*part, w, x, pass)), 1e-10);
}

TEST(Mora, HotAndWholeItIsTheMeanOfItsRanks) {
  torch::manual_seed(6);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  const auto product = torch::matmul(torch::cat({r.old_b, r.b}, 1), torch::cat({r.old_a, r.a}));
  Pass pass;
  EXPECT_LT(distance(applied(*r.part(config_of(5, 1e9)), w, x, pass), torch::matmul(x, (w + product / 5.0).t())), 1e-6);
}

TEST(Mora, RanksMayChangePlaces) {
  torch::manual_seed(7);
  const torch::NoGradGuard frozen;
  const Ranks r;
  Ranks other = r;
  const auto order = torch::tensor({2, 0, 1}, torch::kInt64);
  other.a = r.a.index_select(0, order);
  other.b = r.b.index_select(1, order);
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  Pass pass;
  EXPECT_LT(
      distance(applied(*r.part(config_of(3, 0.3)), w, x, pass), applied(*other.part(config_of(3, 0.3)), w, x, pass)),
      1e-10);
}

TEST(Mora, ABlockThatIsFoldedGivesTheSame) {
  torch::manual_seed(8);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto fold = mora_consolidate(r.old_a, r.old_b, r.a, r.b, 2.0, "fold"),
             raw = mora_consolidate(r.old_a, r.old_b, r.a, r.b, 2.0, "raw");
  EXPECT_TRUE(torch::equal(fold.a, torch::cat({r.old_a, r.a})));
  EXPECT_TRUE(torch::equal(fold.b, torch::cat({r.old_b, 2.0 * r.b}, 1)));
  EXPECT_TRUE(torch::equal(raw.b, torch::cat({r.old_b, r.b}, 1)));
  EXPECT_TRUE(torch::equal(mora_consolidate({}, {}, r.a, r.b, 2.0).b, 2.0 * r.b));
  EXPECT_THROW(mora_consolidate({}, {}, r.a, r.b, 2.0, "both"), Error);
  // A new block whose A is orthogonal to the inputs changes nothing, where enough old ranks score above 0.
  const auto w = f64({5, 4}, false);
  auto x = torch::rand({7, 4}, torch::kFloat64);
  x.select(1, 3).zero_();
  auto fresh = torch::zeros({3, 4}, torch::kFloat64);
  fresh.select(1, 3).fill_(1.0);
  const Tensor positive = fold.a.abs();
  Mora before("q", {}, {}, positive, fold.b, config_of(2, 0.3)),
      after("q", positive, fold.b, fresh, torch::zeros({5, 3}, torch::kFloat64), config_of(2, 0.3));
  Pass pass;
  EXPECT_LT(distance(applied(before, w, x, pass), applied(after, w, x, pass)), 1e-10);
}

TEST(Mora, MetricsOfAStream) {
  const auto m = stream_metrics(torch::tensor({{0.9, 0.3, 0.1}, {0.7, 0.8, 0.2}, {0.6, 0.85, 0.7}}, torch::kFloat64));
  EXPECT_EQ(m.transfer_per_task.size(), 2u);
  EXPECT_NEAR(m.transfer_per_task[1], 0.15, 1e-12);
  EXPECT_NEAR(m.transfer, (0.3 + 0.15) / 2.0, 1e-12);
  EXPECT_NEAR(m.average, 5.15 / 9.0, 1e-12);
  EXPECT_NEAR(m.last, 2.15 / 3.0, 1e-12);
  // What got better is no forgetting.
  EXPECT_NEAR(m.bwt, -0.1, 1e-12);
  EXPECT_EQ(stream_metrics(torch::ones({1, 1})).transfer, 0.0);
  EXPECT_THROW(stream_metrics(torch::ones({2, 3})), Error);
}

TEST(Mora, BadInputIsAnError) {
  const auto says = [](const json& more) {
    return message_of([&] { make_causal(model_with(json::array({mora(more)}))); });
  };
  EXPECT_NE(says({{"temperature", 0.0}}).find("temperature"), std::string::npos);
  EXPECT_NE(says({{"threshold", -0.1}}).find("threshold"), std::string::npos);
  EXPECT_NE(says({{"rank", 0}}).find("rank"), std::string::npos);
  EXPECT_NE(says({{"top_k", 0}}).find("top_k"), std::string::npos);
  EXPECT_NE(says({{"old_ranks", 2}}).find("holds none of them"), std::string::npos);
  const auto z = torch::ones({1, 3});
  EXPECT_THROW(mora_choose(z, 2, 0.0, 0.0, true), Error);
  EXPECT_THROW(mora_choose(z, 2, 1.0, -1.0, true), Error);
  EXPECT_THROW(mora_choose(z, 0, 1.0, 0.0, true), Error);
  EXPECT_THROW(Mora("q", torch::zeros({2, 4}), torch::zeros({5, 3}), torch::zeros({1, 4}), torch::zeros({5, 1}),
                    config_of(2, 1.0)),
               Error);
}

TEST(MoraInModel, AFreshAdapterOrAThresholdLeavesTheModelAlone) {
  torch::manual_seed(9);
  const auto ids = torch::arange(18, torch::kInt64).view({2, 9});
  const auto model = make_causal(model_with(json::array({mora({{"threshold", 1.5}})})));
  const auto before = logits_of(*model, ids);
  stir(*model);
  EXPECT_TRUE(torch::equal(logits_of(*model, ids), before));
}

TEST(MoraInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(mora());
}

TEST(MoraInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(mora({{"dropout", 0.3}}));
}

}  // namespace
}  // namespace moiety
