#include "moiety/moe/deepseekmoe.h"

#include <gtest/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

DeepseekMoeConfig small(int64_t experts, int64_t top_k) {
  DeepseekMoeConfig c;
  c.experts = experts;
  c.top_k = top_k;
  c.alpha1 = 0.3;
  return c;
}

TEST(DeepseekMoe, AllExpertsActiveIsTheDenseMixture) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  auto experts = gated_experts(4, 6, 3);
  Linear rows(6, 4);
  const auto shared = std::make_shared<FeedForward>(Linear(6, 5), Linear(6, 5), Linear(5, 6), activation("silu"));
  Mixture layer(deepseek_router(rows, small(4, 4)), experts, shared);
  const auto x = torch::randn({1, 7, 6});
  const auto scores = torch::softmax(rows(x[0]), -1);
  Pass alone;
  auto want = shared->apply(x[0], alone);
  for (int64_t e = 0; e < 4; ++e) {
    std::vector<int64_t> counts(4, 0);
    counts[static_cast<size_t>(e)] = 7;
    want = want + scores.narrow(1, e, 1) * experts->forward(x[0], counts);
  }
  Pass pass;
  EXPECT_LT(distance(layer.forward(x, pass)[0], want), 1e-6);
}

TEST(DeepseekMoe, OneRoutedExpertHasTheWholeGate) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  auto experts = gated_experts(1, 6, 3);
  const auto shared = std::make_shared<FeedForward>(Linear(6, 3), Linear(6, 3), Linear(3, 6), activation("silu"));
  Mixture layer(deepseek_router(Linear(6, 1), small(1, 1)), experts, shared);
  // Together a dense layer of twice the width.
  FeedForward dense{Linear(torch::cat({experts->gate->weight[0], shared->gate->weight})),
                    Linear(torch::cat({experts->up->weight[0], shared->up->weight})),
                    Linear(torch::cat({experts->down->weight[0], shared->down->weight}, 1)), activation("silu")};
  const auto x = torch::randn({2, 5, 6});
  Pass pass;
  EXPECT_LT(distance(layer.forward(x, pass), dense.apply(x, pass)), 1e-5);
}

TEST(DeepseekMoe, PiecesOfAnExpertAddUpToIt) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  auto experts = gated_experts(2, 6, 8);
  const auto units = torch::stack({torch::randperm(8), torch::randperm(8)});
  for (const auto& order : {torch::Tensor(), units}) {
    const auto pieces = segment_experts({experts->gate->weight, experts->up->weight, experts->down->weight}, 4, order);
    GatedExperts fine(LinearStack(pieces.gate), LinearStack(pieces.up), LinearStack(pieces.down), activation("silu"));
    const auto x = torch::randn({5, 6});
    const auto whole = experts->forward(x.repeat({2, 1}), {5, 5});
    const auto parts =
        fine.forward(x.repeat({8, 1}), std::vector<int64_t>(8, 5)).view({2, 4, 5, 6}).sum(1).view({10, 6});
    EXPECT_LT(distance(whole, parts), 1e-5);
  }
  EXPECT_THROW(segment_experts({experts->gate->weight, experts->up->weight, experts->down->weight}, 3), Error);
}

TEST(DeepseekMoe, BalanceLossAtItsEnds) {
  // Even scores: alpha whatever is chosen. All mass on the same K: alpha N / K.
  Pass pass;
  pass.training = true;
  pass.batch = 1;
  auto even = deepseek_router(Linear(torch::zeros({6, 3})), small(6, 2));
  even->route(torch::randn({5, 3}), pass.at("ffn"), pass);
  EXPECT_NEAR(loss_of(pass, "deepseekmoe.expert_balance").item<double>(), 0.3, 1e-6);
  auto weight = torch::zeros({6, 1});
  weight.narrow(0, 0, 2).fill_(100.0);
  auto one = deepseek_router(Linear(weight), small(6, 2));
  Pass again;
  again.training = true;
  again.batch = 1;
  one->route(torch::ones({5, 1}), again.at("ffn"), again);
  EXPECT_NEAR(loss_of(again, "deepseekmoe.expert_balance").item<double>(), 0.3 * 6.0 / 2.0, 1e-5);
}

TEST(DeepseekMoe, UnchosenRowsLearnOnlyWithRawGates) {
  torch::manual_seed(4);
  const auto x = torch::randn({1, 6});
  for (const bool normalized : {false, true}) {
    auto config = small(5, 2);
    config.norm_topk_prob = normalized;
    config.alpha1 = 0.0;
    Linear rows(6, 5);
    const auto router = deepseek_router(rows, config);
    Pass pass;
    const Routing r = router->route(x, pass.at("ffn"), pass);
    (r.gates * torch::tensor({{1.f, -2.f}})).sum().backward();
    auto unchosen = torch::ones({5}, torch::kBool);
    unchosen.index_fill_(0, r.experts[0], false);
    const auto grad = rows->weight.grad().index({unchosen}).abs().max().item<double>();
    if (normalized) {
      EXPECT_LT(grad, 1e-7);
    } else {
      EXPECT_GT(grad, 1e-4);
    }
    if (normalized) {
      EXPECT_NEAR(r.gates.sum().item<double>(), 1.0, 1e-6);
    }
  }
}

TEST(DeepseekMoe, OneSequenceIsTheBatch) {
  torch::manual_seed(5);
  Linear rows(6, 5);
  const auto x = torch::randn({7, 6});
  std::vector<double> values;
  for (const bool sequence : {false, true}) {
    auto config = small(5, 2);
    config.seq_aux = sequence;
    Pass pass;
    pass.training = true;
    pass.batch = 1;
    deepseek_router(rows, config)->route(x, pass.at("ffn"), pass);
    values.push_back(loss_of(pass, "deepseekmoe.expert_balance").item<double>());
  }
  EXPECT_DOUBLE_EQ(values[0], values[1]);
}

TEST(DeepseekMoe, SettingsThatDoNotFitAreErrors) {
  EXPECT_THROW(parse<DeepseekMoeConfig>({{"experts", 4}, {"top_k", 5}}, "run.yaml"), Error);
  EXPECT_THROW(parse<DeepseekMoeConfig>({{"shared", -1}}, "run.yaml"), Error);
  EXPECT_THROW(parse<DeepseekMoeConfig>({{"experts", 8}, {"alpha2", 0.1}, {"device_of_expert", {0, 1}}}, "run.yaml"),
               Error);
  EXPECT_EQ(parse<DeepseekMoeConfig>({{"experts", 8}}, "run.yaml").top_k, 6);
}

}  // namespace
}  // namespace moiety
