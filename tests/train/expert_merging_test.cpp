#include "moiety/train/expert_merging.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/models/model.h"
#include "moiety/nn/weights.h"
#include "moiety/train/run_folder.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json config_of() {
  return {{"model_type", "llama"},      {"vocab_size", 30},
          {"hidden_size", 16},          {"intermediate_size", 24},
          {"num_hidden_layers", 2},     {"num_attention_heads", 4},
          {"num_key_value_heads", 2},   {"max_position_embeddings", 64},
          {"tie_word_embeddings", true}};
}

// A base and experts whose matrices differ from it.
struct Models {
  TemporaryFolder folder;
  std::shared_ptr<const Checkpoint> base;
  std::vector<std::shared_ptr<const Checkpoint>> experts;
  std::vector<MergeTask> tasks;

  explicit Models(int64_t count = 2) {
    torch::manual_seed(1);
    const auto model = make_causal(config_of());
    std::map<std::string, Tensor> tensors;
    for (const auto& t : model->stored()) tensors[t.name] = 2.0 * t.value().detach().contiguous();
    base = saved("base", tensors);
    for (int64_t k = 0; k < count; ++k) {
      auto own = tensors;
      for (auto& [name, t] : own)
        if (name.find("proj") != std::string::npos) t = t + 0.3 * torch::randn_like(t) * t.std();
      experts.push_back(saved(fmt::format("expert{}", k), own));
      MergeTask task;
      for (int i = 0; i < 3 + k; ++i) {
        const auto ids = torch::randint(30, {7}, torch::kInt64);
        task.emplace_back(ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + 7);
      }
      tasks.push_back(task);
    }
  }
  std::shared_ptr<const Checkpoint> saved(const std::string& name, const std::map<std::string, Tensor>& tensors) {
    std::filesystem::create_directories(folder / name);
    write_tensors(folder / name / "model.safetensors", tensors);
    write_file(folder / name / "config.json", config_of().dump());
    return Checkpoint::open((folder / name).string());
  }
};

ExpertMergingConfig quick() {
  ExpertMergingConfig c;
  c.samples = 0;
  c.epochs = 3;
  c.accumulation = 4;
  c.hidden_layers = {1, 2};
  c.reg_weight = 0.1;
  return c;
}

Tensor of(const Checkpoint& c, const std::string& name) {
  return as_tensor(c.get(name)).to(torch::kFloat32).clone();
}

constexpr const char* kMatrix = "model.layers.1.mlp.down_proj.weight";

TEST(WarmRestarts, FollowTheirCosines) {
  EXPECT_EQ(warm_restart_factor(0), 1.0);
  EXPECT_NEAR(warm_restart_factor(25), 0.55, 1e-12);
  EXPECT_EQ(warm_restart_factor(50), 1.0);
  EXPECT_NEAR(warm_restart_factor(100), 0.55, 1e-12);
  EXPECT_EQ(warm_restart_factor(150), 1.0);
  EXPECT_GT(warm_restart_factor(49), 0.1);
  EXPECT_LT(warm_restart_factor(149), 0.101);
  EXPECT_THROW(warm_restart_factor(-1), Error);
}

TEST(MergeOrder, EveryTaskComesAsOften) {
  const std::vector<MergeTask> tasks{MergeTask(2), MergeTask(5), MergeTask(1)};
  const auto order = merge_order(tasks, 0, 0);
  ASSERT_EQ(order.size(), 15u);
  std::map<std::pair<size_t, size_t>, int> seen;
  for (const auto& o : order) ++seen[o];
  EXPECT_EQ((seen[{0, 0}]), 3);
  EXPECT_EQ((seen[{0, 1}]), 2);
  EXPECT_EQ((seen[{1, 4}]), 1);
  EXPECT_EQ((seen[{2, 0}]), 5);
  EXPECT_EQ(merge_order(tasks, 0, 0), order);
  EXPECT_NE(merge_order(tasks, 0, 1), order);
  EXPECT_NE(merge_order(tasks, 1, 0), order);
}

TEST(LearnExpertMerging, LowersTheLossAndLeavesWhatIsExcluded) {
  const Models m;
  const auto result = learn_expert_merging(m.base, m.experts, m.tasks, quick());
  ASSERT_EQ(result.losses.size(), 3u);
  EXPECT_LT(*std::min_element(result.losses.begin() + 1, result.losses.end()), result.losses[0]);
  EXPECT_EQ(result.names.size(), 14u);
  for (const char* name : {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"})
    EXPECT_TRUE(torch::equal(of(*result.model, name), of(*m.base, name))) << name;
  // What is written is what the coefficients say.
  const auto alpha = result.alpha.at(kMatrix);
  auto want = of(*m.base, kMatrix);
  for (int64_t k = 0; k < 2; ++k)
    want = want + alpha[k][0] * (of(*m.experts[static_cast<size_t>(k)], kMatrix) - of(*m.base, kMatrix));
  EXPECT_TRUE(torch::allclose(of(*result.model, kMatrix), want, 1e-5, 1e-6));
  EXPECT_GT((alpha - 0.1).abs().min().item<double>(), 1e-3);
}

TEST(LearnExpertMerging, OneExpertIsFound) {
  // With one expert and nothing that holds it, coefficients grow towards it.
  const Models m(1);
  auto c = quick();
  c.reg_weight = 0.0;
  c.epochs = 12;
  c.accumulation = 1;
  const auto result = learn_expert_merging(m.base, m.experts, m.tasks, c);
  double mean = 0.0;
  for (const auto& [name, a] : result.alpha) mean += a.mean().item<double>() / static_cast<double>(result.alpha.size());
  EXPECT_GT(mean, 0.6);
}

TEST(LearnExpertMerging, StaysWhereItIsHeld) {
  const Models m;
  auto c = quick();
  c.lr = 0.0;
  const auto result = learn_expert_merging(m.base, m.experts, m.tasks, c);
  for (const auto& [name, a] : result.alpha) EXPECT_NEAR(a.max().item<double>(), 0.1, 1e-7) << name;
}

TEST(LearnExpertMerging, IsTheSameEveryTime) {
  const Models m;
  const auto one = learn_expert_merging(m.base, m.experts, m.tasks, quick()),
             two = learn_expert_merging(m.base, m.experts, m.tasks, quick());
  for (const auto& [name, a] : one.alpha) EXPECT_TRUE(torch::equal(a, two.alpha.at(name))) << name;
  EXPECT_EQ(one.losses, two.losses);
}

TEST(LearnExpertMerging, PlusPlusGivesChunksToWhatMatters) {
  const Models m;
  auto c = quick();
  c.plus_plus = true;
  c.budget = 1.2;
  const auto result = learn_expert_merging(m.base, m.experts, m.tasks, c);
  ASSERT_EQ(result.chunks.size(), result.names.size());
  int64_t all = 0;
  bool fixed = false, chunked = false;
  for (size_t i = 0; i < result.names.size(); ++i) {
    const auto& a = result.alpha.at(result.names[i]);
    EXPECT_EQ(a.size(1), std::max<int64_t>(1, result.chunks[i]));
    if (result.chunks[i] == 0) {
      EXPECT_NEAR((a - 0.1).abs().max().item<double>(), 0.0, 1e-7);
      fixed = true;
    }
    chunked = chunked || result.chunks[i] > 1;
    all += result.chunks[i];
  }
  EXPECT_TRUE(fixed);
  EXPECT_TRUE(chunked);
  EXPECT_LE(all, 16);  // 1.2 * 14
  EXPECT_EQ(result.losses.size(), 6u);
  EXPECT_TRUE(result.json().contains("chunks"));
}

TEST(LearnExpertMerging, BadInputIsAnError) {
  const Models m;
  const auto says = [&](const std::vector<std::shared_ptr<const Checkpoint>>& experts,
                        const std::vector<MergeTask>& tasks, const ExpertMergingConfig& c) {
    return message_of([&] { learn_expert_merging(m.base, experts, tasks, c); });
  };
  EXPECT_NE(says({}, {}, quick()).find("no expert"), std::string::npos);
  EXPECT_NE(says(m.experts, {m.tasks[0]}, quick()).find("2 experts need data of as many tasks"), std::string::npos);
  EXPECT_NE(says(m.experts, {m.tasks[0], {}}, quick()).find("no data for"), std::string::npos);
  EXPECT_NE(says(m.experts, {m.tasks[0], {{3}}}, quick()).find("fewer than two tokens"), std::string::npos);
  auto c = quick();
  c.init = 1.0;
  EXPECT_NE(says(m.experts, m.tasks, c).find("between 0 and 1"), std::string::npos);
  c = quick();
  c.hidden_layers = {3};
  EXPECT_NE(says(m.experts, m.tasks, c).find("0 to 2"), std::string::npos);
  c = quick();
  c.exclude = {".*"};
  EXPECT_NE(says(m.experts, m.tasks, c).find("every tensor is excluded"), std::string::npos);
  c = quick();
  c.beta = {1.0};
  EXPECT_NE(says(m.experts, m.tasks, c).find("betas"), std::string::npos);
}

}  // namespace
}  // namespace moiety
