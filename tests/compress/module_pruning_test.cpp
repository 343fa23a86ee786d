#include "moiety/compress/module_pruning.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/models/decoder.h"
#include "moiety/models/model.h"
#include "moiety/train/run_folder.h"

namespace moiety {
namespace {

using nlohmann::json;

json config_of(const std::string& gate) {
  const json common = {{"modules", 6}, {"top_k", 2}, {"gating_size", 5}, {"gate_type", gate}};
  json ffn = common, attention = common;
  ffn["slug"] = "moduleformer";
  attention.update({{"slug", "moduleformer-attention"}, {"heads", 2}, {"width", 8}});
  return {{"model_type", "llama"},       {"vocab_size", 30},
          {"hidden_size", 16},           {"intermediate_size", 24},
          {"num_hidden_layers", 2},      {"num_attention_heads", 4},
          {"num_key_value_heads", 4},    {"max_position_embeddings", 64},
          {"tie_word_embeddings", true}, {"moiety", {{"parts", json::array({ffn, attention})}}}};
}

std::shared_ptr<const Checkpoint> saved(const CausalModel& model, const json& config, const TemporaryFolder& folder) {
  NamedTensors tensors;
  for (const auto& t : model.stored()) tensors[t.name] = t.value().detach().contiguous();
  write_tensors(folder / "model.safetensors", tensors);
  write_file(folder / "config.json", config.dump());
  return Checkpoint::open(folder.path().string());
}

class Mask : public Edit {
 public:
  explicit Mask(const std::vector<KeptModules>& plan) : plan_(plan) {}
  void logits(const Site& site, const Pass&, torch::Tensor& logits) override {
    for (const auto& k : plan_) {
      if (k.layer != site.block || k.site != site.site) continue;
      auto drop = torch::ones({k.modules}, torch::kBool);
      drop.index_fill_(0, torch::tensor(k.keep, torch::kInt64), false);
      logits = logits.masked_fill(drop, -std::numeric_limits<float>::infinity());
    }
  }

 private:
  const std::vector<KeptModules>& plan_;
};

class ModulePruningOf : public testing::TestWithParam<const char*> {};

TEST_P(ModulePruningOf, IsTheModelWhoseOtherModulesAreMasked) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  const json config = config_of(GetParam());
  auto whole = make_causal(config);
  whole->eval();
  const TemporaryFolder folder("module-pruning");
  const auto checkpoint = saved(*whole, config, folder);
  const std::vector<KeptModules> plan = {{0, "ffn", 6, {1, 4, 5}}, {1, "attention", 6, {0, 2}}};
  const auto pruned = prune_modules(checkpoint, plan);
  auto small = load_causal(*pruned);
  small->eval();
  EXPECT_EQ(small->experts(0), 3);
  EXPECT_EQ(small->experts(1), 6);
  const auto ids = torch::randint(0, 30, {2, 11}, torch::kInt64);
  Pass masked, plain;
  masked.edits.push_back(std::make_shared<Mask>(plan));
  const auto expected = whole->forward(ids, masked);
  EXPECT_LT((small->forward(ids, plain) - expected).abs().max().item<double>(), 1e-5);
  Pass unmasked;
  EXPECT_GT((whole->forward(ids, unmasked) - expected).abs().max().item<double>(), 1e-5);
}

TEST_P(ModulePruningOf, ModulesThatAreAddedChangeNothingUntilTheyAreChosen) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  const json config = config_of(GetParam());
  auto whole = make_causal(config);
  whole->eval();
  const TemporaryFolder folder("module-pruning"), other("module-pruning");
  const auto checkpoint = saved(*whole, config, folder);
  json more = config;
  for (auto& part : more["moiety"]["parts"]) part["new_modules"] = 3;
  const auto grown = load_causal(*checkpoint, more, {});
  grown->eval();
  EXPECT_EQ(grown->experts(0), 9);
  const auto ids = torch::randint(0, 30, {2, 11}, torch::kInt64);
  std::vector<KeptModules> old, all, some;
  for (const int64_t layer : {0, 1})
    for (const char* site : {"ffn", "attention"}) {
      old.push_back({layer, site, 9, {0, 1, 2, 3, 4, 5}});
      all.push_back({layer, site, 9, {0, 1, 2, 3, 4, 5, 6, 7, 8}});
      some.push_back({layer, site, 9, {2, 5, 6, 8}});
    }
  Pass masked, plain;
  masked.edits.push_back(std::make_shared<Mask>(old));
  EXPECT_LT((grown->forward(ids, masked) - whole->forward(ids, plain)).abs().max().item<double>(), 1e-5);
  // Keeping all of them makes them modules like the others; keeping some cuts across both.
  const auto with_added = saved(*grown, more, other);
  for (const auto& plan : {all, some}) {
    const auto joined = prune_modules(with_added, plan);
    EXPECT_FALSE(joined->config()["moiety"]["parts"][0].contains("new_modules"));
    for (const auto& t : joined->tensors()) EXPECT_EQ(t.name.find(".new."), std::string::npos) << t.name;
    auto one = load_causal(*joined);
    one->eval();
    Pass a, b;
    b.edits.push_back(std::make_shared<Mask>(plan));
    EXPECT_LT((one->forward(ids, a) - grown->forward(ids, b)).abs().max().item<double>(), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(All, ModulePruningOf, testing::Values("mlp", "linear", "gmm"));

TEST(ModulePruningPlan, KeepsWhatIsChosenOftenEnough) {
  const std::vector<ModuleUse> use = {{0, "ffn", 2, torch::tensor({0.5, 0.0, 0.9, 0.1, 0.5}, torch::kFloat64)}};
  EXPECT_EQ(plan_module_pruning(use, 0.2)[0].keep, (std::vector<int64_t>{0, 2, 4}));
  EXPECT_EQ(plan_module_pruning(use, 0.95, 2)[0].keep, (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(plan_module_pruning(use, 0.0)[0].keep.size(), 5u);
  try {
    plan_module_pruning(use, 0.6);
    FAIL() << "one module is fewer than a token chooses";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("layer 0, ffn: only 1 of 5"), std::string::npos) << e.what();
  }
  EXPECT_THROW(plan_module_pruning(use, 1.5), Error);
}

TEST(ModulePruningPlan, HasToFitTheModel) {
  torch::manual_seed(2);
  const json config = config_of("mlp");
  const auto model = make_causal(config);
  const TemporaryFolder folder("module-pruning");
  const auto checkpoint = saved(*model, config, folder);
  EXPECT_THROW(prune_modules(checkpoint, {{2, "ffn", 6, {0, 1}}}), Error);
  EXPECT_THROW(prune_modules(checkpoint, {{0, "ffn", 7, {0, 1}}}), Error);
}

}  // namespace
}  // namespace moiety
