#include "moiety/compress/expert_layers.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <map>

#include "message_of.h"
#include "moiety/io/checkpoint_writer.h"
#include "small_mixture.h"

namespace moiety {
namespace {

using small_mixture::ids;
using small_mixture::logits;
using torch::Tensor;
namespace fs = std::filesystem;

// The whole model in which other experts cannot be chosen.
class Only : public Edit {
 public:
  explicit Only(std::map<int64_t, std::vector<int64_t>> kept) : kept_(std::move(kept)) {}
  void logits(const Site& site, const Pass&, Tensor& logits) override {
    const auto it = kept_.find(site.block);
    if (it == kept_.end()) return;
    auto mask = torch::full({logits.size(1)}, -std::numeric_limits<float>::infinity());
    mask.index_fill_(0, torch::tensor(it->second), 0.0);
    logits = logits + mask;
  }

 private:
  std::map<int64_t, std::vector<int64_t>> kept_;
};

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

std::shared_ptr<const Checkpoint> kept(const ExpertLayers& layers,
                                       const std::map<int64_t, std::vector<int64_t>>& which) {
  std::vector<NewExperts> plan;
  for (const auto& [block, keep] : which)
    plan.push_back(NewExperts::keep(layers.layers()[layers.of_block(block)], keep));
  return with_experts(layers, std::move(plan));
}

struct Kind {
  const char* family;
  bool separate;
};

class PrunedExperts : public testing::TestWithParam<Kind> {};

TEST_P(PrunedExperts, ComputeTheModelInWhichOthersCannotBeChosen) {
  auto base = small_mixture::make(GetParam().family);
  if (GetParam().separate) base = small_mixture::separate(base);
  const ExpertLayers layers(base);
  std::map<int64_t, std::vector<int64_t>> which;
  for (const auto& l : layers.layers()) which[l.block] = {1, 2, 5};
  const auto small = kept(layers, which);
  EXPECT_TRUE(uniform_experts(small->config()));
  EXPECT_EQ(ExpertLayers(small).layers()[0].experts, 3);
  const auto all = logits(*base), fewer = logits(*small);
  EXPECT_GT(distance(all, fewer), 1e-3);
  // Sums of the same terms; the softmax over all has terms of 0 besides.
  EXPECT_LT(distance(logits(*base, {std::make_shared<Only>(which)}), fewer), 2e-5);
}

TEST_P(PrunedExperts, MayBeOfAnotherNumberInEveryLayer) {
  auto base = small_mixture::make(GetParam().family);
  if (GetParam().separate) base = small_mixture::separate(base);
  const ExpertLayers layers(base);
  const std::map<int64_t, std::vector<int64_t>> which = {{1, {0, 4}}, {2, {0, 1, 3, 4, 5}}};
  const auto small = kept(layers, which);
  EXPECT_FALSE(uniform_experts(small->config()));
  EXPECT_LT(distance(logits(*base, {std::make_shared<Only>(which)}), logits(*small)), 2e-5);
}

INSTANTIATE_TEST_SUITE_P(Families, PrunedExperts,
                         testing::Values(Kind{"mixtral", false}, Kind{"mixtral", true}, Kind{"qwen3_moe", true},
                                         Kind{"qwen2_moe", false}, Kind{"olmoe", false}, Kind{"gpt_oss", false},
                                         Kind{"granitemoe", false}, Kind{"deepseek_v3", true}),
                         [](const auto& i) {
                           return std::string(i.param.family) + (i.param.separate ? "_separate" : "_stacked");
                         });

class Written : public testing::TestWithParam<const char*> {
 protected:
  void TearDown() override { fs::remove_all(path_); }
  fs::path path_ = fs::path(testing::TempDir()) / fmt::format("moiety_experts_{}", GetParam());
};

TEST_P(Written, ReadsBackWithOtherNumbersInEveryLayerAndAMap) {
  const auto base = small_mixture::separate(small_mixture::make("mixtral"));
  const ExpertLayers layers(base);
  NewExperts shared;
  shared.block = 0;
  shared.rows = {0, 1, 2, 3, 4, 5};
  shared.map = {0, 1, 1, 0, 2, 2};
  shared.from = {3, 1, 5};
  const auto small = with_experts(layers, {shared, NewExperts::keep(layers.layers()[1], {2, 3, 4})});
  path_ += std::string(GetParam()) == "gguf" ? ".gguf" : "";
  if (std::string(GetParam()) == "gguf") {
    const auto warnings = write_gguf(*small, path_).warnings;
    EXPECT_TRUE(std::any_of(warnings.begin(), warnings.end(),
                            [](const auto& w) { return w.find("different numbers of experts") != std::string::npos; }));
  } else {
    write_hf(*small, path_);
  }
  const auto read = Checkpoint::open(path_.string());
  const ExpertLayers again(read);
  EXPECT_EQ(again.layers()[0].experts, 3);
  EXPECT_EQ(again.layers()[0].rows, 6);
  EXPECT_EQ(again.layers()[0].map, shared.map);
  EXPECT_EQ(again.layers()[1].experts, 3);
  EXPECT_EQ(again.layers()[2].experts, 6);
  EXPECT_LT(distance(logits(*small), logits(*read)), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(As, Written, testing::Values("hf", "gguf"), [](const auto& i) { return i.param; });

TEST(ExpertLayersOf, AnEmptyPlanLeavesEveryByteAsItWas) {
  const auto base = small_mixture::separate(small_mixture::make("mixtral"));
  const ExpertLayers layers(base);
  const auto same = kept(layers, {{0, {0, 1, 2, 3, 4, 5}}, {2, {0, 1, 2, 3, 4, 5}}});
  ASSERT_EQ(same->tensors().size(), base->tensors().size());
  EXPECT_EQ(same->config(), base->config());
  for (const auto& t : base->tensors()) {
    const auto a = base->get(t.name), b = same->get(t.name);
    EXPECT_EQ(a.format, b.format);
    EXPECT_TRUE(std::equal(a.data.begin(), a.data.end(), b.data.begin(), b.data.end())) << t.name;
  }
}

TEST(ExpertLayersOf, WhatIsMadeIsStoredAsTheOthersAre) {
  const auto base = small_mixture::make("qwen3_moe");
  const ExpertLayers layers(base);
  NewExperts n;
  n.block = 1;
  n.rows = {4, 2};
  n.from = {-1, 2};
  int calls = 0;
  n.made = [&] {
    ++calls;
    return std::vector<ExpertWeights>{layers.expert(1, 4), {}};
  };
  const auto made = with_experts(layers, {n}), copied = kept(layers, {{1, {2, 4}}});
  const auto rows = copied->get("model.layers.1.mlp.experts.gate_up_proj").to_float(),
             ours = made->get("model.layers.1.mlp.experts.gate_up_proj").to_float();
  const size_t half = rows.size() / 2;  // 2, 4 there; 4, 2 here
  EXPECT_TRUE(std::equal(ours.begin(), ours.begin() + static_cast<int64_t>(half),
                         rows.begin() + static_cast<int64_t>(half), rows.end()));
  made->get("model.layers.1.mlp.experts.down_proj");
  EXPECT_EQ(calls, 1);  // a layer is made once while it is written
  EXPECT_LT(distance(logits(*made), logits(*copied)), 1e-5);
}

TEST(ExpertLayersOf, RowsThatShareAnExpertAddTheirGates) {
  // Experts 0 and 3 are made equal; then one of them serves both rows.
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers layers(base);
  NewExperts twin;
  twin.block = 0;
  twin.rows = {0, 1, 2, 3, 4, 5};
  twin.from = {0, 1, 2, 0, 4, 5};
  const auto twins = with_experts(layers, {twin});
  NewExperts shared = twin;
  shared.map = {0, 1, 2, 0, 3, 4};
  shared.from = {0, 1, 2, 4, 5};
  const auto fewer = with_experts(layers, {shared});
  EXPECT_EQ(ExpertLayers(fewer).layers()[0].experts, 5);
  EXPECT_LT(distance(logits(*twins), logits(*fewer)), 1e-5);
  EXPECT_GT(distance(logits(*base), logits(*fewer)), 1e-3);
}

TEST(ExpertLayersOf, CanBeChangedAgain) {
  const auto base = small_mixture::make("olmoe");
  const auto once = kept(ExpertLayers(base), {{0, {0, 1, 2, 4}}});
  const auto twice = kept(ExpertLayers(once), {{0, {1, 3}}});
  EXPECT_LT(distance(logits(*kept(ExpertLayers(base), {{0, {1, 4}}})), logits(*twice)), 1e-6);
}

TEST(ExpertLayersOf, BlocksOfBitsAreTakenOverAsTheyAre) {
  auto config = small_mixture::config_of("qwen3_moe");
  config["moe_intermediate_size"] = 32;
  const fs::path file = fs::path(testing::TempDir()) / "moiety_experts_q8.gguf";
  write_gguf(*random_checkpoint(config, "/nowhere", 2), file, {.type = "q8_0", .overwrite = true});
  const auto base = Checkpoint::open(file.string());
  const auto small = kept(ExpertLayers(base), {{0, {1, 3}}, {1, {1, 3}}, {2, {1, 3}}});
  const auto old = base->get("model.layers.1.mlp.experts.up_proj"),
             now = small->get("model.layers.1.mlp.experts.up_proj");
  EXPECT_EQ(now.format, Format::Q8_0);
  const size_t one = old.data.size() / 6;
  EXPECT_TRUE(std::equal(now.data.begin(), now.data.begin() + static_cast<int64_t>(one),
                         old.data.begin() + static_cast<int64_t>(one)));
  EXPECT_TRUE(std::equal(now.data.begin() + static_cast<int64_t>(one), now.data.end(),
                         old.data.begin() + static_cast<int64_t>(3 * one)));
  fs::remove(file);
}

TEST(ExpertLayersOf, BadPlansAreRefusedInWords) {
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers layers(base);
  const auto plan = [&](std::vector<int64_t> rows, std::vector<int64_t> map, std::vector<int64_t> from) {
    NewExperts n;
    n.rows = std::move(rows), n.map = std::move(map), n.from = std::move(from);
    return message_of([&] { with_experts(layers, {n}); });
  };
  EXPECT_EQ(plan({}, {}, {}), "layer 0 would be left without experts");
  EXPECT_EQ(plan({6}, {}, {0}), "layer 0 has no expert 6: its router has 6 rows");
  EXPECT_EQ(plan({1, 1}, {}, {0, 1}), "layer 0: expert 1 is named twice");
  EXPECT_EQ(plan({1, 2}, {}, {0}), "layer 0: 2 rows of the router do not fit 1 experts");
  EXPECT_EQ(plan({1, 2}, {0, 1}, {0}), "layer 0: the map names expert 1 of 1");
  EXPECT_EQ(plan({1}, {}, {-1}), "layer 0: nothing makes its new experts");
  EXPECT_EQ(message_of([&] { layers.of_block(7); }), "layer 7 has no experts");
  EXPECT_EQ(message_of([&] { ExpertLayers(small_mixture::make("llama")); }),
            "/nowhere has no layers with experts: it is a dense model");
}

TEST(ExpertLayersOf, GroupsLoseEqualNumbers) {
  auto config = small_mixture::config_of("deepseek_v3", 16, 2);
  config["n_group"] = 4;
  config["topk_group"] = 2;
  const auto base = random_checkpoint(config, "/nowhere", 2);
  const ExpertLayers layers(base);
  const std::vector<int64_t> fair = {0, 3, 4, 7, 8, 9, 14, 15};
  EXPECT_NE(message_of([&] {
              kept(layers, {{1, {0, 1, 2, 4, 8, 9, 14, 15}}, {2, fair}});
            }).find("as many experts of each"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              kept(layers, {{1, {0, 4, 8, 12}}, {2, {0, 4, 8, 12}}});
            }).find("at least two of each"),
            std::string::npos);
  const auto small = kept(layers, {{1, fair}, {2, fair}});
  // Groups that lose nothing of what is chosen choose as before.
  EXPECT_LT(
      distance(logits(*base, {std::make_shared<Only>(std::map<int64_t, std::vector<int64_t>>{{1, fair}, {2, fair}})}),
               logits(*small)),
      2e-5);
}

TEST(OwnExperts, HostileSectionsOfAConfigAreRefusedInWords) {
  const auto base = small_mixture::make("mixtral");
  const auto refused = [&](const nlohmann::json& own) {
    auto config = base->config();
    config["moiety"]["experts"] = own;
    return message_of([&] { load_causal(*base, config, {}); });
  };
  EXPECT_EQ(refused(3), "config.json: 'moiety.experts' is 3, not an object of layers");
  EXPECT_EQ(refused({{"9", {{"count", 2}}}}),
            "config.json: 'moiety.experts' names '9', which is no layer with experts");
  EXPECT_EQ(refused({{"x", {{"count", 2}}}}),
            "config.json: 'moiety.experts' names 'x', which is no layer with experts");
  EXPECT_EQ(refused({{"0", {{"count", 0}}}}), "config.json: 'count' is 0, allowed is 1 to 65536");
  EXPECT_EQ(refused({{"0", {{"count", 2}, {"map", {0, 2}}}}}),
            "config.json: 'moiety.experts.0.map' holds 2; the layer has experts 0 to 1");
}

}  // namespace
}  // namespace moiety
