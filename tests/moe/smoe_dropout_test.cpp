#include "moiety/moe/smoe_dropout.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

RC_GTEST_PROP(SmoeDropoutSchedule, MovesOneWayBetweenItsEnds, ()) {
  const auto mode =
      *rc::gen::element<std::string>("linear_increase", "linear_decrease", "cosine_increase", "cosine_decrease",
                                     "exp_increase", "multi_step_increase", "multi_step_decrease");
  const auto low = *rc::gen::inRange<int64_t>(1, 8), high = *rc::gen::inRange<int64_t>(low, 17);
  const auto total = *rc::gen::inRange<int64_t>(300, 900);
  const bool up = mode.find("increase") != std::string::npos;
  int64_t before = smoe_dropout_k(mode, low, high, total, 0);
  if (up && mode != "multi_step_increase") RC_ASSERT(before == low);
  for (int64_t s = 1; s <= total; ++s) {
    const int64_t k = smoe_dropout_k(mode, low, high, total, s);
    RC_ASSERT(k >= low && k <= high);
    RC_ASSERT((up ? k >= before : k <= before));
    before = k;
  }
  if (mode.rfind("linear", 0) == 0 || mode.rfind("cosine", 0) == 0) {
    const int64_t end = up ? high : low;
    RC_ASSERT(before == end);
  }
}

TEST(SmoeDropoutSchedule, HalvesRoundToEven) {
  EXPECT_EQ(smoe_dropout_k("linear_increase", 1, 2, 2, 1), 1);  // 0.5 -> 0
  EXPECT_EQ(smoe_dropout_k("linear_increase", 1, 4, 2, 1), 3);  // 1.5 -> 2
  EXPECT_THROW(smoe_dropout_k("linear", 1, 2, 2, 1), Error);
  EXPECT_THROW(smoe_dropout_k("exp_increase", 1, 2, 299, 1), Error);
  EXPECT_THROW(smoe_dropout_k("linear_increase", 3, 2, 2, 1), Error);
}

TEST(FixedRouter, IsNeverTrainedButGradientPassesIt) {
  torch::manual_seed(1);
  Linear rows(6, 5, true);
  FixedRouter router(rows, 3);
  auto x = torch::randn({4, 6}).requires_grad_();
  Pass pass;
  const Routing r = router.route(x, pass.at("ffn"), pass);
  (r.gates * torch::arange(3)).sum().backward();
  EXPECT_GT(x.grad().abs().max().item<double>(), 0.0);
  for (const auto& p : router.parameters()) EXPECT_FALSE(p.requires_grad());
}

TEST(FixedRouter, IsEvaluatedWithAllExperts) {
  FixedRouter router(Linear(6, 5, true), 2);
  router.before_evaluation();
  EXPECT_EQ(router.top_k, 5);
  router.after_evaluation();
  EXPECT_EQ(router.top_k, 2);
}

TEST(FixedRouter, ChoicesAreNestedAndGatesSumToOne) {
  torch::manual_seed(2);
  FixedRouter router(Linear(6, 5, true), 1);
  const auto x = torch::randn({9, 6});
  Pass pass;
  torch::Tensor before;
  for (int64_t k = 1; k <= 5; ++k) {
    router.top_k = k;
    const Routing r = router.route(x, pass.at("ffn"), pass);
    EXPECT_LT(distance(r.gates.sum(-1), torch::ones({9})), 1e-6);
    if (before.defined()) {
      EXPECT_TRUE(torch::equal(r.experts.narrow(1, 0, k - 1), before));
    }
    before = r.experts;
  }
}

TEST(SmoeDropout, OneExpertIgnoresTheRouter) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  auto experts =
      std::make_shared<MlpExperts>(LinearStack(1, 6, 4, true), LinearStack(1, 4, 6, true), activation("relu"));
  Mixture layer(std::make_shared<FixedRouter>(Linear(6, 1, true), 1), experts);
  const auto x = torch::randn({1, 5, 6});
  Pass pass;
  EXPECT_LT(distance(layer.forward(x, pass)[0], experts->forward(x[0], {5})), 1e-6);
}

TEST(Modularize, EvenGatesOverAllExpertsGiveTheDenseLayer) {
  torch::manual_seed(4);
  torch::NoGradGuard frozen;
  const MlpTensors dense{torch::randn({12, 5}), torch::randn({12}), torch::randn({5, 12}), torch::randn({5})};
  const auto x = torch::randn({7, 5});
  const auto want = torch::linear(torch::relu(torch::linear(x, dense.w1, dense.b1)), dense.w2, dense.b2);
  for (const bool rescale : {true, false}) {
    const auto t = modularize(dense, 4, rescale);
    Mixture layer(std::make_shared<FixedRouter>(Linear(torch::zeros({4, 5}), torch::zeros({4})), 4),
                  std::make_shared<MlpExperts>(LinearStack(t.w1, t.b1), LinearStack(t.w2, t.b2), activation("relu")));
    Pass pass;
    const auto y = layer.forward(x.unsqueeze(0), pass)[0];
    EXPECT_LT(distance(y, rescale ? want : (want - dense.b2) / 4.0 + dense.b2), 1e-5);
  }
  EXPECT_THROW(modularize(dense, 5, true), Error);
}

TEST(SmoeDropout, ExpertsThatNobodyChoseGetNoGradient) {
  torch::manual_seed(5);
  LinearStack w1(6, 4, 3, true), w2(6, 3, 4, true);
  Mixture layer(std::make_shared<FixedRouter>(Linear(4, 6, true), 2),
                std::make_shared<MlpExperts>(w1, w2, activation("relu")));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto grad = torch::randn({1, 2, 4});
  layer.forward(torch::randn({1, 2, 4}), pass).backward(grad);
  const Routing& r = trace.records[0].routing;
  for (int64_t e = 0; e < 6; ++e) {
    auto want = torch::zeros({4});
    for (int64_t t = 0; t < 2; ++t)
      for (int64_t k = 0; k < 2; ++k)
        if (r.experts[t][k].item<int64_t>() == e) want += r.gates[t][k] * grad[0][t];
    EXPECT_LT(distance(w2->bias.grad()[e], want), 1e-6);
    if ((r.experts != e).all().item<bool>()) {
      EXPECT_EQ(w1->weight.grad()[e].abs().max().item<double>(), 0.0);
    }
  }
}

}  // namespace
}  // namespace moiety
