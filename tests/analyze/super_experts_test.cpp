#include "moiety/analyze/super_experts.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "message_of.h"
#include "moe/moe_tools.h"
#include "moiety/compress/prune_experts.h"
#include "moiety/models/decoder.h"
#include "moiety/models/layer_walk.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr int64_t kExperts = 5, kHidden = 6, kWidth = 4;

// A mixture layer whose experts are watched.
struct Watched {
  std::shared_ptr<GatedExperts> experts = gated_experts(kExperts, kHidden, kWidth);
  std::shared_ptr<Mixture> mixture;
  std::shared_ptr<ExpertMaxima> maxima = std::make_shared<ExpertMaxima>(kExperts, "layer 3");

  explicit Watched(int64_t top_k = 2, bool normalize = false, bool watch = true) {
    TopKRouterOptions options;
    options.top_k = top_k;
    options.normalize = normalize;
    mixture = std::make_shared<Mixture>(std::make_shared<TopKRouter>(Linear(kHidden, kExperts), options), experts);
    if (watch) experts->down->attach(std::make_shared<ExpertWatch>(maxima));
  }
  Tensor run(const Tensor& x) const {
    const torch::NoGradGuard frozen;
    Pass pass;
    return mixture->forward(x, pass);
  }
};

// The same layer with a counter of its own.
Watched again(const Watched& w, int64_t top_k = 2) {
  Watched other(top_k);
  const torch::NoGradGuard frozen;
  for (const auto& p : w.mixture->named_parameters()) other.mixture->named_parameters()[p.key()].copy_(p.value());
  return other;
}

TEST(ExpertMaxima, AreTakenBeforeTheGateOfRoutedTokensOnly) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const Watched w;
  const auto x = torch::randn({1, 9, kHidden});
  w.run(x);
  Pass pass;
  const Routing r = w.mixture->router->route(x[0], {}, pass);
  for (int64_t e = 0; e < kExperts; ++e) {
    const auto routed = (r.experts == e).any(1).nonzero().squeeze(1);
    ASSERT_EQ(w.maxima->tokens[e].item<int64_t>(), routed.numel());
    if (routed.numel() == 0) continue;
    const auto rows = x[0].index_select(0, routed);
    const auto z = torch::silu(rows.matmul(w.experts->gate->weight[e].t())) * rows.matmul(w.experts->up->weight[e].t());
    const auto o = z.matmul(w.experts->down->weight[e].t());
    EXPECT_NEAR(w.maxima->output_max[e].item<double>(), o.abs().max().item<double>(), 1e-6);
    EXPECT_NEAR(w.maxima->input_max[e].item<double>(), z.abs().max().item<double>(), 1e-6);
    EXPECT_EQ(w.maxima->output_channel[e].item<int64_t>(), o.abs().argmax().item<int64_t>() % kHidden);
  }
}

TEST(ExpertMaxima, ScaleWithTheDownProjectionOfTheirExpertAlone) {
  torch::manual_seed(2);
  const Watched w;
  const auto x = torch::randn({1, 20, kHidden});
  w.run(x);
  const Watched other = again(w);
  {
    const torch::NoGradGuard frozen;
    other.experts->down->weight[2].mul_(-4.0);
  }
  other.run(x);
  auto want = w.maxima->output_max.clone();
  want[2] *= 4.0;
  EXPECT_TRUE(torch::equal(other.maxima->output_max, want));
  EXPECT_TRUE(torch::equal(other.maxima->input_max, w.maxima->input_max));
}

TEST(ExpertMaxima, DoNotDependOnTheOrderOfTokensOrOnBatches) {
  torch::manual_seed(3);
  const Watched whole;
  const auto x = torch::randn({1, 12, kHidden});
  whole.run(x);
  const Watched turned = again(whole), split = again(whole);
  turned.run(x.flip(1));
  split.run(x.narrow(1, 0, 5));
  split.run(x.narrow(1, 5, 7));
  for (const Watched* w : {&turned, &split}) {
    EXPECT_LT(distance(w->maxima->output_max, whole.maxima->output_max), 1e-6);
    EXPECT_TRUE(torch::equal(w->maxima->output_channel, whole.maxima->output_channel));
    EXPECT_TRUE(torch::equal(w->maxima->tokens, whole.maxima->tokens));
  }
}

TEST(ExpertMaxima, KeepTheLargestOfAllCallsAndTheFirstOfEquals) {
  ExpertMaxima m(3);
  const auto z = torch::ones({2, 2});
  m.add(1, z, torch::tensor({{1.f, -2.f}, {0.f, 1.f}}));
  EXPECT_EQ(m.latest[1], 0);
  m.add(1, z, torch::tensor({{0.5f, 1.f}, {-7.f, 7.f}}));
  EXPECT_EQ(m.latest[1], 1);
  m.add(1, z, torch::tensor({{0.f, 7.f}, {0.f, 0.f}}));
  EXPECT_EQ(m.output_max[1].item<double>(), 7.0);
  EXPECT_EQ(m.output_channel[1].item<int64_t>(), 0);
  EXPECT_EQ(m.tokens[1].item<int64_t>(), 6);
  // No token: no channel, and nothing that is not a number.
  m.add(0, torch::empty({0, 2}), torch::empty({0, 2}));
  EXPECT_EQ(m.output_max[0].item<double>(), 0.0);
  EXPECT_EQ(m.output_channel[0].item<int64_t>(), -1);
  // A silent expert has seen tokens.
  m.add(2, z, torch::zeros({2, 2}));
  EXPECT_EQ(m.output_channel[2].item<int64_t>(), 0);
}

TEST(ExpertMaxima, RefuseWhatIsNotFinite) {
  ExpertMaxima m(2, "layer 3");
  const auto bad = torch::full({1, 2}, std::numeric_limits<float>::quiet_NaN());
  EXPECT_NE(message_of([&] { m.add(1, torch::ones({1, 2}), bad); }).find("layer 3, expert 1"), std::string::npos);
}

SuperExpertRule rule_of(double quantile, double times = 10.0) {
  SuperExpertRule r;
  r.quantile = quantile;
  r.times = times;
  return r;
}

std::vector<std::pair<int64_t, int64_t>> places(const SuperExperts& s) {
  std::vector<std::pair<int64_t, int64_t>> out;
  for (const auto& one : s.found) out.emplace_back(one.layer, one.expert);
  return out;
}
using Places = std::vector<std::pair<int64_t, int64_t>>;

std::vector<int64_t> up_to(int64_t n) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(i);
  return out;
}

TEST(IncludedLayers, AreRoundedHalfToEven) {
  EXPECT_EQ(included_layers(30, 0.75, up_to(30)).size(), 22u);
  EXPECT_EQ(included_layers(14, 0.75, up_to(14)).size(), 10u);
  EXPECT_EQ(included_layers(26, 0.75, up_to(26)).size(), 20u);
  EXPECT_EQ(included_layers(8, 1.0, {1, 3, 7}), (std::vector<int64_t>{1, 3, 7}));
  EXPECT_THROW(included_layers(8, 0.0, up_to(8)), Error);
  EXPECT_THROW(included_layers(8, 1.1, up_to(8)), Error);
}

TEST(GrowingLayers, AreThoseBehindWhichTheStreamIsFiveTimesAsLarge) {
  EXPECT_EQ(growing_layers({1.0, 5.0, 24.9, 200.0, 10.0}, {0, 1, 2, 3}), (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(growing_layers({1.0, 5.0, 24.9, 200.0, 10.0}, {1, 2}), (std::vector<int64_t>{2}));
}

Tensor table_of(int64_t layers, int64_t experts) {
  torch::manual_seed(4);
  return torch::rand({layers, experts}, torch::kFloat64) + 0.5;
}

TEST(FindSuperExperts, LooksAtTheNamedLayersOnly) {
  auto a = table_of(8, 10);
  a[1][4] = 90.0;
  a[3][0] = 20.0;
  a[7][2] = 5000.0;  // the last layers destroy massive activations
  const auto found = find_super_experts(a, up_to(6), rule_of(95.0));
  EXPECT_EQ(places(found), (Places{{1, 4}, {3, 0}}));
  EXPECT_DOUBLE_EQ(found.limit, 9.0);
  auto whole = rule_of(95.0);
  whole.scope = "model";
  EXPECT_TRUE(find_super_experts(a, up_to(6), whole).found.empty());
}

TEST(FindSuperExperts, LeavesOutLayersWithoutExperts) {
  auto a = table_of(4, 4);
  a[2][1] = 50.0;
  const auto whole = find_super_experts(a, {1, 2, 3}, rule_of(80.0));
  // Zeros that stand for no expert would lower the percentile.
  auto dense = a.clone();
  dense[0].fill_(std::numeric_limits<double>::quiet_NaN());
  auto model = rule_of(80.0);
  model.scope = "model";
  EXPECT_DOUBLE_EQ(find_super_experts(dense, {1, 2, 3}, model).percentile, whole.percentile);
  EXPECT_NE(message_of([&] { find_super_experts(dense, {0}, rule_of(80.0)); }).find("nothing to find"),
            std::string::npos);
}

TEST(FindSuperExperts, InterpolatesThePercentile) {
  const auto a = torch::tensor({{1.0, 2.0, 3.0, 10.0}}, torch::kFloat64);
  EXPECT_NEAR(find_super_experts(a, {0}, rule_of(90.0)).percentile, 3.0 + 0.7 * 7.0, 1e-12);
}

TEST(FindSuperExperts, BothTestsAreStrict) {
  const auto equal = torch::full({3, 4}, 2.0, torch::kFloat64);
  EXPECT_TRUE(find_super_experts(equal, up_to(3), rule_of(99.5)).found.empty());
  // 4 is exactly the largest over 10.
  const auto a = torch::tensor({{0.0, 0.0, 4.0, 40.0}}, torch::kFloat64);
  EXPECT_EQ(places(find_super_experts(a, {0}, rule_of(40.0))), (Places{{0, 3}}));
  EXPECT_EQ(places(find_super_experts(a, {0}, rule_of(40.0, 10.1))), (Places{{0, 3}, {0, 2}}));
}

TEST(FindSuperExperts, FloorIsVacuousForSmallValues) {
  const auto a = torch::tensor({{0.1, 0.2, 0.3, 9.0}}, torch::kFloat64);
  auto rule = rule_of(40.0);
  EXPECT_EQ(find_super_experts(a, {0}, rule).found.size(), 1u);
  rule.floor = true;
  const auto found = find_super_experts(a, {0}, rule);
  EXPECT_EQ(found.limit, 0.0);
  EXPECT_EQ(places(found), (Places{{0, 3}, {0, 2}}));
}

TEST(FindSuperExperts, NumbersTheSharedExpertApart) {
  auto a = table_of(4, 5);
  a[2][4] = 80.0;
  a[0][1] = 80.0;
  EXPECT_EQ(places(find_super_experts(a, up_to(4), rule_of(85.0), true)), (Places{{0, 1}, {2, -1}}));
  EXPECT_EQ(places(find_super_experts(a, up_to(4), rule_of(85.0), false)), (Places{{0, 1}, {2, 4}}));
}

TEST(FindSuperExperts, DoesNotKnowScalesOrTheOrderOfExperts) {
  auto a = table_of(6, 8);
  a[1][2] = 30.0;
  a[4][7] = 12.0;
  const auto want = places(find_super_experts(a, up_to(6), rule_of(90.0)));
  ASSERT_EQ(want, (Places{{1, 2}, {4, 7}}));
  EXPECT_EQ(places(find_super_experts(a * 0.125, up_to(6), rule_of(90.0))), want);
  EXPECT_EQ(places(find_super_experts(a.flip(1), up_to(6), rule_of(90.0))), (Places{{1, 5}, {4, 0}}));
}

TEST(FindSuperExperts, NamesAtMostTheShareAboveThePercentile) {
  for (int seed = 0; seed < 20; ++seed) {
    torch::manual_seed(seed);
    const auto a = torch::rand({9, 23}, torch::kFloat64);
    EXPECT_LE(find_super_experts(a, up_to(9), rule_of(99.5, 1e9)).found.size(), 2u);  // 0.5 % of 207
  }
}

TEST(FindSuperExperts, BadInputIsAnError) {
  const auto a = table_of(2, 3);
  EXPECT_NE(message_of([&] { find_super_experts(a, {0}, rule_of(100.0)); }).find("between 0 and 100"),
            std::string::npos);
  EXPECT_NE(message_of([&] { find_super_experts(a, {2}, rule_of(50.0)); }).find("there are 0 to 1"), std::string::npos);
  EXPECT_THROW(find_super_experts(a, {0}, rule_of(50.0, 0.0)), Error);
}

TEST(PrunedLayer, LeavesOthersAlone) {
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  const Watched w(2, true, false);
  const auto x = torch::randn({1, 15, kHidden});
  const auto before = w.run(x);
  Pass pass;
  const Routing r = w.mixture->router->route(x[0], {}, pass);
  w.experts->down->weight.copy_(without_experts(w.experts->down->weight, {}));
  EXPECT_TRUE(torch::equal(w.run(x), before));
  const auto expert_output = [&](int64_t e) {
    const auto& g = w.experts->gate->weight[e];
    const auto z = torch::silu(x[0].matmul(g.t())) * x[0].matmul(w.experts->up->weight[e].t());
    return z.matmul(w.experts->down->weight[e].t());
  };
  const auto o = expert_output(3);
  w.experts->down->weight.copy_(without_experts(w.experts->down->weight, {3}));
  const auto after = w.run(x);
  // The chosen expert's weight is spent: what it gave is gone, and nobody else gets more.
  const auto gate = (r.gates * (r.experts == 3).to(torch::kFloat32)).sum(1, true);
  ASSERT_GT(gate.max().item<double>(), 0.0);
  EXPECT_LT(distance(after[0], before[0] - gate * o), 1e-6);
  Pass second;
  EXPECT_TRUE(torch::equal(w.mixture->router->route(x[0], {}, second).experts, r.experts));
}

TEST(SinkScore, SumsOverSinksAndAveragesOverQueriesBehindThem) {
  auto p = torch::zeros({1, 4, 4}, torch::kFloat64);
  p[0] = torch::tensor({{1.0, 0.0, 0.0, 0.0}, {0.5, 0.5, 0.0, 0.0}, {0.2, 0.3, 0.5, 0.0}, {0.4, 0.1, 0.1, 0.4}},
                       torch::kFloat64);
  EXPECT_NEAR(sink_score(p, {0})[0].item<double>(), (0.5 + 0.2 + 0.4) / 3.0, 1e-12);
  EXPECT_NEAR(sink_score(p, {0, 1})[0].item<double>(), (0.5 + 0.5) / 2.0, 1e-12);
  EXPECT_THROW(sink_score(p, {3}), Error);
  EXPECT_THROW(sink_score(p, {-1}), Error);
  EXPECT_THROW(sink_score(p, {}), Error);
}

TEST(SinkDecay, IsARatioOfEveryHead) {
  const auto before = torch::tensor({0.8, 0.1, 0.0}, torch::kFloat64), after = torch::tensor({0.2, 0.1, 0.3});
  const auto d = sink_decay(before, after);
  EXPECT_NEAR(d.decay[0].item<double>(), 0.75, 1e-6);
  EXPECT_NEAR(d.mean, (0.75 + 0.0) / 2.0, 1e-6);  // not 1 - 0.6 / 0.9
  EXPECT_TRUE(std::isnan(d.decay[2].item<double>()));
}

json mixtral() {
  return {{"model_type", "mixtral"},       {"vocab_size", 40},           {"hidden_size", 16},
          {"intermediate_size", 12},       {"num_hidden_layers", 4},     {"num_attention_heads", 4},
          {"num_key_value_heads", 2},      {"num_local_experts", 4},     {"num_experts_per_tok", 2},
          {"max_position_embeddings", 64}, {"tie_word_embeddings", true}};
}

json deepseek(const std::string& family) {
  json c = mixtral();
  c.update({{"model_type", family},
            {"moe_intermediate_size", 8},
            {"n_routed_experts", 4},
            {"n_shared_experts", 1},
            {"first_k_dense_replace", 1},
            {"kv_lora_rank", 16},
            {"qk_nope_head_dim", 8},
            {"qk_rope_head_dim", 4},
            {"v_head_dim", 6},
            {"q_lora_rank", nullptr}});
  return c;
}

std::vector<std::vector<int64_t>> windows_of(int64_t count, int64_t length) {
  std::vector<std::vector<int64_t>> out;
  for (int64_t w = 0; w < count; ++w) {
    out.emplace_back();
    for (int64_t t = 0; t < length; ++t) out.back().push_back((w * 17 + t * 7 + t * t) % 40);
  }
  return out;
}

std::shared_ptr<Decoder> decoder(const json& config, int seed = 6) {
  torch::manual_seed(seed);
  auto model = std::dynamic_pointer_cast<Decoder>(make_causal(config));
  model->eval();
  return model;
}

TEST(LayerWalk, ComputesWhatTheModelComputes) {
  const torch::NoGradGuard frozen;
  for (const json& config : {mixtral(), deepseek("deepseek_v2")}) {
    const auto model = decoder(config);
    const auto windows = windows_of(3, 9);
    LayerWalk walk(*model, windows);
    for (; !walk.done(); walk.next())
      for (int64_t w = 0; w < walk.windows(); ++w) walk.run(w);
    for (int64_t w = 0; w < 3; ++w) {
      Pass pass;
      const auto want = model->hidden(torch::tensor(windows[static_cast<size_t>(w)], torch::kInt64).unsqueeze(0), pass);
      EXPECT_TRUE(torch::equal(model->norm->forward(walk.hidden(w)), want));
    }
  }
}

TEST(LayerWalk, GoesOnWhenAllWindowsHaveRun) {
  const auto model = decoder(mixtral());
  LayerWalk walk(*model, windows_of(2, 4));
  walk.run(0);
  EXPECT_THROW(walk.next(), Error);
  EXPECT_THROW(walk.run(0), Error);
  EXPECT_THROW(LayerWalk(*model, {}), Error);
  EXPECT_THROW(LayerWalk(*model, {{40}}), Error);
}

TEST(ProfileExperts, FindsAnExpertThatWritesEnormousValues) {
  const torch::NoGradGuard frozen;
  const auto model = decoder(mixtral());
  auto& experts = static_cast<GatedExperts&>(*static_cast<Mixture&>(*model->layers[1]->ffn).experts);
  experts.down->weight[2].mul_(1000.0);
  const auto m = profile_experts(*model, windows_of(4, 12));
  EXPECT_EQ(m.layers_with_experts(), up_to(4));
  EXPECT_EQ(m.table().sizes(), (std::vector<int64_t>{4, 4}));
  for (const auto& [layer, one] : m.mixtures) EXPECT_EQ(one.maxima->tokens.sum().item<int64_t>(), 4 * 12 * 2);
  const auto layers = included_layers(m.layers, 0.75, m.layers_with_experts());
  const auto found = find_super_experts(m.table(), layers, rule_of(90.0));
  EXPECT_EQ(places(found), (Places{{1, 2}}));
  EXPECT_EQ(growing_layers(m.hidden_max, m.layers_with_experts()), (std::vector<int64_t>{1}));
  // Behind it the residual stream is massive.
  EXPECT_EQ(massive_layers(m, 2.0 * m.hidden_max[1], 0.0), (std::vector<int64_t>{2, 3, 4}));
  const json report = super_experts_report(m, found, layers);
  EXPECT_EQ(report["super_experts"].size(), 1u);
  EXPECT_EQ(report["super_experts"][0]["rank"], 1);
  EXPECT_EQ(report["super_experts"][0]["layer_index"], 1);
  EXPECT_EQ(report["experts"].size(), 16u);
  EXPECT_EQ(report["experts"][0]["expert_index"], 2);
  EXPECT_EQ(report["layers"][0]["layer_index"], 1);
  EXPECT_GT(report["layers"][0]["excess_kurtosis"].get<double>(), -2.1);
}

TEST(MassiveLayers, PassBothTests) {
  ModelMaxima m;
  m.hidden_max = {90.0, 500.0, 200.0, 150.0};
  m.hidden_median = {0.01, 0.4, 0.3, 0.1};
  EXPECT_EQ(massive_layers(m), (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(massive_layers(m, 0.0, 1000.0), (std::vector<int64_t>{0, 1, 3}));
  EXPECT_EQ(massive_layers(m, 180.0, 0.0), (std::vector<int64_t>{1, 2}));
}

TEST(ProfileExperts, KnowsDenseLayersAndSharedExperts) {
  const torch::NoGradGuard frozen;
  const auto model = decoder(deepseek("deepseek_v2"));
  auto& mixture = static_cast<Mixture&>(*model->layers[2]->ffn);
  mixture.shared->down->weight.mul_(500.0);
  const auto windows = windows_of(3, 8);
  const auto m = profile_experts(*model, windows);
  EXPECT_EQ(m.layers_with_experts(), (std::vector<int64_t>{1, 2, 3}));
  const auto table = m.table();
  EXPECT_EQ(table.sizes(), (std::vector<int64_t>{4, 5}));
  EXPECT_TRUE(torch::isnan(table[0]).all().item<bool>());
  EXPECT_EQ(places(find_super_experts(table, {1, 2}, rule_of(85.0), m.shared())), (Places{{2, -1}}));
  EXPECT_EQ(m.mixtures.at(2).maxima->tokens[4].item<int64_t>(), 24);
}

TEST(ProfileExperts, CountsWindowsWhoseLargestValueIsAtTheFirstPosition) {
  const torch::NoGradGuard frozen;
  const auto model = decoder(mixtral()), plain = decoder(mixtral());
  const auto windows = windows_of(6, 4);
  auto& experts = static_cast<GatedExperts&>(*static_cast<Mixture&>(*plain->layers[0]->ffn).experts);
  std::vector<int64_t> want(4, 0);
  for (const auto& w : windows) {
    Trace trace;
    trace.keep_inputs = true;
    Pass pass;
    pass.trace = &trace;
    plain->hidden(torch::tensor(w, torch::kInt64).unsqueeze(0), pass);
    const auto& record = trace.records.at(0);
    for (int64_t e = 0; e < 4; ++e) {
      double best = -1.0;
      int64_t at = -1;
      for (int64_t t = 0; t < 4; ++t) {
        if (!(record.routing.experts[t] == e).any().item<bool>()) continue;
        const auto x = record.input[t];
        const auto z = torch::silu(experts.gate->weight[e].mv(x)) * experts.up->weight[e].mv(x);
        const double size = experts.down->weight[e].mv(z).abs().max().item<double>();
        if (size > best) best = size, at = t;
      }
      want[static_cast<size_t>(e)] += at == 0 ? 1 : 0;
    }
  }
  ASSERT_GT(*std::max_element(want.begin(), want.end()), 0);
  EXPECT_EQ(profile_experts(*model, windows).mixtures.at(0).first, want);
}

TEST(ProfileExperts, RefusesADenseModel) {
  json config = mixtral();
  config["model_type"] = "llama";
  const auto model = decoder(config);
  EXPECT_NE(message_of([&] { profile_experts(*model, windows_of(1, 4)); }).find("no MoE layers: nothing to profile"),
            std::string::npos);
}

TEST(ModelSinks, ReadWhatAttentionGivesToSinks) {
  const torch::NoGradGuard frozen;
  for (const json& config : {mixtral(), deepseek("deepseek_v2")}) {
    const auto model = decoder(config);
    // Queries of zero look at all positions alike.
    for (auto& layer : model->layers) {
      if (auto* a = dynamic_cast<Attention*>(layer->attention.get())) a->parts.q->weight.zero_();
      if (auto* l = dynamic_cast<LatentAttention*>(layer->attention.get())) l->parts.q->weight.zero_();
    }
    const auto windows = windows_of(2, 6);
    const auto one = model_sinks(*model, windows, {0});
    EXPECT_EQ(one.sizes(), (std::vector<int64_t>{4, 4}));
    double want = 0;
    for (int t = 1; t < 6; ++t) want += 1.0 / (t + 1) / 5.0;
    EXPECT_LT((one - want).abs().max().item<double>(), 1e-6);
  }
}

TEST(ModelSinks, AddUpOverSinksAndLeaveTheModelAlone) {
  const torch::NoGradGuard frozen;
  const auto windows = windows_of(2, 6);
  const auto ids = torch::tensor(windows[0], torch::kInt64).unsqueeze(0);
  const auto model = decoder(mixtral());
  Pass pass;
  const auto before = model->forward(ids, pass);
  const auto both = model_sinks(*model, windows, {0, 1});
  Pass again;
  EXPECT_TRUE(torch::equal(model->forward(ids, again), before));
  EXPECT_GT(both.min().item<double>(), 0.0);
  EXPECT_LT(both.max().item<double>(), 1.0);
  // Queries behind sink 1 see at least three positions; the two sinks do not get everything.
  const auto fresh = decoder(mixtral());
  const auto first = model_sinks(*fresh, windows, {0});
  EXPECT_GT((both - first).abs().max().item<double>(), 1e-3);
  EXPECT_THROW(model_sinks(*decoder(mixtral()), windows, {5}), Error);
}

TEST(WindowPerplexity, IsTheMeanOfWindows) {
  const torch::NoGradGuard frozen;
  const auto model = decoder(mixtral());
  const auto windows = windows_of(2, 7);
  double sum = 0;
  for (const auto& w : windows) {
    const auto ids = torch::tensor(w, torch::kInt64).unsqueeze(0);
    Pass pass;
    const auto logp = torch::log_softmax(model->forward(ids, pass)[0], -1).narrow(0, 0, 6);
    sum -= logp.gather(1, ids[0].narrow(0, 1, 6).unsqueeze(1)).mean().item<double>();
  }
  EXPECT_NEAR(window_perplexity(*model, windows), std::exp(sum / 2.0), 1e-3);
  EXPECT_THROW(window_perplexity(*model, {}), Error);
}

}  // namespace
}  // namespace moiety
