#include "moiety/compress/expert_plans.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <set>
#include <string>

#include "message_of.h"
#include "moiety/compress/expert_statistics.h"
#include "small_mixture.h"

namespace moiety {
namespace {

using torch::Tensor;

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

/// As the small mixtures keep their matrices.
Tensor stored(const Tensor& t) {
  return t.to(torch::kBFloat16).to(torch::kFloat32);
}

std::vector<int64_t> text() {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < 200; ++i) out.push_back((i * 7 + i * i) % 40);
  return out;
}

Calibration calibrated(const std::shared_ptr<const Checkpoint>& base) {
  const auto model = load_causal(*base, {.dtype = "f32"});
  CalibrationOptions options;
  options.windows = {32, 2, -1};
  return calibrate(*model, ExpertLayers(base), {text()}, options);
}

/// A mixture whose experts 3, 4 and 5 are those of 0, 1 and 2 with their neurons in another order.
std::shared_ptr<const Checkpoint> with_copies(const std::string& family = "mixtral") {
  const auto base = small_mixture::make(family);
  const auto layers = std::make_shared<ExpertLayers>(base);
  std::vector<NewExperts> plan;
  for (size_t at = 0; at < layers->layers().size(); ++at) {
    NewExperts n;
    n.block = layers->layers()[at].block;
    n.rows = {0, 1, 2, 3, 4, 5};
    n.from = {0, 1, 2, -1, -1, -1};
    n.made = [layers, at] {
      std::vector<ExpertWeights> made(6);
      std::vector<int64_t> order(static_cast<size_t>(layers->layers()[at].width));
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>((i * 7 + 3) % order.size());
      for (int64_t e = 0; e < 3; ++e) made[static_cast<size_t>(e) + 3] = with_neurons(layers->expert(at, e), order);
      return made;
    };
    plan.push_back(std::move(n));
  }
  return with_experts(*layers, std::move(plan));
}

class PlansOf : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Families, PlansOf, testing::Values("mixtral", "qwen3_moe", "deepseek_v3"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(PlansOf, DernKeepsWhatItShallAndWritesAnOrdinaryModel) {
  const auto base = small_mixture::make(GetParam());
  const ExpertLayers layers(base);
  const auto c = calibrated(base);
  DernConfig config;
  config.threshold = -1.0;  // everything moves
  const auto plan = plan_dern(layers, c, {4.0, false}, {}, config);
  ASSERT_EQ(plan.layers.size(), layers.layers().size());
  const auto small = with_experts(layers, plan.layers);
  EXPECT_TRUE(uniform_experts(small->config()));
  const ExpertLayers now(small);
  for (size_t at = 0; at < now.layers().size(); ++at) {
    const int64_t block = now.layers()[at].block;
    std::vector<ExpertWeights> all;
    for (int64_t e = 0; e < 6; ++e) all.push_back(layers.expert(at, e));
    const auto s = c.of_block(block).importance();
    const auto want = dern_layer(all, layers.router(at), s, dern_retained(s, 4), config);
    EXPECT_EQ(plan.report[at]["moved"], 2 * layers.layers()[at].width);
    EXPECT_EQ(plan.report[at]["retained"].get<std::vector<int64_t>>(), want.retained);
    EXPECT_LT(distance(now.router(at), stored(want.moves.router)), 1e-6);
    for (int64_t e = 0; e < 4; ++e) {
      const auto got = now.expert(at, e);
      EXPECT_LT(distance(got.gate, stored(want.experts[static_cast<size_t>(e)].gate)), 1e-6);
      EXPECT_LT(distance(got.down, stored(want.experts[static_cast<size_t>(e)].down)), 1e-6);
    }
  }
  EXPECT_TRUE(torch::isfinite(small_mixture::logits(*small)).all().item<bool>());
}

TEST(Plans, DernWithAllExpertsChangesNothing) {
  const auto base = small_mixture::make("mixtral");
  EXPECT_TRUE(plan_dern(ExpertLayers(base), calibrated(base), {6.0, false}, {}, {}).layers.empty());
}

TEST(Plans, DernAtOneIsPlainPruning) {
  const auto base = with_copies();
  const ExpertLayers layers(base);
  const auto c = calibrated(base);
  DernConfig config;
  config.threshold = 1.0;
  const KeepRule half{0.5, false};
  const auto pruned =
      with_experts(layers, keep_experts(layers, select_experts(layers, expert_scores(layers, c, "importance"), half)));
  const auto small = with_experts(layers, plan_dern(layers, c, half, {}, config).layers);
  EXPECT_EQ(distance(small_mixture::logits(*small), small_mixture::logits(*pruned)), 0.0);
}

TEST(Plans, DernRetainsProtectedExperts) {
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers layers(base);
  const auto plan = plan_dern(layers, calibrated(base), {0.5, false},
                              protected_experts(layers, parse_experts("0,5;2,0;2,1;2,2")), {});
  const auto kept = [&](size_t at) { return plan.report[at]["retained"].get<std::set<int64_t>>(); };
  EXPECT_EQ(kept(0).count(5), 1U);
  EXPECT_EQ(kept(2), (std::set<int64_t>{0, 1, 2}));
}

TEST(Plans, UncurlFindsCopiesAndComputesTheSame) {
  // Rows of copies are as those of their originals, so that the router treats them alike.
  auto base = with_copies();
  const ExpertLayers before(base);
  std::vector<NewExperts> plan;
  for (size_t at = 0; at < before.layers().size(); ++at) {
    NewExperts n;
    n.block = before.layers()[at].block;
    n.rows = n.from = {0, 1, 2, 3, 4, 5};
    const auto rows = before.router(at).narrow(0, 0, 3);
    n.router = torch::cat({rows, rows * 2});
    plan.push_back(std::move(n));
  }
  base = with_experts(before, std::move(plan));
  const ExpertLayers layers(base);
  const auto c = calibrated(base);
  const auto planned = plan_uncurl(layers, c, {}, {});
  for (const auto& layer : planned.report)
    EXPECT_EQ(layer["labels"].get<std::vector<int64_t>>(), (std::vector<int64_t>{0, 1, 2, 0, 1, 2}));
  const auto small = with_experts(layers, planned.layers);
  EXPECT_EQ(ExpertLayers(small).layers()[0].experts, 3);
  EXPECT_EQ(ExpertLayers(small).layers()[0].rows, 6);
  EXPECT_LT(distance(small_mixture::logits(*small), small_mixture::logits(*base)), 1e-4);
  // Averaged rows make an ordinary smaller model, which is another one.
  UncurlConfig average;
  average.router = "average";
  const auto plain = with_experts(layers, plan_uncurl(layers, c, {}, average).layers);
  EXPECT_TRUE(uniform_experts(plain->config()));
  EXPECT_EQ(ExpertLayers(plain).layers()[0].rows, 3);
  EXPECT_TRUE(torch::isfinite(small_mixture::logits(*plain)).all().item<bool>());
}

TEST(Plans, UncurlLeavesProtectedExpertsAlone) {
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers layers(base);
  const auto c = calibrated(base);
  const auto plan = plan_uncurl(layers, c, protected_experts(layers, parse_experts("0,2;0,4")), {});
  const auto labels = plan.report[0]["labels"].get<std::vector<int64_t>>();
  EXPECT_EQ(plan.report[0]["clusters"], 3);
  for (const size_t alone : {2, 4}) EXPECT_EQ(std::count(labels.begin(), labels.end(), labels[alone]), 1);
  EXPECT_EQ(labels[0], 0);
  const auto small = with_experts(layers, plan.layers);
  const ExpertLayers now(small);
  EXPECT_EQ(distance(now.expert(0, labels[4]).up, layers.expert(0, 4).up), 0.0);
  EXPECT_NE(message_of([&] {
              plan_uncurl(layers, c, protected_experts(layers, parse_experts("0,0;0,1;0,2;0,3")), {});
            }).find("4 experts are protected, but 3"),
            std::string::npos);
}

TEST(Plans, MSmoeMergesWhereItIsAsked) {
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers layers(base);
  const auto c = calibrated(base);
  MSmoeConfig config;
  config.groups = 3;
  config.layers = {1, 2};
  const auto plan = plan_m_smoe(layers, c, config);
  EXPECT_EQ(plan.report[0]["groups"], 6);
  EXPECT_LE(plan.report[1]["groups"].get<int64_t>() + plan.report[2]["groups"].get<int64_t>(), 6);
  const auto small = with_experts(layers, plan.layers);
  const ExpertLayers now(small);
  EXPECT_EQ(now.layers()[0].experts, 6);
  const int64_t g = plan.report[1]["groups"];
  EXPECT_EQ(now.layers()[1].experts, g);
  // The merged layer is what its parts give.
  std::vector<ExpertWeights> all;
  for (int64_t e = 0; e < 6; ++e) all.push_back(layers.expert(1, e));
  const auto labels = torch::tensor(plan.report[1]["labels"].get<std::vector<int64_t>>());
  const auto want = merge_groups(align_experts(all).experts, labels, c.of_block(1).usage());
  for (int64_t e = 0; e < g; ++e) {
    // Groups of one keep their neurons' order.
    if (labels.eq(e).sum().item<int64_t>() > 1) {
      EXPECT_LT(distance(now.expert(1, e).up, stored(want[static_cast<size_t>(e)].up)), 1e-6);
    }
  }
  EXPECT_TRUE(torch::isfinite(small_mixture::logits(*small)).all().item<bool>());
}

TEST(Plans, MSmoeOfCopiesComputesTheSame) {
  // Usage and logits as if copies were used alike.
  torch::manual_seed(1);
  const auto base = with_copies();
  const ExpertLayers layers(base);
  auto c = calibrated(base);
  for (auto& l : c.layers) {
    l.load = torch::tensor({30, 20, 25, 3, 2, 1}, torch::kInt64);
    const auto rows = torch::randn({40, 3}, torch::kFloat64);
    const auto r = torch::cat({rows, rows}, 1);
    l.gram = torch::matmul(r.t(), r);
  }
  MSmoeConfig config;
  config.groups = 3;
  const auto plan = plan_m_smoe(layers, c, config);
  for (const auto& layer : plan.report) EXPECT_EQ(layer["groups"], 3);
  const auto small = with_experts(layers, plan.layers);
  EXPECT_LT(distance(small_mixture::logits(*small), small_mixture::logits(*base)), 1e-3);
}

TEST(Plans, BadInputIsAnError) {
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers layers(base);
  const auto c = calibrated(base);
  EXPECT_NE(message_of([&] { plan_dern(layers, c, {0.5, true}, {}, {}); }).find("--across"), std::string::npos);
  DernConfig narrow;
  narrow.width = 8;
  EXPECT_NE(message_of([&] { plan_dern(layers, c, {0.5, false}, {}, narrow); }).find("one width"), std::string::npos);
  MSmoeConfig absent;
  absent.groups = 2;
  absent.layers = {7};
  EXPECT_NE(message_of([&] { plan_m_smoe(layers, c, absent); }).find("layer 7 has no experts"), std::string::npos);
  auto few = c;
  for (auto& l : few.layers) l.tokens = 5;
  EXPECT_NE(message_of([&] { plan_uncurl(layers, few, {}, {}); }).find("5 tokens, 6 are needed"), std::string::npos);
  EXPECT_THROW(plan_m_smoe(layers, few, absent), Error);
  for (auto& l : few.layers) l.tokens = 0;
  EXPECT_THROW(plan_dern(layers, few, {0.5, false}, {}, {}), Error);
  // What was merged is not merged again.
  const auto merged = with_experts(layers, plan_uncurl(layers, c, {}, {}).layers);
  EXPECT_NE(message_of([&] {
              plan_dern(ExpertLayers(merged), c, {2.0, false}, {}, {});
            }).find("merged before"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
