#include "moiety/adapt/flylora.h"

#include <gtest/gtest.h>

#include <cmath>

#include "adapt_tools.h"
#include "message_of.h"
#include "threads.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json fly(const json& more = json::object()) {
  json part = {{"slug", "flylora"}, {"rank", 8}, {"top_k", 2}, {"bias_rate", 0.01}};
  part.update(more);
  return part;
}

FlyLoraConfig config_of(int64_t rank, int64_t top_k, double rate = 0.0, const std::string& select = "signed") {
  FlyLoraConfig c;
  c.rank = rank;
  c.top_k = top_k;
  c.alpha = 12.0;
  c.bias_rate = rate;
  c.select = select;
  return c;
}

struct Ranks {
  Tensor a = f64({6, 4}, false), b = f64({5, 6}), bias = torch::randn({6}, torch::kFloat64) * 0.1;
  std::shared_ptr<FlyLora> part(const FlyLoraConfig& c) const {
    return std::make_shared<FlyLora>("q_proj", a, b, bias.clone(), c);
  }
};

TEST(FlyLora, EveryRowOfAHasTheSameNumberOfNumbers) {
  EXPECT_EQ(fly_nonzeros(64, 8, 2), 16);
  EXPECT_EQ(fly_nonzeros(50, 8, 3), 25);  // 50 div (8 div 3)
  const auto a = fly_projection(8, 64, 2, 23, "q_proj");
  EXPECT_TRUE(((a != 0).sum(1) == 16).all().item<bool>());
  // Deviation 1 / r of 128 draws.
  EXPECT_NEAR(a.masked_select(a != 0).std().item<double>(), 1.0 / 8.0, 0.03);
  EXPECT_THROW(fly_nonzeros(3, 32, 1), Error);
  EXPECT_THROW(fly_nonzeros(64, 8, 9), Error);
}

TEST(FlyLora, AComesFromTheSeedAndThePathAlone) {
  const auto a = fly_projection(8, 64, 2, 23, "layers.0.q_proj");
  torch::manual_seed(99);
  torch::randn({7});
  const test::Threads threads(2);
  EXPECT_TRUE(torch::equal(fly_projection(8, 64, 2, 23, "layers.0.q_proj"), a));
  EXPECT_FALSE(torch::equal(fly_projection(8, 64, 2, 24, "layers.0.q_proj"), a));
  EXPECT_FALSE(torch::equal(fly_projection(8, 64, 2, 23, "layers.1.q_proj"), a));
}

TEST(FlyLora, RowsOfTwoAreNearlyOrthogonal) {
  const int64_t in = 512;
  auto one = fly_projection(32, in, 8, 1, "q"), other = fly_projection(32, in, 8, 2, "q");
  one = one / one.norm(2, 1, true);
  other = other / other.norm(2, 1, true);
  EXPECT_NEAR(torch::matmul(one, other.t()).abs().mean().item<double>(), std::sqrt(2.0 / (M_PI * in)), 0.01);
}

TEST(FlyLora, ChoosesByTheProjectionOrItsSize) {
  const auto a = torch::tensor({{1.0, -5.0, 3.0, 2.0}});
  const auto none = torch::zeros({4});
  EXPECT_TRUE(torch::equal(fly_choose(a, none, 2, "signed"), torch::tensor({{2, 3}})));
  EXPECT_TRUE(torch::equal(fly_choose(a, none, 2, "magnitude"), torch::tensor({{1, 2}})));
  EXPECT_TRUE(torch::equal(fly_choose(a, torch::tensor({9., 0., 0., 0.}), 2, "signed"), torch::tensor({{0, 2}})));
  EXPECT_TRUE(torch::equal(fly_choose(torch::ones({1, 4}), none, 2, "signed"), torch::tensor({{0, 1}})));
  EXPECT_THROW(fly_choose(a, none, 2, "both"), Error);
}

TEST(FlyLora, EqualsTheChosenRanksOneByOne) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  for (const char* select : {"signed", "magnitude"}) {
    const auto z = torch::matmul(x, r.a.t());
    const auto chosen = fly_choose(z, r.bias, 2, select);
    Pass pass;
    const auto got = applied(*r.part(config_of(6, 2, 0.0, select)), w, x, pass);
    for (int64_t n = 0; n < 7; ++n) {
      auto want = w.mv(x[n]);
      // The bias is of the choice alone.
      for (int64_t k = 0; k < 2; ++k) {
        const auto i = chosen[n][k].item<int64_t>();
        want += 12.0 / 6.0 * z[n][i] * r.b.select(1, i);
      }
      EXPECT_LT(distance(got[n], want), 1e-10) << select;
    }
  }
}

TEST(FlyLora, GradientsEqualCentralDifferences) {
  torch::manual_seed(2);
  const Ranks r;
  const auto part = r.part(config_of(6, 2));
  const auto w = f64({5, 4}, false), x = f64({4, 4});
  const auto f = [&] {
    Pass pass;
    return applied(*part, w, x, pass).square().sum();
  };
  for (const Tensor& t : {r.b, x}) EXPECT_LT(gradient_error(f, t), 1e-5);
}

TEST(FlyLora, GradientsThroughAMayBeCut) {
  torch::manual_seed(3);
  const Ranks r;
  auto config = config_of(6, 2);
  config.grad_through_a = false;
  const auto w = f64({5, 4}, false), x = f64({4, 4}), up = f64({4, 5}, false);
  Pass pass;
  (applied(*r.part(config), w, x, pass) * up).sum().backward();
  EXPECT_LT(distance(x.grad(), torch::matmul(up, w)), 1e-12);
  EXPECT_GT(r.b.grad().abs().max().item<double>(), 0.0);
}

TEST(FlyLora, AllRanksArePlainLoraAndMerge) {
  torch::manual_seed(4);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  const auto want = w + 2.0 * torch::matmul(r.b, r.a);
  Pass pass;
  EXPECT_LT(distance(applied(*r.part(config_of(6, 6)), w, x, pass), torch::matmul(x, want.t())), 1e-10);
  EXPECT_LT(distance(r.part(config_of(6, 6))->merged(w.to(torch::kFloat32), 0), want.to(torch::kFloat32)), 1e-5);
  EXPECT_NE(message_of([&] { r.part(config_of(6, 2))->merged(w, 0); }).find("ranks of its own"), std::string::npos);
}

TEST(FlyLora, RanksThatNobodyChoosesHaveNoGradientAndGainBias) {
  torch::manual_seed(5);
  Ranks r;
  r.bias[1] = -100.0;
  const auto part = r.part(config_of(6, 2, 0.5));
  Pass pass;
  pass.training = true;
  applied(*part, f64({5, 4}, false), f64({9, 4}, false), pass).square().sum().backward();
  EXPECT_EQ(r.b.grad().select(1, 1).abs().max().item<double>(), 0.0);
  EXPECT_GT(r.b.grad().abs().max().item<double>(), 0.0);
  EXPECT_NEAR(part->bias()[1].item<double>(), -99.5, 1e-9);
}

TEST(FlyLora, TheBiasMovesInTrainingUnlessToldOtherwise) {
  torch::manual_seed(6);
  const torch::NoGradGuard frozen;
  const Ranks r;
  auto config = config_of(6, 2, 0.1);
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  for (const bool always : {false, true}) {
    config.update_in_eval = always;
    const auto part = r.part(config);
    Pass pass;
    applied(*part, w, x, pass);
    EXPECT_EQ(torch::equal(part->bias(), r.bias), !always);
  }
}

TEST(FlyLora, PaddingDoesNotCount) {
  torch::manual_seed(7);
  const torch::NoGradGuard frozen;
  const Ranks r;
  const auto moved = [&](const Tensor& x, const Tensor& mask) {
    const auto part = r.part(config_of(6, 2, 0.1));
    Pass pass;
    pass.training = true;
    pass.mask = mask;
    applied(*part, f64({5, 4}, false), x, pass);
    return part->bias().clone();
  };
  const auto x = f64({2, 3, 4}, false), padded = torch::cat({x, x.slice(1, 0, 1).expand({2, 4, 4})}, 1);
  auto mask = torch::ones({2, 7}, torch::kBool);
  mask.slice(1, 3, 7).fill_(false);
  EXPECT_TRUE(torch::equal(moved(padded, mask), moved(x, {})));
}

TEST(FlyLora, CopiesOfOneAdapterMergeToIt) {
  torch::manual_seed(8);
  const FlyAdapter one{torch::randn({6, 4}), torch::randn({5, 6}), torch::randn({6}) * 0.1};
  const auto x = torch::randn({7, 4});
  const auto want = fly_delta(x, one, 2, 2.0, "signed");
  EXPECT_LT(distance(fly_stack(x, {one, one, one}, 2, 2.0, "signed"), want), 1e-5);
  EXPECT_LT(distance(fly_delta(x, fly_average({one, one, one}), 2, 2.0, "signed"), want), 1e-5);
}

TEST(FlyLora, AdaptersWithAnotherAAreStackedOnly) {
  torch::manual_seed(9);
  const FlyAdapter one{torch::randn({6, 4}), torch::randn({5, 6}), torch::zeros({6})},
      other{torch::randn({6, 4}), torch::randn({5, 6}), torch::zeros({6})},
      wide{torch::randn({7, 4}), torch::randn({5, 7}), torch::zeros({7})};
  const auto x = torch::randn({7, 4});
  EXPECT_LT(distance(fly_stack(x, {one, other}, 2, 2.0, "signed"),
                     (fly_delta(x, one, 2, 2.0, "signed") + fly_delta(x, other, 2, 2.0, "signed")) / 2.0),
            1e-5);
  EXPECT_NE(message_of([&] { fly_average({one, other}); }).find("A differs"), std::string::npos);
  EXPECT_NE(message_of([&] { fly_average({one, wide}); }).find("shapes differ"), std::string::npos);
  EXPECT_THROW(fly_average({}), Error);
}

TEST(FlyLora, BadSettingsAreErrors) {
  const auto says = [](const json& more) {
    return message_of([&] { make_causal(model_with(json::array({fly(more)}))); });
  };
  EXPECT_NE(says({{"top_k", 9}}).find("top_k is 9, and there are 8 ranks"), std::string::npos);
  EXPECT_NE(says({{"top_k", 1}, {"rank", 64}}).find("would be empty"), std::string::npos);
  EXPECT_NE(says({{"select", "both"}}).find("select"), std::string::npos);
  const Ranks r;
  EXPECT_THROW(FlyLora("q", r.a, r.b, torch::zeros({5}), config_of(6, 2)), Error);
}

TEST(FlyLoraInModel, OnlyBLearns) {
  torch::manual_seed(10);
  const auto model = make_causal(model_with(json::array({fly()})), {.trainable = true});
  for (const auto& p : model->named_parameters())
    if (p.key().find(".adapter") != std::string::npos) {
      EXPECT_NE(p.key().find("lora_B"), std::string::npos) << p.key();
    }
  std::map<std::string, Tensor> before;
  for (const auto& t : model->stored())
    if (t.name.find("lora_A") != std::string::npos) before[t.name] = t.value().clone();
  stir(*model);
  Pass pass;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass).backward();
  for (const auto& t : model->stored())
    if (const auto it = before.find(t.name); it != before.end()) {
      EXPECT_TRUE(torch::equal(t.value(), it->second)) << t.name;
    }
}

TEST(FlyLoraInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(fly());
}

TEST(FlyLoraInModel, GradientsOfBlocksThatRunAgainThoughTheBiasMoves) {
  check_recomputed(fly({{"bias_rate", 0.2}, {"dropout", 0.3}}));
}

}  // namespace
}  // namespace moiety
