// Trainable models from checkpoints whose tensors are fused, stacked or split otherwise than the model's own: every
// parameter is a leaf, and training it leaves the checkpoint alone.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <set>

#include "moiety/base/error.h"
#include "moiety/models/model.h"
#include "moiety/models/weights_source.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
using Shapes = std::map<std::string, std::vector<int64_t>>;

/// Random tensors of given shapes, in memory.
class MemoryCheckpoint : public Checkpoint {
 public:
  MemoryCheckpoint(json config, const Shapes& shapes, torch::Dtype dtype) : config_(std::move(config)) {
    torch::manual_seed(5);
    for (const auto& [name, shape] : shapes) {
      const auto t = (torch::randn(shape) * 0.3).to(dtype);
      TensorView v;
      v.name = name;
      v.format = format_of(dtype);
      v.shape = shape;
      v.data = {static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()};
      v.owner = std::make_shared<Tensor>(t);
      values[name] = t;
      views_[name] = v;
      infos_.push_back(v);
    }
  }
  const json& config() const override { return config_; }
  const json& generation_config() const override { return none_; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  bool has(const std::string& name) const override { return views_.count(name) > 0; }
  TensorView get(const std::string& name) const override { return views_.at(name); }
  std::filesystem::path path() const override { return "memory"; }
  int64_t bytes_on_disk() const override { return 0; }

  std::map<std::string, Tensor> values;

 private:
  json config_, none_ = json::object();
  std::map<std::string, TensorView> views_;
  std::vector<TensorInfo> infos_;
};

struct Model {
  json config;
  Shapes shapes;
};

Model model_of(const std::string& name) {
  Model m;
  m.config = {
      {"vocab_size", 20},   {"hidden_size", 8},         {"num_hidden_layers", 1}, {"num_attention_heads", 2},
      {"head_dim", 4},      {"num_key_value_heads", 2}, {"intermediate_size", 6}, {"tie_word_embeddings", false},
      {"sliding_window", 8}};
  m.shapes = {{"model.embed_tokens.weight", {20, 8}}, {"model.norm.weight", {8}}, {"lm_head.weight", {20, 8}}};
  const auto layer = [&](const Shapes& more) {
    for (const auto& [key, shape] : more) m.shapes["model.layers.0." + key] = shape;
  };
  const auto attention = [&](bool biased = false) {
    for (const char* p : {"q", "k", "v", "o"}) {
      layer({{"self_attn." + std::string(p) + "_proj.weight", {8, 8}}});
      if (biased) layer({{"self_attn." + std::string(p) + "_proj.bias", {8}}});
    }
  };
  layer({{"input_layernorm.weight", {8}}, {"post_attention_layernorm.weight", {8}}});
  if (name == "phi3") {
    layer({{"self_attn.qkv_proj.weight", {24, 8}},
           {"self_attn.qkv_proj.bias", {24}},
           {"self_attn.o_proj.weight", {8, 8}},
           {"mlp.gate_up_proj.weight", {12, 8}},
           {"mlp.down_proj.weight", {8, 6}}});
  } else if (name == "stablelm") {
    m.config.update({{"qk_layernorm", true}, {"partial_rotary_factor", 0.5}});
    attention();
    for (const char* p : {"gate_proj", "up_proj"}) layer({{"mlp." + std::string(p) + ".weight", {6, 8}}});
    layer({{"mlp.down_proj.weight", {8, 6}}});
    for (const char* h : {"0", "1"})
      for (const char* p : {"q", "k"})
        layer({{"self_attn." + std::string(p) + "_layernorm.norms." + h + ".weight", {4}}});
    for (const char* n : {"input_layernorm.bias", "post_attention_layernorm.bias"}) layer({{n, {8}}});
    m.shapes["model.norm.bias"] = {8};
  } else if (name == "gpt_oss") {
    m.config.update({{"num_local_experts", 3}, {"num_experts_per_tok", 2}});
    attention(true);
    layer({{"self_attn.sinks", {2}},
           {"mlp.router.weight", {3, 8}},
           {"mlp.router.bias", {3}},
           {"mlp.experts.gate_up_proj", {3, 8, 12}},
           {"mlp.experts.gate_up_proj_bias", {3, 12}},
           {"mlp.experts.down_proj", {3, 6, 8}},
           {"mlp.experts.down_proj_bias", {3, 8}}});
  } else {
    const bool fused = name == "olmoe_fused";
    m.config.update({{"num_experts", 3}, {"num_experts_per_tok", 2}});
    attention();
    layer({{"self_attn.q_norm.weight", {8}}, {"self_attn.k_norm.weight", {8}}, {"mlp.gate.weight", {3, 8}}});
    if (fused) layer({{"mlp.experts.gate_up_proj", {3, 12, 8}}, {"mlp.experts.down_proj", {3, 8, 6}}});
    for (int e = 0; e < 3 && !fused; ++e) {
      const std::string at = "mlp.experts." + std::to_string(e) + ".";
      layer({{at + "gate_proj.weight", {6, 8}}, {at + "up_proj.weight", {6, 8}}, {at + "down_proj.weight", {8, 6}}});
    }
  }
  m.config["model_type"] = name.substr(0, name.rfind("_fused"));
  return m;
}

class Trainable : public testing::TestWithParam<std::tuple<const char*, torch::Dtype>> {};

TEST_P(Trainable, ParametersAreLeavesOfTheirOwn) {
  const auto [name, dtype] = GetParam();
  const Model m = model_of(name);
  const MemoryCheckpoint checkpoint(m.config, m.shapes, dtype);
  std::map<std::string, Tensor> before;
  for (const auto& [key, t] : checkpoint.values) before[key] = t.clone();
  const auto ids = torch::randint(20, {2, 6}, torch::kInt64);
  Pass plain_pass, pass;
  const auto mapped = load_causal(checkpoint, {.dtype = "f32"});
  for (auto& p : mapped->parameters()) EXPECT_FALSE(p.requires_grad());
  const auto expected = mapped->forward(ids, plain_pass);
  const auto model = load_causal(checkpoint, {.dtype = "f32", .trainable = true});
  const auto logits = model->forward(ids, pass);
  EXPECT_TRUE(torch::allclose(logits, expected, 1e-6, 1e-6));
  (logits * torch::randn_like(logits)).sum().backward();
  std::set<std::string> names;
  std::set<const void*> memory;
  int64_t elements = 0;
  for (auto& item : model->named_parameters()) {
    SCOPED_TRACE(item.key());
    const auto& p = item.value();
    EXPECT_TRUE(names.insert(item.key()).second);
    EXPECT_TRUE(p.is_leaf());
    EXPECT_TRUE(p.requires_grad());
    EXPECT_TRUE(p.is_contiguous());
    EXPECT_TRUE(memory.insert(p.const_data_ptr()).second) << "two parameters share memory";
    EXPECT_EQ(static_cast<int64_t>(p.storage().nbytes()), p.numel() * 4) << "a view of something larger";
    ASSERT_TRUE(p.grad().defined());
    // The output is free of a constant added to all keys: their bias has no gradient but rounding.
    if (item.key().find("k_proj.bias") == std::string::npos) {
      EXPECT_GT(p.grad().abs().max().item<double>(), 0.0);
    }
    elements += p.numel();
    torch::NoGradGuard frozen;
    p.add_(1.0);
  }
  int64_t stored = 0;
  for (const auto& [key, t] : checkpoint.values) {
    stored += t.numel();
    EXPECT_TRUE(torch::equal(t, before[key])) << key << " of the checkpoint was written to";
  }
  EXPECT_EQ(elements, stored);
}

INSTANTIATE_TEST_SUITE_P(Weights, Trainable,
                         testing::Combine(testing::Values("phi3", "stablelm", "gpt_oss", "olmoe", "olmoe_fused"),
                                          testing::Values(torch::kFloat32, torch::kBFloat16)),
                         [](const auto& p) {
                           return std::string(std::get<0>(p.param)) +
                                  (std::get<1>(p.param) == torch::kFloat32 ? "_f32" : "_bf16");
                         });

TEST(WeightsSource, LeftoverAndMisshapenTensorsAreNamed) {
  Model m = model_of("phi3");
  m.shapes["model.layers.0.self_attn.mystery.weight"] = {3};
  const auto message = [&] {
    try {
      load_causal(MemoryCheckpoint(m.config, m.shapes, torch::kFloat32));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message().find("mystery"), std::string::npos) << message();
  m.shapes.erase("model.layers.0.self_attn.mystery.weight");
  m.shapes["model.layers.0.mlp.down_proj.weight"] = {8, 7};
  EXPECT_NE(message().find("down_proj"), std::string::npos) << message();
  m.shapes.erase("model.layers.0.mlp.down_proj.weight");
  EXPECT_NE(message().find("down_proj"), std::string::npos) << message();
}

}  // namespace
}  // namespace moiety
