#include "moiety/analyze/routing.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <set>

#include "moiety/base/error.h"
#include "moiety/models/model.h"

namespace moiety {
namespace {

using nlohmann::json;

const torch::TensorOptions kBool = torch::kBool;

Trace::Record record_of(torch::Tensor experts, int64_t count, torch::Tensor scores = {}) {
  Trace::Record r;
  r.site = {0, 0, "ffn"};
  r.routing.gates = (experts >= 0).to(torch::kFloat32) * 0.5;
  r.routing.experts = std::move(experts);
  r.routing.scores =
      scores.defined() ? scores : torch::full({r.routing.experts.size(0), count}, 1.0 / static_cast<double>(count));
  return r;
}

TEST(RoutingStatistics, CountsWhatTokensChose) {
  // Two rows of three tokens; the last token of the second row is padding.
  const auto experts = torch::tensor({{0, 1}, {1, 2}, {0, -1}, {3, 0}, {3, 0}, {2, 2}}, torch::kInt64);
  const auto ids = torch::tensor({{5, 6, 5}, {7, 7, 0}}, torch::kInt64);
  const auto counted = torch::tensor({{1, 1, 1}, {1, 1, 0}}).to(torch::kBool);
  RoutingStatistics all(2, true);
  all.add(record_of(experts, 4), ids, counted, 1);
  const auto& s = all.sites().at({0, 0, "ffn"});
  EXPECT_EQ(s.tokens, 5);
  EXPECT_TRUE(torch::equal(s.load, torch::tensor({4, 2, 1, 2}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(s.load_by_text, torch::stack({torch::zeros({4}, torch::kInt64), s.load})));
  const auto together = torch::tensor({{4, 1, 0, 2}, {1, 2, 1, 0}, {0, 1, 1, 0}, {2, 0, 0, 2}}, torch::kInt64);
  EXPECT_TRUE(torch::equal(s.coactivation, together)) << s.coactivation;
  EXPECT_TRUE(torch::allclose(s.gates, torch::tensor({2.0, 1.0, 0.5, 1.0}, torch::kFloat64)));
  EXPECT_DOUBLE_EQ(s.experts_per_token(), 9.0 / 5.0);
  EXPECT_DOUBLE_EQ(s.imbalance(), 4.0 / 9.0 * 4.0);
  EXPECT_EQ(s.unused(), 0);
  // {0,1} -> {1,2}: one of two again; {1,2} -> {0}: none; {3,0} -> {3,0}: both. The last one precedes padding.
  EXPECT_EQ(s.followed, 6);
  EXPECT_EQ(s.repeated, 3);
  EXPECT_NEAR(s.token_entropy(), std::log(4.0), 1e-6);
  EXPECT_EQ(s.ids[0], (std::map<int64_t, int64_t>{{5, 2}, {7, 2}}));
  EXPECT_EQ(s.ids[2], (std::map<int64_t, int64_t>{{6, 1}}));
}

TEST(RoutingStatistics, EntropiesOfKnownDistributions) {
  // Sigmoid scores are no distribution; they are normalized to one.
  const auto scores = torch::tensor({{0.9f, 0.9f, 0.f, 0.f}, {0.2f, 0.f, 0.f, 0.f}});
  RoutingStatistics all;
  all.add(record_of(torch::tensor({{0}, {0}}, torch::kInt64), 4, scores), torch::zeros({1, 2}, torch::kInt64),
          torch::ones({1, 2}, kBool));
  const auto& s = all.sites().begin()->second;
  EXPECT_NEAR(s.token_entropy(), std::log(2.0) / 2.0, 1e-6);
  EXPECT_DOUBLE_EQ(s.load_entropy(), 0.0);
  EXPECT_DOUBLE_EQ(s.imbalance(), 4.0);
  EXPECT_EQ(s.unused(), 3);
  EXPECT_DOUBLE_EQ(s.repetition(), 1.0);
  EXPECT_DOUBLE_EQ(s.chance_repetition(), 1.0);
  EXPECT_NEAR(s.variation(), std::sqrt(3.0), 1e-12);
}

RC_GTEST_PROP(RoutingStatistics, BatchesAddUpToTheWhole, ()) {
  const auto experts = *rc::gen::inRange<int64_t>(1, 9), slots = *rc::gen::inRange<int64_t>(1, experts + 1);
  const auto rows = *rc::gen::inRange<int64_t>(1, 5), time = *rc::gen::inRange<int64_t>(1, 7);
  const auto seed = *rc::gen::arbitrary<uint16_t>();
  torch::manual_seed(seed);
  auto scores = torch::rand({rows * time, experts});
  auto chosen = std::get<1>(scores.topk(slots));
  chosen = chosen.masked_fill(torch::rand({rows * time, slots}) < 0.2, -1);
  const auto ids = torch::randint(10, {rows, time}, torch::kInt64), counted = torch::rand({rows, time}) < 0.8;
  RoutingStatistics whole(1, true), parts(1, true);
  whole.add(record_of(chosen, experts, scores), ids, counted);
  for (int64_t r = 0; r < rows; ++r) {
    parts.add(record_of(chosen.narrow(0, r * time, time), experts, scores.narrow(0, r * time, time)),
              ids.narrow(0, r, 1), counted.narrow(0, r, 1));
  }
  const auto &a = whole.sites().begin()->second, &b = parts.sites().begin()->second;
  RC_ASSERT(torch::equal(a.load, b.load));
  RC_ASSERT(torch::equal(a.load, a.coactivation.diagonal()));
  RC_ASSERT(torch::equal(a.coactivation, b.coactivation));
  RC_ASSERT(torch::equal(a.coactivation, a.coactivation.t()));
  RC_ASSERT(a.followed == b.followed && a.repeated == b.repeated && a.tokens == b.tokens);
  RC_ASSERT(std::abs(a.token_entropy() - b.token_entropy()) < 1e-9);
  RC_ASSERT(a.ids == b.ids);
  RC_ASSERT(a.repeated <= a.followed);
}

Trace::Record choices_of(int64_t block, std::vector<int64_t> first, int64_t experts) {
  auto r = record_of(torch::tensor(first).unsqueeze(1), experts);
  r.site.block = block;
  return r;
}

TEST(ChoiceInformation, OfKnownTables) {
  ChoiceInformation copied, independent, mixed;
  copied.add(choices_of(0, {0, 1, 2, 3}, 4));
  EXPECT_TRUE(copied.nats().empty());
  EXPECT_EQ(copied.mean(), 0.0);
  copied.add(choices_of(2, {3, 2, 1, 0}, 4));
  EXPECT_NEAR(copied.nats().at({2, 0, "ffn"}), std::log(4.0), 1e-12);
  independent.add(choices_of(0, {0, 0, 1, 1}, 2));
  independent.add(choices_of(1, {0, 2, 0, 2}, 3));
  EXPECT_NEAR(independent.mean(), 0.0, 1e-12);
  // p = 3/8, 1/8, 1/8, 3/8 with even margins; the last token has no choice, and the one before does not count.
  const std::vector<int64_t> a = {0, 0, 0, 0, 1, 1, 1, 1, 0, -1}, b = {0, 0, 0, 1, 0, 1, 1, 1, 1, 1};
  auto counted = torch::ones({10}, kBool);
  counted[8] = false;
  mixed.add(choices_of(0, a, 2), counted);
  mixed.add(choices_of(1, b, 2), counted);
  EXPECT_NEAR(mixed.mean(), 0.75 * std::log(1.5) + 0.25 * std::log(0.5), 1e-12);
}

TEST(ChoiceInformation, PassesAndSitesStayApart) {
  ChoiceInformation all;
  for (int pass = 0; pass < 2; ++pass) {
    all.add(choices_of(0, {0, 1}, 2));
    auto attention = choices_of(1, {0, 0}, 3);
    attention.site.site = "attention";
    all.add(attention);
    all.add(choices_of(1, {1, 0}, 2));
  }
  ASSERT_EQ(all.nats().size(), 1u);
  EXPECT_NEAR(all.mean(), std::log(2.0), 1e-12);
  all.add(choices_of(0, {0, 1}, 2));
  EXPECT_THROW(all.add(choices_of(1, {0, 1}, 5)), Error);
}

json small_mixture() {
  return {{"model_type", "olmoe"},        {"vocab_size", 50},       {"hidden_size", 16},
          {"intermediate_size", 8},       {"num_hidden_layers", 2}, {"num_attention_heads", 2},
          {"num_key_value_heads", 2},     {"num_experts", 6},       {"num_experts_per_tok", 2},
          {"max_position_embeddings", 32}};
}

TEST(AnalyzeRouting, EqualsARecordOfEveryWindow) {
  torch::manual_seed(3);
  auto model = make_causal(small_mixture());
  model->eval();
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 21; ++i) ids.push_back((i * 7 + 3) % 50);
  RoutingOptions options;
  options.context = 9;
  options.batch_size = 2;
  options.bos = 1;
  const auto statistics = analyze_routing(*model, {{"a", ids}}, options);
  ASSERT_EQ(statistics.sites().size(), 2u);
  // Windows one by one, each behind BOS, counted by hand.
  std::map<int64_t, std::map<int64_t, int64_t>> load;
  for (int64_t from = 0; from < 21; from += 8) {
    std::vector<int64_t> window = {1};
    for (int64_t i = from; i < std::min<int64_t>(from + 8, 21); ++i) window.push_back(ids[static_cast<size_t>(i)]);
    Trace trace;
    Pass pass;
    pass.trace = &trace;
    torch::NoGradGuard no_grad;
    model->hidden(torch::tensor(window).unsqueeze(0), pass);
    for (const auto& r : trace.records) {
      const auto e = r.routing.experts.slice(0, 1).reshape({-1});
      for (int64_t i = 0; i < e.numel(); ++i) ++load[r.site.block][e[i].item<int64_t>()];
    }
  }
  for (const auto& [site, s] : statistics.sites()) {
    EXPECT_EQ(s.tokens, 21);
    for (int64_t e = 0; e < 6; ++e) EXPECT_EQ(s.load[e].item<int64_t>(), load[site.block][e]) << site.block << " " << e;
  }
}

TEST(AnalyzeRouting, ReportsAndFillsThePage) {
  torch::manual_seed(3);
  auto model = make_causal(small_mixture());
  model->eval();
  const auto statistics = analyze_routing(*model, {{"x", {1, 2, 3, 4}}, {"y", {5, 6, 7}}}, {.context = 4});
  const json report = to_json(statistics, {"x", "y"});
  ASSERT_EQ(report["layers"].size(), 2u);
  const json& layer = report["layers"][1];
  EXPECT_EQ(layer["layer"], 1);
  EXPECT_FALSE(report["layers"][0].contains("mutual_information"));
  EXPECT_GE(layer["mutual_information"].get<double>(), 0.0);
  EXPECT_EQ(report["summary"]["mean_mutual_information"], layer["mutual_information"]);
  int64_t sum = 0;
  for (const auto& n : layer["load"]) sum += n.get<int64_t>();
  EXPECT_EQ(sum, 7 * 2);
  int64_t second = 0;
  for (const auto& n : layer["texts"][1]["load"]) second += n.get<int64_t>();
  EXPECT_EQ(second, 3 * 2);
  const std::string page = routing_page(report);
  EXPECT_NE(page.find("\"coactivation\""), std::string::npos);
  EXPECT_EQ(page.find("http://"), std::string::npos);
  EXPECT_EQ(page.find("https://"), std::string::npos);
}

TEST(AnalyzeRouting, RefusesWhatHasNoExperts) {
  auto config = small_mixture();
  config["model_type"] = "llama";
  auto dense = make_causal(config);
  EXPECT_THROW(analyze_routing(*dense, {{"a", {1, 2}}}, {}), Error);
  auto mixture = make_causal(small_mixture());
  EXPECT_THROW(analyze_routing(*mixture, {{"a", {}}}, {.context = 8}), Error);
  EXPECT_THROW(analyze_routing(*mixture, {{"a", {1}}}, {.context = 33}), Error);
  EXPECT_THROW(analyze_routing(*mixture, {{"a", {1}}}, {.context = 1, .bos = 0}), Error);
}

}  // namespace
}  // namespace moiety
