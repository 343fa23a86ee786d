#include "moiety/adapt/mola.h"

#include <gtest/gtest.h>

#include <numeric>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/lora.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json mola(const json& more = json::object()) {
  json part = {{"slug", "mola"}, {"experts", 3}, {"top_k", 2}, {"rank", 2}, {"dropout", 0.0}};
  part.update(more);
  return part;
}

TEST(Mola, EqualsTheChosenExpertsOneByOne) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const auto w = f64({5, 4}, false), rows = f64({3, 4}, false), a = f64({3, 2, 4}, false), b = f64({3, 5, 2}, false),
             x = f64({7, 4}, false);
  RoutedLora part("q_proj", mola_router(Linear(rows), 2, 0.0), a, b, 1.5);
  Pass pass;
  const auto got = applied(part, w, x, pass);
  const auto p = torch::softmax(torch::matmul(x, rows.t()), -1);
  for (int64_t n = 0; n < 7; ++n) {
    const auto [value, index] = p[n].topk(2);
    auto want = w.mv(x[n]);
    for (int64_t k = 0; k < 2; ++k)
      want += 1.5 * value[k] / value.sum() * b[index[k].item<int64_t>()].mv(a[index[k].item<int64_t>()].mv(x[n]));
    EXPECT_LT(distance(got[n], want), 1e-6) << n;
  }
}

// The router computes in f32, too coarse for differences: against the formula in torch.
TEST(Mola, GradientsEqualThoseOfTheFormula) {
  torch::manual_seed(2);
  const auto w = f64({5, 4}, false), rows = f64({3, 4}), a = f64({3, 2, 4}), b = f64({3, 5, 2}), x = f64({4, 4});
  RoutedLora part("q_proj", mola_router(Linear(rows), 2, 0.0), a, b, 1.5);
  Pass pass;
  const auto y = applied(part, w, x, pass);
  const auto p = torch::softmax(torch::matmul(x, rows.t()), -1);
  const auto kept = torch::zeros_like(p).scatter(-1, std::get<1>(p.topk(2)), 1.0) * p;
  auto want = torch::matmul(x, w.t());
  for (int64_t e = 0; e < 3; ++e)
    want =
        want + 1.5 * (kept.select(1, e) / kept.sum(-1)).unsqueeze(1) * torch::matmul(x, torch::matmul(b[e], a[e]).t());
  const auto up = f64({4, 5}, false);
  const auto got = torch::autograd::grad({(y * up).sum()}, {rows, a, b, x}),
             wanted = torch::autograd::grad({(want * up).sum()}, {rows, a, b, x});
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(distance(got[i], wanted[i]), 1e-4) << i;
}

TEST(Mola, AtTheStartOnlyBHasAGradient) {
  torch::manual_seed(3);
  const auto model = make_causal(model_with(json::array({mola()})), {.trainable = true});
  Pass pass;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass).backward();
  for (const auto& p : model->named_parameters()) {
    if (p.key().find("adapter") == std::string::npos) continue;
    const double most = p.value().grad().abs().max().item<double>();
    EXPECT_EQ(most > 0.0, p.key().find("lora_B") != std::string::npos) << p.key() << " " << most;
  }
}

TEST(Mola, OneExpertIsPlainLora) {
  torch::manual_seed(4);
  const auto w = torch::randn({5, 4}), a = torch::randn({1, 2, 4}), b = torch::randn({1, 5, 2}),
             x = torch::randn({6, 4});
  const auto rows = torch::randn({1, 4}).requires_grad_();
  RoutedLora part("q_proj", mola_router(Linear(rows), 1, 0.0), a, b, 1.5);
  Lora plain(a[0], b[0], 1.5);
  Pass pass;
  const auto y = applied(part, w, x, pass);
  EXPECT_LT(distance(y, applied(plain, w, x, pass)), 1e-5);
  y.square().sum().backward();
  EXPECT_LT(rows.grad().abs().max().item<double>(), 1e-6);
  EXPECT_LT(distance(part.merged(w, 0), plain.merged(w, 0)), 1e-6);
}

TEST(Mola, ExpertsMayChangePlaces) {
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  const auto w = torch::randn({5, 4}), rows = torch::randn({4, 4}), a = torch::randn({4, 2, 4}),
             b = torch::randn({4, 5, 2}), x = torch::randn({6, 4});
  const auto order = torch::tensor({2, 0, 3, 1}, torch::kInt64);
  RoutedLora one("q_proj", mola_router(Linear(rows), 2, 0.0), a, b, 1.0),
      other("q_proj", mola_router(Linear(rows.index_select(0, order)), 2, 0.0), a.index_select(0, order),
            b.index_select(0, order), 1.0);
  Pass pass;
  EXPECT_LT(distance(applied(one, w, x, pass), applied(other, w, x, pass)), 1e-5);
}

TEST(Mola, ExpertsThatNobodyChoosesHaveNoGradient) {
  torch::manual_seed(6);
  auto rows = torch::randn({3, 4});
  rows[1].fill_(0.0);
  const auto a = torch::randn({3, 2, 4}).requires_grad_(), b = torch::randn({3, 5, 2}).requires_grad_();
  // Logits 1, 0 and 2 on every token.
  rows.zero_();
  rows[0][0] = 1.0;
  rows[2][0] = 2.0;
  auto x = torch::randn({6, 4});
  x.select(1, 0).fill_(1.0);
  RoutedLora part("q_proj", mola_router(Linear(rows), 2, 0.0), a, b, 1.0);
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  applied(part, torch::randn({5, 4}), x, pass).square().sum().backward();
  EXPECT_EQ(a.grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_EQ(b.grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_GT(a.grad()[0].abs().max().item<double>(), 0.0);
  EXPECT_EQ(trace.records.at(0).routing.experts.size(1), 2);
  EXPECT_LT(distance(trace.records.at(0).routing.gates.sum(-1), torch::ones({6})), 1e-6);
}

TEST(Mola, BalanceAtItsEnds) {
  EXPECT_NEAR(mola_balance_loss(torch::zeros({6, 5}), 2).item<double>(), 1.0, 1e-6);
  auto one = torch::zeros({6, 5});
  one.select(1, 3).fill_(100.0);
  EXPECT_NEAR(mola_balance_loss(one, 1).item<double>(), 5.0, 1e-5);
}

TEST(Mola, CountsOfTheBalanceHaveNoGradient) {
  torch::manual_seed(7);
  const auto logits = f64({6, 4});
  EXPECT_LT(gradient_error([&] { return mola_balance_loss(logits, 2); }, logits), 1e-7);
}

TEST(Mola, PaddingDoesNotCount) {
  torch::manual_seed(8);
  const auto logits = torch::randn({6, 4});
  const auto real = torch::tensor({1, 1, 0, 1, 0, 0}).to(torch::kBool);
  const auto kept = logits.index_select(0, real.nonzero().squeeze(1));
  EXPECT_NEAR(mola_balance_loss(logits, 2, real).item<double>(), mola_balance_loss(kept, 2).item<double>(), 1e-6);
}

TEST(Mola, LayersAreAddedUpAndTheirMatricesPooled) {
  torch::manual_seed(9);
  const auto model = make_causal(model_with(json::array({mola({{"coef", 0.5}, {"experts", {2, 3}}, {"top_k", 1}})})),
                                 {.trainable = true});
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  pass.mask = torch::ones({2, 6}, torch::kBool);
  pass.mask[1].slice(0, 4, 6).fill_(false);
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass);
  double want = 0.0;
  for (const int64_t layer : {0, 1}) {
    std::vector<Tensor> logits;
    for (const auto& r : trace.records)
      if (r.site.block == layer)
        logits.push_back(r.routing.logits.index_select(0, pass.mask.flatten().nonzero().squeeze(1)));
    ASSERT_EQ(logits.size(), 7u);
    want += 0.5 * mola_balance_loss(torch::cat(logits), 1).item<double>();
  }
  EXPECT_NEAR(loss_of(pass, "mola.balance").item<double>(), want, 1e-5);
}

TEST(Mola, MatricesOfOneLayerMayHaveDifferentNumbersOfExperts) {
  torch::manual_seed(10);
  const auto model =
      make_causal(model_with(json::array({mola({{"coef", 0.5}, {"target", "q_proj"}}),
                                          mola({{"coef", 0.5}, {"target", "v_proj"}, {"experts", 4}, {"top_k", 1}})})),
                  {.trainable = true});
  Pass pass;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass).backward();
  EXPECT_EQ(pass.losses.size(), 4u);
}

TEST(Mola, GivesHigherLayersMore) {
  EXPECT_EQ(mola_allocation({2, 4, 6, 8}, 8), (std::vector<int64_t>{2, 2, 4, 4, 6, 6, 8, 8}));
  EXPECT_EQ(mola_allocation({2, 4, 6, 8}, 6), (std::vector<int64_t>{2, 2, 4, 6, 6, 8}));
  for (const auto& pattern : {std::vector<int64_t>{2, 4, 6, 8}, {8, 6, 4, 2}, {8, 2, 2, 8}, {5, 5, 5, 5}}) {
    const auto of = mola_allocation(pattern, 12);
    EXPECT_EQ(std::accumulate(of.begin(), of.end(), int64_t{0}), 60);
  }
  EXPECT_THROW(mola_allocation({}, 4), Error);
  EXPECT_THROW(mola_allocation({1, 2, 3}, 2), Error);
  EXPECT_THROW(mola_allocation({2, 0}, 2), Error);
}

TEST(Mola, PatternsBecomeNumbersOfLayers) {
  auto part = mola({{"pattern", {2, 5}}});
  part.erase("experts");
  std::vector<int64_t> rows;
  for (const auto& t : make_causal(model_with(json::array({part})))->stored())
    if (t.name.find("q_proj.router.weight") != std::string::npos) rows.push_back(t.value().size(0));
  EXPECT_EQ(rows, (std::vector<int64_t>{2, 5}));
}

TEST(Mola, BadSettingsAreErrors) {
  const auto says = [](const json& part) { return message_of([&] { make_causal(model_with(json::array({part}))); }); };
  EXPECT_NE(says(mola({{"experts", {2, 2, 2}}})).find("`experts` has 3 entries, and the model has 2 layers"),
            std::string::npos);
  EXPECT_NE(says(mola({{"top_k", 4}})).find("`top_k` is 4, and the layer has 3 experts"), std::string::npos);
  EXPECT_NE(says(mola({{"top_k", 0}})).find("top_k"), std::string::npos);
  EXPECT_NE(says(mola({{"rank", 0}})).find("rank"), std::string::npos);
  EXPECT_NE(says(mola({{"pattern", {2, 2}}})).find("exclude each other"), std::string::npos);
  EXPECT_NE(says(mola({{"coef", -1.0}})).find("coef"), std::string::npos);
  EXPECT_THROW(
      RoutedLora("q", mola_router(Linear(4, 3), 2, 0.0), torch::zeros({2, 2, 4}), torch::zeros({2, 5, 2}), 1.0), Error);
}

TEST(MolaInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(mola({{"coef", 0.01}}));
}

TEST(MolaInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(mola({{"coef", 0.1}, {"dropout", 0.3}}));
}

}  // namespace
}  // namespace moiety
