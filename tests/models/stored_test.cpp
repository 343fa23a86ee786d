// What a model says it stores is what loads again, for every family and layout.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>

#include "moiety/base/files.h"
#include "moiety/io/checkpoint.h"
#include "moiety/models/decoder_config.h"
#include "moiety/models/model.h"
#include "moiety/train/run_folder.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

json config_of(const std::string& family) {
  return {{"model_type", family},
          {"vocab_size", 40},
          {"hidden_size", 32},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 8},
          {"intermediate_size", 24},
          {"max_position_embeddings", 64},
          {"moe_intermediate_size", 24},
          {"num_experts", 4},
          {"num_local_experts", 4},
          {"n_routed_experts", 4},
          {"num_experts_per_tok", 2},
          {"n_group", 2},
          {"topk_group", 1},
          {"first_k_dense_replace", 1},
          {"moe_num_experts", 4},
          {"moe_k", 2},
          {"n_shared_experts", 1},
          {"q_lora_rank", 12},
          {"kv_lora_rank", 16},
          {"qk_nope_head_dim", 8},
          {"qk_rope_head_dim", 4},
          {"v_head_dim", 8},
          {"shared_expert_intermediate_size", 24},
          {"shared_intermediate_size", 24},
          {"tie_word_embeddings", false},
          {"sliding_window", 16},
          {"pad_token_id", 0},
          {"decoder_sparse_step", 1},
          {"moe_layer_start_index", 0},
          {"moe_intermediate_size_list", json::array()}};
}

NamedTensors stored(const CausalModel& model) {
  const torch::NoGradGuard frozen;
  NamedTensors out;
  for (const auto& s : model.stored()) {
    EXPECT_EQ(out.count(s.name), 0u) << s.name;
    out[s.name] = s.value().detach().clone();
  }
  return out;
}

void save(const CausalModel& model, const fs::path& folder) {
  fs::create_directories(folder);
  write_file(folder / "config.json", model.config().dump());
  write_tensors(folder / "model.safetensors", stored(model));
}

Tensor logits(CausalModel& model) {
  const torch::NoGradGuard frozen;
  Pass pass;
  return model.forward((torch::arange(24) % 40).view({2, 12}), pass);
}

void expect_same(const NamedTensors& a, const NamedTensors& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, t] : a) {
    ASSERT_EQ(b.count(name), 1u) << name;
    EXPECT_TRUE(torch::equal(t, b.at(name))) << name;
  }
}

TEST(Stored, NewModelsOfAllFamiliesLoadAgain) {
  for (const auto& family : decoder_families()) {
    SCOPED_TRACE(family);
    auto config = config_of(family);
    config.erase("moe_intermediate_size_list");
    const TemporaryFolder folder;
    torch::manual_seed(6);
    LoadOptions options;
    options.trainable = true;
    const auto model = make_causal(config, options);
    {
      // Norms and biases too are told apart.
      const torch::NoGradGuard frozen;
      for (auto& p : model->parameters()) p.add_(torch::randn_like(p) * 0.05);
    }
    save(*model, folder / "a");
    const auto checkpoint = Checkpoint::open((folder / "a").string());
    const auto again = load_causal(*checkpoint, options);
    EXPECT_TRUE(torch::equal(logits(*model), logits(*again)));
    expect_same(stored(*model), stored(*again));
    // Mapped and not trainable: the same tensors.
    expect_same(stored(*model), stored(*load_causal(*checkpoint)));
  }
}

TEST(Stored, FollowsTheParameters) {
  LoadOptions options;
  options.trainable = true;
  const auto model = make_causal(config_of("phi3"), options);
  const auto before = stored(*model);
  {
    const torch::NoGradGuard frozen;
    for (auto& p : model->parameters()) p.add_(1.0);
  }
  const auto after = stored(*model);
  for (const auto& [name, t] : before) EXPECT_TRUE(torch::allclose(t + 1.0, after.at(name))) << name;
}

TEST(Stored, TransformersNamesOfFusedTensors) {
  const auto names = [](const char* family) {
    std::set<std::string> out;
    auto config = config_of(family);
    for (const auto& s : make_causal(config)->stored()) out.insert(s.name);
    return out;
  };
  EXPECT_EQ(names("phi3").count("model.layers.1.self_attn.qkv_proj.weight"), 1u);
  EXPECT_EQ(names("phi3").count("model.layers.0.mlp.gate_up_proj.weight"), 1u);
  EXPECT_EQ(names("gpt_oss").count("model.layers.0.mlp.router.bias"), 1u);
  EXPECT_EQ(names("gpt_oss").count("model.layers.0.mlp.experts.gate_up_proj_bias"), 1u);
  EXPECT_EQ(names("mixtral").count("model.layers.0.mlp.experts.gate_up_proj"), 1u);
  EXPECT_EQ(names("llama").count("lm_head.weight"), 1u);
}

}  // namespace
}  // namespace moiety
