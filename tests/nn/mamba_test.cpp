#include "moiety/nn/mamba.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <map>

#include "adapt/adapt_tools.h"
#include "message_of.h"
#include "moe/moe_tools.h"
#include "moiety/base/error.h"
#include "moiety/decode/session.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr int64_t kHidden = 6, kInner = 10, kRank = 2, kStates = 3, kKernel = 4;

std::shared_ptr<Mamba> layer(torch::ScalarType type = torch::kFloat64, int64_t kernel = kKernel, bool bias = true) {
  const auto t = [&](std::vector<int64_t> shape) {
    return (torch::randn(shape, torch::kFloat64) * 0.5).to(type).requires_grad_();
  };
  Mamba::Parts p;
  p.in = Linear(t({2 * kInner, kHidden}));
  p.conv = t({kInner, 1, kernel});
  if (bias) p.conv_bias = t({kInner});
  p.x = Linear(t({kRank + 2 * kStates, kInner}));
  p.dt = Linear(t({kInner, kRank}), t({kInner}));
  p.out = Linear(t({kHidden, kInner}));
  p.a_log = t({kInner, kStates});
  p.skip = t({kInner});
  return std::make_shared<Mamba>(std::move(p));
}

Tensor run(Mamba& m, const Tensor& x, Pass& pass) {
  const auto positions = torch::arange(x.size(1), torch::kInt64).expand({x.size(0), x.size(1)});
  return m.forward(x, AttentionContext(positions, 0, {}, {}), pass);
}
Tensor run(Mamba& m, const Tensor& x) {
  Pass pass;
  return run(m, x, pass);
}

// One row [T, d] by the definition, a number at a time.
Tensor by_definition(const Mamba& m, const Tensor& x) {
  const auto& p = m.parts;
  const int64_t tokens = x.size(0), kernel = p.conv.size(2);
  const auto xz = torch::matmul(x, p.in->weight.t());
  const auto u = xz.narrow(1, 0, kInner), z = xz.narrow(1, kInner, kInner);
  auto h = torch::zeros({kInner, kStates}, x.options());
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < tokens; ++t) {
    auto c = p.conv_bias.defined() ? p.conv_bias : torch::zeros({kInner}, x.options());
    for (int64_t k = 0; k < kernel; ++k)
      if (t - kernel + 1 + k >= 0) c = c + p.conv.select(2, k).squeeze(1) * u[t - kernel + 1 + k];
    c = torch::silu(c);
    const auto chosen = torch::matmul(p.x->weight, c);
    const auto dt = torch::softplus(torch::matmul(p.dt->weight, chosen.narrow(0, 0, kRank)) + p.dt->bias);
    h = torch::exp(-dt.unsqueeze(1) * p.a_log.exp()) * h +
        (dt * c).unsqueeze(1) * chosen.narrow(0, kRank, kStates).unsqueeze(0);
    const auto y = torch::matmul(h, chosen.narrow(0, kRank + kStates, kStates)) + p.skip * c;
    rows.push_back(torch::matmul(p.out->weight, y * torch::silu(z[t])));
  }
  return torch::stack(rows);
}

TEST(Mamba, IsItsDefinition) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  for (const int64_t kernel : {1, 2, 4}) {
    const auto m = layer(torch::kFloat64, kernel, kernel != 2);
    const auto x = torch::randn({2, 7, kHidden}, torch::kFloat64), y = run(*m, x);
    for (int64_t b = 0; b < 2; ++b) EXPECT_LT(distance(y[b], by_definition(*m, x[b])), 1e-12);
  }
}

TEST(Mamba, GradientsEqualCentralDifferences) {
  torch::manual_seed(2);
  const auto m = layer();
  const auto x = torch::randn({2, 6, kHidden}, torch::kFloat64).requires_grad_();
  Pass pass;
  pass.mask = torch::tensor({{0, 1, 1, 0, 1, 1}, {1, 1, 1, 1, 1, 0}}, torch::kBool);
  const auto f = [&] { return (run(*m, x, pass) * pass.mask.unsqueeze(2)).square().sum(); };
  EXPECT_LT(gradient_error(f, x), 1e-5);
  for (const auto& p : m->named_parameters()) EXPECT_LT(gradient_error(f, p.value()), 1e-5) << p.key();
}

TEST(Mamba, KernelHasTheGradientsOfTheComposite) {
  torch::manual_seed(3);
  const auto wide = layer();
  const auto x = torch::randn({2, 40, kHidden}, torch::kFloat64);
  const auto gradients = [&](torch::ScalarType type) {
    wide->zero_grad();
    wide->to(type);
    std::map<std::string, Tensor> out;
    run(*wide, x.to(type)).square().sum().backward();
    for (const auto& p : wide->named_parameters()) out[p.key()] = p.value().grad().to(torch::kFloat64);
    return out;
  };
  const auto want = gradients(torch::kFloat64), got = gradients(torch::kFloat32);
  for (const auto& [name, g] : want)
    EXPECT_LT(distance(g, got.at(name)), 2e-5 * (1.0 + g.abs().max().item<double>())) << name;
}

// Rows of a mask that has a real token in each.
Tensor some_mask(int64_t batch, int64_t tokens) {
  auto mask = torch::rand({batch, tokens}) > 0.4;
  mask.select(1, static_cast<int64_t>(torch::randint(tokens, {1}).item<int64_t>())).fill_(true);
  return mask;
}

RC_GTEST_PROP(Mamba, PaddingChangesNothing, ()) {
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1 << 20));
  const torch::NoGradGuard frozen;
  const int64_t tokens = *rc::gen::inRange<int64_t>(1, 12);
  const auto m = layer(torch::kFloat64, *rc::gen::inRange<int64_t>(1, 5));
  const auto x = torch::randn({3, tokens, kHidden}, torch::kFloat64);
  Pass pass;
  pass.mask = some_mask(3, tokens);
  // The last row is padded on one side only, as prompts and batches are.
  const auto side = *rc::gen::inRange<int64_t>(0, tokens);
  pass.mask[2].fill_(true);
  if (*rc::gen::arbitrary<bool>())
    pass.mask[2].narrow(0, 0, side).fill_(false);
  else
    pass.mask[2].narrow(0, tokens - side, side).fill_(false);
  KvCache cache(1);
  pass.cache = &cache;
  const auto y = run(*m, x, pass);
  cache.advance(tokens, pass.mask, {});
  const auto held = cache.state(0, 3);
  for (int64_t b = 0; b < 3; ++b) {
    const auto real = pass.mask[b].nonzero().squeeze(1);
    KvCache own(1);
    Pass alone;
    alone.cache = &own;
    const auto want = run(*m, x[b].index_select(0, real).unsqueeze(0), alone);
    own.advance(real.numel(), {}, {});
    RC_ASSERT(distance(y[b].index_select(0, real), want[0]) < 1e-12);
    for (int i = 0; i < 2; ++i)
      if (held[i].numel() > 0) RC_ASSERT(distance(held[i][b], own.state(0, 1)[i][0]) < 1e-12);
  }
}

RC_GTEST_PROP(Mamba, PackedSequencesBeginAnew, ()) {
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1 << 20));
  const torch::NoGradGuard frozen;
  const int64_t first = *rc::gen::inRange<int64_t>(1, 6), second = *rc::gen::inRange<int64_t>(1, 6);
  const auto m = layer();
  const auto x = torch::randn({2, first + second, kHidden}, torch::kFloat64);
  Pass pass;
  pass.segments = torch::cat({torch::zeros({2, first}), torch::ones({2, second})}, 1).to(torch::kInt64);
  if (*rc::gen::arbitrary<bool>()) {
    pass.mask = torch::ones({2, first + second}, torch::kBool);
    if (first > 1) pass.mask.select(1, first - 1).fill_(false);
  }
  const auto y = run(*m, x, pass);
  const int64_t real = pass.mask.defined() && first > 1 ? first - 1 : first;
  RC_ASSERT(distance(y.narrow(1, 0, real), run(*m, x.narrow(1, 0, real))) < 1e-12);
  RC_ASSERT(distance(y.narrow(1, first, second), run(*m, x.narrow(1, first, second))) < 1e-12);
}

TEST(Mamba, ComputesNearlyTheSameInBf16) {
  torch::manual_seed(4);
  const torch::NoGradGuard frozen;
  const auto m = layer(torch::kFloat32), half = layer(torch::kFloat32);
  for (const auto& p : m->named_parameters()) half->named_parameters()[p.key()].copy_(p.value());
  const auto x = torch::randn({2, 20, kHidden});
  const auto want = run(*m, x);
  const auto got = run(*half, x.to(torch::kBFloat16));
  EXPECT_EQ(got.scalar_type(), torch::kBFloat16);
  // Eight bits a number, through four products.
  EXPECT_LT(distance(got.to(torch::kFloat32), want), 0.05 * want.abs().max().item<double>());
}

TEST(Mamba, PartsThatDoNotGoTogetherAreAnError) {
  auto p = layer()->parts;
  p.x = Linear(torch::randn({kRank + 2 * kStates + 1, kInner}));
  EXPECT_NE(message_of([&] { Mamba m(p); }).find("do not go together"), std::string::npos);
}

// ---- In a decoder ----

json mamba_model(const json& settings = json::object(), const json& more = json::object()) {
  json part = {{"slug", "mamba"}};
  part.update(settings);
  return model_with(json::array({part}), more);
}

Tensor forward(CausalModel& model, const Tensor& ids, Pass& pass) {
  const torch::NoGradGuard frozen;
  model.eval();
  return model.forward(ids, pass);
}

TEST(MambaInModel, StartsAsItsAuthorsHaveIt) {
  torch::manual_seed(5);
  const auto model = make_causal(mamba_model(json::object(), {{"hidden_size", 64}}));
  std::map<std::string, Tensor> stored;
  for (const auto& t : model->stored()) stored[t.name] = t.value();
  const std::string at = "model.layers.1.self_attn.";
  const std::map<std::string, std::vector<int64_t>> shapes = {
      {"in_proj.weight", {256, 64}}, {"conv1d.weight", {128, 1, 4}},
      {"conv1d.bias", {128}},        {"x_proj.weight", {36, 128}},
      {"dt_proj.weight", {128, 4}},  {"dt_proj.bias", {128}},
      {"A_log", {128, 16}},          {"D", {128}},
      {"out_proj.weight", {64, 128}}};
  for (const auto& [name, shape] : shapes) EXPECT_EQ(stored.at(at + name).sizes().vec(), shape) << name;
  EXPECT_EQ(stored.count(at + "q_proj.weight"), 0u);
  EXPECT_LT(distance(stored.at(at + "A_log")[7].exp(), torch::arange(1, 17).to(torch::kFloat32)), 1e-5);
  EXPECT_EQ(stored.at(at + "D").min().item<float>(), 1.f);
  const auto steps = torch::softplus(stored.at(at + "dt_proj.bias"));
  EXPECT_GE(steps.min().item<double>(), 0.99e-3);
  EXPECT_LE(steps.max().item<double>(), 0.101);
  EXPECT_LE(stored.at(at + "dt_proj.weight").abs().max().item<double>(), 0.5);
  EXPECT_GT(stored.at(at + "dt_proj.weight").abs().max().item<double>(), 0.45);
}

TEST(MambaInModel, DecodesAsItReads) {
  torch::manual_seed(6);
  const auto model = make_causal(mamba_model());
  model->cache_formats = {Format::Q8_0, Format::F16};  // of keys and values, of which there are none
  const auto ids = torch::randint(0, 40, {3, 11}, torch::kInt64);
  // Padding in front and between pieces.
  auto mask = torch::ones({3, 11}, torch::kBool);
  mask[1].narrow(0, 0, 3).fill_(false);
  mask[2].narrow(0, 5, 2).fill_(false);
  Pass whole;
  whole.mask = mask;
  const auto want = forward(*model, ids, whole);
  for (const auto& pieces : std::vector<std::vector<int64_t>>{{11}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {5, 2, 4}}) {
    auto cache = model->make_cache();
    int64_t at = 0;
    for (const int64_t n : pieces) {
      Pass pass;
      pass.cache = &cache;
      pass.mask = mask.narrow(1, at, n);
      const auto got = forward(*model, ids.narrow(1, at, n), pass), real = pass.mask.unsqueeze(2);
      EXPECT_LT(distance(got * real, want.narrow(1, at, n) * real), 1e-5);
      at += n;
    }
    // Forks go their own way, rows can be chosen and doubled.
    auto fork = cache.fork();
    fork.select(torch::tensor({2, 0, 2}, torch::kInt64));
    const auto next = torch::tensor({{7}, {8}, {9}}, torch::kInt64);
    Pass pass, own;
    pass.cache = &fork;
    const auto got = forward(*model, next, pass);
    own.cache = &cache;
    const auto plain = forward(*model, torch::tensor({{8}, {0}, {7}}, torch::kInt64), own);
    EXPECT_LT(distance(got[0], plain[2]), 1e-5);
    EXPECT_LT(distance(got[1], plain[0]), 1e-5);
  }
}

TEST(MambaInModel, GoesBackToTheLastPassOrToTheStart) {
  torch::manual_seed(7);
  const auto model = make_causal(mamba_model());
  const auto ids = torch::randint(0, 40, {1, 8}, torch::kInt64);
  auto cache = model->make_cache();
  const auto feed = [&](int64_t from, int64_t n) {
    Pass pass;
    pass.cache = &cache;
    return forward(*model, ids.narrow(1, from, n), pass);
  };
  feed(0, 4);
  const auto want = feed(4, 2);
  EXPECT_TRUE(cache.can_crop(4));
  EXPECT_FALSE(cache.can_crop(5));
  EXPECT_NE(message_of([&] { cache.crop(5); }).find("cannot be cropped to 5"), std::string::npos);
  EXPECT_EQ(cache.length(), 6);
  cache.crop(4);
  EXPECT_TRUE(torch::equal(feed(4, 2), want));
  EXPECT_FALSE(cache.can_crop(3));
  // A pass that ended in an error left its states in some layers.
  const auto state = cache.state(0, 1);
  cache.set_state(0, {state[0] + 1, state[1] + 1}, 3);
  const auto after = feed(6, 2);
  cache.crop(0);
  feed(0, 6);
  EXPECT_LT(distance(feed(6, 2), after), 1e-5);
  EXPECT_GT(cache.bytes(), 0);
}

TEST(MambaInModel, SessionsReadAgainWhatTheyCannotGoBackTo) {
  torch::manual_seed(8);
  const std::shared_ptr<CausalModel> model = make_causal(mamba_model());
  model->eval();
  Session session(model, 2), fresh(model);
  session.feed({{1, 2, 3, 4, 5}});
  int64_t reused = -1;
  // All that is there, and more.
  EXPECT_LT(distance(session.restart({{1, 2, 3, 4, 5, 6, 7}}, &reused), fresh.feed({{1, 2, 3, 4, 5, 6, 7}})), 1e-5);
  EXPECT_EQ(reused, 5);
  // Another end: there is no state behind three tokens any more.
  fresh.clear();
  EXPECT_LT(distance(session.restart({{1, 2, 3, 9}}, &reused), fresh.feed({{1, 2, 3, 9}})), 1e-5);
  EXPECT_EQ(reused, 0);
}

TEST(MambaInModel, StandsBesideAttentionOfOtherLayers) {
  torch::manual_seed(9);
  const auto model = make_causal(mamba_model({{"layers", 1}}));
  const auto ids = torch::randint(0, 40, {1, 6}, torch::kInt64);
  Pass whole;
  const auto want = forward(*model, ids, whole);
  auto cache = model->make_cache();
  for (int64_t t = 0; t < 6; ++t) {
    Pass pass;
    pass.cache = &cache;
    EXPECT_LT(distance(forward(*model, ids.narrow(1, t, 1), pass), want.narrow(1, t, 1)), 1e-5);
  }
}

TEST(MambaInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed({{"slug", "mamba"}, {"state", 4}});
}

TEST(MambaInModel, BadSettingsAreErrors) {
  const auto says = [](const json& settings) { return message_of([&] { make_causal(mamba_model(settings)); }); };
  EXPECT_NE(says({{"state", 0}}).find("state"), std::string::npos);
  EXPECT_NE(says({{"state", 257}}).find("state"), std::string::npos);
  EXPECT_NE(says({{"kernel", 0}}).find("kernel"), std::string::npos);
  EXPECT_NE(says({{"expand", 0}}).find("expand"), std::string::npos);
  EXPECT_NE(says({{"rank", -1}}).find("rank"), std::string::npos);
  EXPECT_NE(says({{"dt_min", 0.5}}).find("`dt_min` 0.5 is above `dt_max` 0.1"), std::string::npos);
  EXPECT_NE(says({{"dt_init", "none"}}).find("dt_init"), std::string::npos);
  EXPECT_NE(says({{"site", "ffn"}}).find("cannot stand at the site `ffn`"), std::string::npos);
  EXPECT_EQ(says({{"kernel", 1}, {"conv_bias", false}, {"bias", true}, {"rank", 3}, {"dt_init", "constant"}}), "");
}

}  // namespace
}  // namespace moiety
