#include "moiety/adapt/llava_mole.h"

#include <gtest/gtest.h>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/nn/feed_forward.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json mole(const json& more = json::object()) {
  json part = {{"slug", "llava-mole"},
               {"target", {"gate_proj", "up_proj", "down_proj"}},
               {"experts", 3},
               {"rank", 2},
               {"dropout", 0.0}};
  part.update(more);
  return part;
}

// A gated layer with the parts beside it, in f64, and the formula.
struct Layer {
  static constexpr int64_t d = 4, h = 5, r = 2;
  int64_t experts;
  Tensor rows, bias, wg = f64({h, d}, false), wu = f64({h, d}, false), wd = f64({d, h}, false);
  std::vector<Tensor> a, b;  // gate, up, down
  std::shared_ptr<MoleRouter> router;
  std::shared_ptr<MoleBeside> first, second;

  explicit Layer(int64_t e, bool dense = false, const std::string& weighting = "none", double coef = 0.0)
      : experts(e), rows(f64({e, d})), bias(f64({e})) {
    for (const auto& [out, in] : {std::pair{h, d}, {h, d}, {d, h}}) {
      a.push_back(f64({e, r, in}));
      b.push_back(f64({e, out, r}));
    }
    router = std::make_shared<MoleRouter>(Linear(rows, bias), dense, weighting, coef);
    first = std::make_shared<MoleBeside>(router, true, std::vector{a[0], a[1]}, std::vector{b[0], b[1]}, 2.0);
    second = std::make_shared<MoleBeside>(router, false, std::vector{a[2]}, std::vector{b[2]}, 2.0);
  }
  Tensor operator()(const Tensor& x, Pass& pass) {
    std::vector<Tensor> gu = {torch::matmul(x, wg.t()), torch::matmul(x, wu.t())};
    first->apply(x, gu, pass);
    const auto m = torch::silu(gu[0]) * gu[1];
    std::vector<Tensor> out = {torch::matmul(m, wd.t())};
    second->apply(m, out, pass);
    return out[0];
  }
  // With given weights of experts [..., E].
  Tensor formula(const Tensor& x, const Tensor& weights) const {
    const auto with = [&](const Tensor& w, size_t i, const Tensor& v) {
      auto y = torch::matmul(v, w.t());
      for (int64_t e = 0; e < experts; ++e)
        y = y + 2.0 * weights.select(-1, e).unsqueeze(-1) * torch::matmul(v, torch::matmul(b[i][e], a[i][e]).t());
      return y;
    };
    return with(wd, 2, torch::silu(with(wg, 0, x)) * with(wu, 1, x));
  }
  Tensor p(const Tensor& x) const { return torch::softmax(torch::matmul(x, rows.t()) + bias, -1); }
};

TEST(LlavaMole, OneDecisionForGateUpAndDown) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  Layer layer(3);
  const auto x = f64({2, 6, Layer::d}, false);
  const auto best = layer.p(x).argmax(-1, true);
  const auto one = torch::zeros({2, 6, 3}, torch::kFloat64).scatter_(-1, best, 1.0);
  Pass pass;
  EXPECT_LT(distance(layer(x, pass), layer.formula(x, one)), 1e-10);
  // Which is not the same as one of all tokens.
  EXPECT_GT((one.sum({0, 1}) > 0.0).sum().item<int64_t>(), 1);
}

TEST(LlavaMole, DenseMixesAllByTheirProbabilities) {
  torch::manual_seed(2);
  const torch::NoGradGuard frozen;
  Layer layer(3, true);
  const auto x = f64({2, 3, Layer::d}, false);
  Pass pass;
  EXPECT_LT(distance(layer(x, pass), layer.formula(x, layer.p(x))), 1e-10);
}

TEST(LlavaMole, GradientsEqualCentralDifferences) {
  for (const char* weighting : {"none", "prob"})
    for (const bool dense : {false, true}) {
      torch::manual_seed(3);
      Layer layer(3, dense, weighting);
      const auto x = f64({4, Layer::d});
      const auto f = [&] {
        Pass pass;
        return layer(x, pass).square().sum();
      };
      for (const Tensor& t : {x, layer.rows, layer.bias, layer.a[0], layer.b[0], layer.a[1], layer.a[2], layer.b[2]})
        EXPECT_LT(gradient_error(f, t), 1e-4) << weighting << dense;
    }
}

TEST(LlavaMole, StraightThroughHasTheGradientOfEveryProbability) {
  torch::manual_seed(4);
  Layer layer(3, false, "straight_through");
  const auto x = f64({4, Layer::d}), up = f64({4, Layer::d}, false);
  Pass pass;
  const auto got = torch::autograd::grad({(layer(x, pass) * up).sum()}, {layer.rows, layer.bias});
  const auto p = layer.p(x);
  const auto one = torch::zeros_like(p).scatter(-1, p.argmax(-1, true), 1.0);
  const auto want =
      torch::autograd::grad({(layer.formula(x, one + p - p.detach()) * up).sum()}, {layer.rows, layer.bias});
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_LT(distance(got[i], want[i]), 1e-8);
    EXPECT_GT(want[i].abs().max().item<double>(), 1e-4);
  }
  Layer none(3);
  Pass other;
  none(x, other).sum().backward();
  EXPECT_FALSE(none.rows.grad().defined());
}

TEST(LlavaMole, StraightThroughGivesWhatNoneGives) {
  torch::manual_seed(5);
  const auto p = torch::softmax(torch::randn({7, 4}), -1);
  EXPECT_TRUE(torch::equal(mole_gates(p, false, "none"), mole_gates(p, false, "straight_through")));
  EXPECT_TRUE(torch::equal(mole_gates(p, true, "prob"), p));
  EXPECT_THROW(mole_gates(p, false, "soft"), Error);
  // Equal ones: the lower index.
  EXPECT_EQ(mole_gates(torch::full({1, 4}, 0.25), false, "none").argmax(-1).item<int64_t>(), 0);
}

TEST(LlavaMole, DenseAndSparseAgreeWhereTheRouterIsSure) {
  torch::manual_seed(6);
  const torch::NoGradGuard frozen;
  Layer sparse(3), dense(3, true);
  sparse.rows.mul_(1e4);
  for (const auto& [to, from] : {std::pair{dense.rows, sparse.rows},
                                 {dense.bias, sparse.bias},
                                 {dense.wg, sparse.wg},
                                 {dense.wu, sparse.wu},
                                 {dense.wd, sparse.wd}})
    to.copy_(from);
  for (size_t i = 0; i < 3; ++i) {
    dense.a[i].copy_(sparse.a[i]);
    dense.b[i].copy_(sparse.b[i]);
  }
  const auto x = f64({5, Layer::d}, false);
  Pass one, other;
  EXPECT_LT(distance(sparse(x, one), dense(x, other)), 1e-6);
}

TEST(LlavaMole, TokensDoNotSeeEachOther) {
  torch::manual_seed(7);
  const torch::NoGradGuard frozen;
  Layer layer(3);
  const auto x = f64({5, Layer::d}, false);
  Pass pass;
  const auto together = layer(x, pass);
  for (int64_t t = 0; t < 5; ++t) {
    Pass alone;
    EXPECT_LT(distance(layer(x.slice(0, t, t + 1), alone)[0], together[t]), 1e-10);
  }
}

TEST(LlavaMole, ExpertsThatNobodyChoosesHaveNoGradient) {
  torch::manual_seed(8);
  Layer layer(3);
  {
    const torch::NoGradGuard frozen;
    layer.bias[1] = -1e3;
  }
  Pass pass;
  layer(f64({9, Layer::d}), pass).sum().backward();
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(layer.a[i].grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_GT(layer.a[0].grad().abs().max().item<double>(), 0.0);
}

TEST(LlavaMole, BalanceAtItsEnds) {
  EXPECT_NEAR(mole_balance_loss(torch::full({2, 3, 4, 5}, 0.2), {}).item<double>(), 0.2, 1e-6);
  auto one = torch::zeros({2, 3, 4, 5});
  one.select(-1, 2).fill_(1.0);
  EXPECT_NEAR(mole_balance_loss(one, {}).item<double>(), 1.0, 1e-6);
}

TEST(LlavaMole, BalanceIsOfEverySampleOverAllLayers) {
  torch::manual_seed(9);
  const auto p = torch::softmax(torch::randn({2, 3, 4, 5}), -1);
  double want = 0.0;
  for (int64_t b = 0; b < 3; ++b) {
    const auto rows = p.select(1, b).reshape({-1, 5});
    const auto share = torch::zeros_like(rows).scatter_(1, rows.argmax(-1, true), 1.0).mean(0);
    want += (rows.mean(0) * share).sum().item<double>() / 3.0;
  }
  EXPECT_NEAR(mole_balance_loss(p, {}).item<double>(), want, 1e-6);
}

TEST(LlavaMole, BalanceHasTheGradientOfItsFormula) {
  torch::manual_seed(10);
  const auto logits = f64({2, 2, 3, 4});
  EXPECT_LT(gradient_error([&] { return mole_balance_loss(torch::softmax(logits, -1), {}); }, logits), 1e-7);
}

TEST(LlavaMole, PaddingDoesNotCount) {
  torch::manual_seed(11);
  const auto p = torch::softmax(torch::randn({2, 2, 3, 4}), -1);
  const auto padded = torch::cat({p, torch::softmax(torch::randn({2, 2, 2, 4}), -1)}, 2);
  auto mask = torch::ones({2, 5}, torch::kInt64);
  mask.slice(1, 3, 5).fill_(0);
  EXPECT_NEAR(mole_balance_loss(padded, mask).item<double>(), mole_balance_loss(p, {}).item<double>(), 1e-6);
  mask[1].fill_(0);
  EXPECT_NE(message_of([&] { mole_balance_loss(padded, mask); }).find("no real token"), std::string::npos);
}

TEST(LlavaMole, LayersMayHaveDifferentNumbersOfExperts) {
  torch::manual_seed(12);
  const auto model = make_causal(model_with(json::array({mole({{"layers", 0}, {"coef", 0.1}}),
                                                         mole({{"layers", 1}, {"experts", 2}, {"coef", 0.1}})})),
                                 {.trainable = true});
  Pass pass;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass).backward();
  EXPECT_EQ(pass.losses.size(), 2u);
}

TEST(LlavaMole, StandsBesideAGatedLayerOnly) {
  const auto says = [](const json& part) { return message_of([&] { make_causal(model_with(json::array({part}))); }); };
  EXPECT_NE(says(mole({{"target", "all"}})).find("[gate_proj, up_proj, down_proj]"), std::string::npos);
  EXPECT_NE(says(mole({{"target", {"gate_proj", "down_proj"}}})).find("[gate_proj, up_proj, down_proj]"),
            std::string::npos);
  EXPECT_NE(says(mole({{"target", "down_proj"}})).find("which route, are no targets"), std::string::npos);
  EXPECT_NE(says(mole({{"experts", 0}})).find("experts"), std::string::npos);
  EXPECT_NE(says(mole({{"rank", 0}})).find("rank"), std::string::npos);
  // A plain LoRA may stand beside attention, not beside the same matrices.
  EXPECT_EQ(message_of([&] {
              make_causal(model_with(json::array({mole(), {{"slug", "lora"}, {"target", {"q_proj", "v_proj"}}}})));
            }),
            "");
  EXPECT_NE(message_of([&] {
              make_causal(model_with(json::array({mole(), {{"slug", "lora"}, {"target", "gate_proj"}}})));
            }).find("gate_proj"),
            std::string::npos);
}

TEST(LlavaMoleInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(mole({{"gate_weighting", "straight_through"}}));
}

TEST(LlavaMoleInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(mole({{"gate_weighting", "prob"}, {"coef", 0.5}, {"dropout", 0.3}}));
}

}  // namespace
}  // namespace moiety
