#include "moiety/moe/moduleformer.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

// The definition, one key after the other from the query's own position backwards.
torch::Tensor naive_weights(const torch::Tensor& q, const torch::Tensor& k) {
  const int64_t time = q.size(0), context = k.size(0);
  auto out = torch::zeros({time, context});
  for (int64_t i = 0; i < time; ++i) {
    double rest = 1.0;
    for (int64_t j = context - time + i; j >= 0; --j) {
      const double l = q[i].dot(k[j]).item<double>() / std::sqrt(static_cast<double>(q.size(1)));
      const double beta = 1.0 / (1.0 + std::exp(-l));
      out[i][j] = beta * rest;
      rest *= 1.0 - beta;
    }
  }
  return out;
}

RC_GTEST_PROP(StickBreaking, EqualsTheDefinition, ()) {
  const auto time = *rc::gen::inRange<int64_t>(1, 6), past = *rc::gen::inRange<int64_t>(0, 5);
  torch::manual_seed(*rc::gen::arbitrary<uint16_t>());
  const auto q = torch::randn({time, 4}), k = 2.0 * torch::randn({past + time, 4}), v = torch::randn({past + time, 4});
  const auto got = stick_breaking_attention(q.view({1, time, 1, 1, 4}), k.view({1, -1, 1, 4}), v.view({1, -1, 1, 4}));
  const auto want = naive_weights(q, k);
  RC_ASSERT(torch::allclose(got.weights[0][0][0], want, 1e-4, 1e-6));
  RC_ASSERT(torch::allclose(got.output.view({time, 4}), want.mm(v), 1e-4, 1e-5));
  RC_ASSERT((got.weights.sum(-1) <= 1.0 + 1e-5).all().item<bool>());
}

TEST(StickBreaking, EvenSticksHalveFromTheQueryOn) {
  const auto zero = torch::zeros({1, 5, 1, 1, 4});
  const auto w =
      stick_breaking_attention(zero, torch::zeros({1, 5, 1, 4}), torch::zeros({1, 5, 1, 4})).weights[0][0][0];
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t s = 0; s <= i; ++s) EXPECT_NEAR(w[i][i - s].item<double>(), std::pow(2.0, -(s + 1.0)), 1e-6);
}

TEST(StickBreaking, MaskedKeysNeitherTakeNorBreak) {
  torch::manual_seed(1);
  const auto q = torch::randn({1, 3, 2, 2, 4}), k = torch::randn({1, 3, 2, 4}), v = torch::randn({1, 3, 2, 4});
  const auto plain = stick_breaking_attention(q, k, v);
  // Two keys in the past that do not count.
  const auto more_k = torch::cat({torch::randn({1, 2, 2, 4}), k}, 1),
             more_v = torch::cat({torch::randn({1, 2, 2, 4}), v}, 1);
  const auto mask = torch::tensor({{0, 0, 1, 1, 1}}).to(torch::kBool);
  EXPECT_LT(distance(stick_breaking_attention(q, more_k, more_v, mask).output, plain.output), 1e-6);
}

TEST(StickBreaking, LongContextsDoNotUnderflowToNan) {
  auto q = torch::full({1, 400, 1, 1, 4}, 5.0).requires_grad_();
  const auto k = torch::full({1, 400, 1, 4}, 5.0);
  const auto r = stick_breaking_attention(q, k, torch::ones({1, 400, 1, 4}));
  r.output.sum().backward();
  EXPECT_TRUE(r.weights.isfinite().all().item<bool>());
  EXPECT_TRUE(q.grad().isfinite().all().item<bool>());
}

ModuleAttention attention_of(int64_t modules, int64_t chosen) {
  ModuleAttention::Parts parts;
  ModuleGate::Weights w;
  w.type = "linear";
  w.w2 = torch::randn({modules, 8});
  parts.gate = std::make_shared<ModuleGate>(w, chosen);
  parts.q = LinearStack(modules, 8, 6);
  parts.o = LinearStack(modules, 6, 8);
  parts.k = Linear(8, 6, true);
  parts.v = Linear(8, 6, true);
  parts.heads = 2;
  return ModuleAttention(std::move(parts));
}

TEST(ModuleAttention, StepsEqualOnePass) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  auto layer = attention_of(5, 2);
  const auto x = torch::randn({2, 7, 8});
  torch::Tensor k, v, sk, sv;
  Pass pass;
  const auto whole = layer.forward(x, k, v, {}, pass);
  std::vector<torch::Tensor> steps;
  for (int64_t t = 0; t < 7; ++t) {
    Pass step;
    steps.push_back(layer.forward(x.narrow(1, t, 1), sk, sv, {}, step));
  }
  EXPECT_LT(distance(torch::cat(steps, 1), whole), 1e-5);
  EXPECT_TRUE(torch::allclose(k, sk) && torch::allclose(v, sv));
}

TEST(ModuleAttention, OneModuleIsPlainAttentionWithGateOne) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  auto layer = attention_of(1, 1);
  const auto x = torch::randn({1, 5, 8});
  torch::Tensor k, v;
  Pass pass;
  const auto y = layer.forward(x, k, v, {}, pass);
  const auto q = torch::linear(x, layer.parts.q->weight[0]);
  const auto heads = [](const torch::Tensor& t) { return t.view({1, 5, 2, 3}); };
  const auto mixed = stick_breaking_attention(q.view({1, 5, 1, 2, 3}), heads(k), heads(v)).output.reshape({1, 5, 6});
  EXPECT_LT(distance(y, torch::linear(mixed, layer.parts.o->weight[0])), 1e-6);
}

TEST(ModuleformerLoss, EndsOfMutualInformation) {
  const int64_t n = 4;
  EXPECT_NEAR(moduleformer_loss("mi", torch::zeros({6, n}), {}, {}).item<double>(), 0.0, 1e-5);
  const auto sure = 60.0 * torch::eye(n).repeat({3, 1});
  EXPECT_NEAR(moduleformer_loss("mi", sure, {}, {}).item<double>(), -std::log(4.0), 1e-5);
  EXPECT_NEAR(moduleformer_loss("concentration", torch::zeros({6, n}), {}, {}).item<double>(), std::log(4.0), 1e-5);
  auto one = torch::zeros({6, n});
  one.select(1, 2).fill_(60.0);
  EXPECT_NEAR(moduleformer_loss("concentration", one, {}, {}).item<double>(), 0.0, 1e-5);
  EXPECT_THROW(moduleformer_loss("entropy", one, {}, {}), Error);
}

TEST(ModuleformerLoss, GradientsEqualFiniteDifferences) {
  torch::manual_seed(4);
  auto logits = torch::randn({5, 4}, torch::kFloat64).requires_grad_();
  const auto choices = torch::randint(0, 4, {5, 2}, torch::kInt64), gates = torch::rand({5, 2}, torch::kFloat64);
  for (const char* kind : {"mi", "switch", "concentration"})
    EXPECT_LT(gradient_error([&] { return moduleformer_loss(kind, logits, choices, gates); }, logits), 1e-7) << kind;
}

TEST(ModuleGate, UnchosenRowsLearnThroughTheSoftmax) {
  torch::manual_seed(5);
  ModuleGate::Weights w;
  w.type = "linear";
  w.w2 = torch::randn({5, 6}).requires_grad_();
  ModuleGate gate(w, 2);
  Pass pass;
  const Routing r = gate.route(torch::randn({1, 6}), pass.at("ffn"), pass);
  EXPECT_LT(r.gates.sum().item<double>(), 1.0);
  r.gates.sum().backward();
  for (int64_t m = 0; m < 5; ++m) EXPECT_GT(w.w2.grad()[m].abs().max().item<double>(), 0.0);
}

TEST(ModuleGate, DrawsTheLastModulesInTraining) {
  torch::manual_seed(6);
  ModuleGate::Weights w;
  w.type = "linear";
  w.w2 = torch::zeros({6, 3});
  ModuleGate gate(w, 3, "", 0.0, 2);
  Pass pass;
  pass.training = true;
  const auto r = gate.route(torch::randn({200, 3}), pass.at("ffn"), pass).experts;
  EXPECT_TRUE((r.select(1, 0) == 0).all().item<bool>());
  const auto drawn = torch::bincount(r.narrow(1, 1, 2).reshape({-1}), {}, 6);
  EXPECT_EQ(drawn[0].item<int64_t>(), 0);
  EXPECT_TRUE((drawn.narrow(0, 1, 5) > 40).all().item<bool>());
}

TEST(ModuleGate, DropsOutInTrainingOnly) {
  torch::manual_seed(8);
  ModuleGate::Weights w;
  w.w1 = torch::randn({64, 6}), w.b1 = torch::randn({64}), w.w2 = torch::randn({4, 64});
  ModuleGate gate(w, 2), plain(w, 2);
  gate.dropout = 0.5;
  const auto x = torch::randn({5, 6});
  EXPECT_GT((gate.logits(x) - plain.logits(x)).abs().max().item<double>(), 1e-3);
  gate.eval();
  EXPECT_TRUE(torch::equal(gate.logits(x), plain.logits(x)));
}

TEST(ModuleGate, TensorsOfAnotherTypeAreErrors) {
  ModuleGate::Weights w;
  w.type = "gmm";
  w.w2 = torch::zeros({4, 3});
  EXPECT_THROW(ModuleGate(w, 2), Error);
  w.type = "linear";
  EXPECT_THROW(ModuleGate(w, 5), Error);
  EXPECT_THROW(ModuleGate(w, 2, "mi", 0.0, 3), Error);
  w.type = "cosine";
  EXPECT_THROW(ModuleGate(w, 2), Error);
}

TEST(ModulePruning, KeepsWhatTokensChoose) {
  auto logits = torch::zeros({10, 4});
  logits.select(1, 0).fill_(2.0);
  logits.select(1, 2).fill_(1.0);
  logits[0][3] = 5.0;
  const auto pruning = module_pruning(logits, 2, 0.2);
  EXPECT_TRUE(torch::allclose(pruning.frequency, torch::tensor({1.0f, 0.0f, 0.9f, 0.1f})));
  EXPECT_TRUE(torch::equal(pruning.keep, torch::tensor({1, 0, 1, 0}).to(torch::kBool)));
  const Routing r = pruned_choice(logits, pruning.keep, 2);
  EXPECT_TRUE(torch::equal(r.experts[1], torch::tensor({0, 1}, torch::kInt64)));
  EXPECT_THROW(pruned_choice(logits, pruning.keep, 3), Error);
  EXPECT_THROW(module_pruning(logits, 2, 1.5), Error);
}

}  // namespace
}  // namespace moiety
