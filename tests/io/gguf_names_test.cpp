#include "moiety/io/gguf_names.h"

#include <gtest/gtest.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/io/hf_defaults.h"

namespace moiety {
namespace {

using nlohmann::json;

struct Family {
  const char* type;
  std::vector<const char*> names;  ///< HF names, layer 3
};

const std::vector<const char*> kLlamaNames = {"model.embed_tokens.weight",
                                              "model.norm.weight",
                                              "lm_head.weight",
                                              "model.layers.3.input_layernorm.weight",
                                              "model.layers.3.post_attention_layernorm.weight",
                                              "model.layers.3.self_attn.q_proj.weight",
                                              "model.layers.3.self_attn.k_proj.weight",
                                              "model.layers.3.self_attn.v_proj.bias",
                                              "model.layers.3.self_attn.o_proj.weight",
                                              "model.layers.3.mlp.gate_proj.weight",
                                              "model.layers.3.mlp.up_proj.weight",
                                              "model.layers.3.mlp.down_proj.weight",
                                              "moiety.rope_freqs"};

std::vector<Family> families() {
  std::vector<Family> all;
  for (const char* type : {"llama", "mistral", "smollm3", "qwen2", "gemma", "granite", "deepseek"})
    all.push_back({type, kLlamaNames});
  auto with = [](std::vector<const char*> more) {
    std::vector<const char*> names = {"model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight",
                                      "model.layers.3.self_attn.o_proj.weight"};
    names.insert(names.end(), more.begin(), more.end());
    return names;
  };
  const std::vector<const char*> stacks = {"model.layers.3.mlp.experts.gate_proj", "model.layers.3.mlp.experts.up_proj",
                                           "model.layers.3.mlp.experts.down_proj"};
  auto mixture = [&](std::vector<const char*> more) {
    auto names = with(more);
    names.insert(names.end(), stacks.begin(), stacks.end());
    return names;
  };
  all.push_back({"qwen3", with({"model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn.k_norm.weight"})});
  all.push_back({"mixtral", mixture({"model.layers.3.block_sparse_moe.gate.weight",
                                     "model.layers.3.block_sparse_moe.experts.7.w1.weight",
                                     "model.layers.3.block_sparse_moe.experts.7.w2.weight",
                                     "model.layers.3.block_sparse_moe.experts.7.w3.weight"})});
  all.push_back({"phimoe", mixture({"model.layers.3.block_sparse_moe.gate.weight",
                                    "model.layers.3.input_layernorm.bias", "lm_head.bias", "model.norm.bias"})});
  all.push_back(
      {"qwen2_moe",
       mixture({"model.layers.3.mlp.gate.weight", "model.layers.3.mlp.shared_expert.gate_proj.weight",
                "model.layers.3.mlp.shared_expert_gate.weight", "model.layers.3.mlp.experts.12.gate_proj.weight"})});
  all.push_back({"qwen3_moe", mixture({"model.layers.3.mlp.gate.weight", "model.layers.3.self_attn.k_norm.weight"})});
  all.push_back({"olmoe", mixture({"model.layers.3.mlp.gate.weight", "model.layers.3.self_attn.q_norm.weight"})});
  all.push_back({"olmo2", with({"model.layers.3.post_attention_layernorm.weight",
                                "model.layers.3.post_feedforward_layernorm.weight"})});
  for (const char* type : {"gemma2", "gemma3_text"})
    all.push_back(
        {type, with({"model.layers.3.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight",
                     "model.layers.3.pre_feedforward_layernorm.weight",
                     "model.layers.3.post_feedforward_layernorm.weight"})});
  all.push_back({"phi3",
                 {"model.layers.3.self_attn.qkv_proj.weight", "model.layers.3.mlp.gate_up_proj.weight",
                  "model.layers.3.mlp.down_proj.weight", "moiety.rope_factors_long", "moiety.rope_factors_short"}});
  for (const char* type : {"deepseek_v2", "deepseek_v3"})
    all.push_back(
        {type,
         mixture({"model.layers.3.self_attn.q_a_proj.weight", "model.layers.3.self_attn.q_b_proj.weight",
                  "model.layers.3.self_attn.q_a_layernorm.weight", "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
                  "model.layers.3.self_attn.kv_a_layernorm.weight", "model.layers.3.self_attn.kv_b_proj.weight",
                  "model.layers.3.self_attn.k_b_proj", "model.layers.3.self_attn.v_b_proj",
                  "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.e_score_correction_bias",
                  "model.layers.3.mlp.shared_experts.up_proj.weight"})});
  for (const char* type : {"granitemoe", "granitemoeshared"})
    all.push_back({type, mixture({"model.layers.3.block_sparse_moe.router.layer.weight",
                                  "model.layers.3.shared_mlp.output_linear.weight"})});
  all.push_back({"gpt_oss", mixture({"model.layers.3.self_attn.sinks", "model.layers.3.mlp.router.weight",
                                     "model.layers.3.mlp.router.bias", "model.layers.3.mlp.experts.gate_proj_bias",
                                     "model.layers.3.post_attention_layernorm.weight"})});
  for (const char* type : {"bert", "roberta"})
    all.push_back({type,
                   {"embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias",
                    "encoder.layer.3.attention.self.query.weight", "encoder.layer.3.attention.output.LayerNorm.weight",
                    "encoder.layer.3.output.dense.bias", "encoder.layer.3.output.LayerNorm.weight"}});
  all.push_back({"distilbert",
                 {"embeddings.position_embeddings.weight", "transformer.layer.3.attention.q_lin.weight",
                  "transformer.layer.3.ffn.lin2.bias", "transformer.layer.3.sa_layer_norm.weight"}});
  all.push_back(
      {"nomic_bert", {"encoder.layers.3.attn.Wqkv.weight", "encoder.layers.3.mlp.fc11.weight", "emb_ln.weight"}});
  return all;
}

TEST(GgufNames, ThereAndBackIsTheSameName) {
  for (const Family& f : families())
    for (const char* name : f.names) {
      const auto gguf = gguf_tensor_name(f.type, name);
      ASSERT_TRUE(gguf.has_value()) << f.type << ": " << name;
      EXPECT_EQ(hf_tensor_name(f.type, *gguf), name) << f.type << ": " << *gguf;
    }
}

TEST(GgufNames, KnownPairs) {
  EXPECT_EQ(gguf_tensor_name("llama", "model.layers.11.self_attn.q_proj.weight"), "blk.11.attn_q.weight");
  EXPECT_EQ(hf_tensor_name("gemma3_text", "blk.0.ffn_norm.weight"), "model.layers.0.pre_feedforward_layernorm.weight");
  EXPECT_EQ(hf_tensor_name("llama", "blk.0.ffn_norm.weight"), "model.layers.0.post_attention_layernorm.weight");
  EXPECT_EQ(hf_tensor_name("olmo2", "blk.0.post_ffw_norm.weight"), "model.layers.0.post_feedforward_layernorm.weight");
  EXPECT_EQ(hf_tensor_name("gpt_oss", "blk.0.post_attention_norm.weight"),
            "model.layers.0.post_attention_layernorm.weight");
  EXPECT_EQ(hf_tensor_name("mixtral", "blk.0.ffn_gate.5.weight"),
            "model.layers.0.block_sparse_moe.experts.5.w1.weight");
  EXPECT_EQ(gguf_tensor_name("mixtral", "model.layers.0.block_sparse_moe.experts.5.w2.weight"),
            "blk.0.ffn_down.5.weight");
  EXPECT_EQ(gguf_tensor_name("mixtral", "model.layers.0.mlp.gate.weight"), "blk.0.ffn_gate_inp.weight");
  EXPECT_EQ(hf_tensor_name("phi3", "blk.2.ffn_up.weight"), "model.layers.2.mlp.gate_up_proj.weight");
}

TEST(GgufNames, UnknownNamesKeepTheirOwn) {
  EXPECT_EQ(hf_tensor_name("llama", "blk.0.ssm_conv1d.weight"), "gguf.blk.0.ssm_conv1d.weight");
  EXPECT_EQ(gguf_tensor_name("llama", "gguf.blk.0.ssm_conv1d.weight"), "blk.0.ssm_conv1d.weight");
  EXPECT_EQ(hf_tensor_name("llama", "blk.x.attn_q.weight"), "gguf.blk.x.attn_q.weight");
  EXPECT_EQ(gguf_tensor_name("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), std::nullopt);
  EXPECT_EQ(gguf_tensor_name("qwen2_moe", "model.layers.0.mlp.experts.1.gate_proj"), std::nullopt);
}

TEST(GgufNames, EveryFamilyHasAnArchitecture) {
  for (const Family& f : families())
    EXPECT_NE(find_gguf_arch(gguf_arch_of({{"model_type", f.type}})), nullptr) << f.type;
  EXPECT_THROW(gguf_arch_of({{"model_type", "no_such_model"}}), Error);
  EXPECT_TRUE(find_gguf_arch("llama")->rope_interleaved);
  EXPECT_FALSE(find_gguf_arch("qwen2")->rope_interleaved);
  EXPECT_TRUE(find_gguf_arch("gemma2")->norm_offset_folded);
}

/// The config that the standard keys of a file give back, from a file with the tensors that tell the families apart.
json through_file(const json& config, const std::vector<std::pair<std::string, std::vector<int64_t>>>& tensors) {
  const TemporaryFolder folder;
  GgufWriter writer(folder / "m.gguf");
  writer.set("general.architecture", gguf_arch_of(config));
  write_gguf_config(writer, config);
  std::vector<TensorInfo> all;
  for (int64_t i = 0; i < 8; ++i) all.push_back({fmt::format("blk.{}.attn_norm.weight", i), Format::F32, {4}});
  for (const auto& [name, shape] : tensors) all.push_back({name, Format::F32, shape});
  const auto freqs = llama3_rope_freqs(config);
  if (!freqs.empty()) all.push_back({"rope_freqs.weight", Format::F32, {static_cast<int64_t>(freqs.size())}});
  for (const auto& t : all) writer.declare(t);
  for (const auto& t : all) {
    std::vector<float> values(static_cast<size_t>(t.elements()), 0.5f);
    if (t.name == "rope_freqs.weight") values = freqs;
    writer.write(t.name, std::as_bytes(std::span(values)));
  }
  writer.finish();
  return hf_config(*GgufFile::open(folder / "m.gguf"), true);
}

const json kBase = {{"hidden_size", 64},        {"intermediate_size", 96},  {"num_hidden_layers", 3},
                    {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"max_position_embeddings", 512},
                    {"rms_norm_eps", 1e-5},     {"vocab_size", 320}};

json config_with(const char* type, json more) {
  json c = kBase;
  c["model_type"] = type;
  c.update(more);
  return c;
}

void expect_same(const json& config, const json& back) {
  for (const auto& [key, value] : config.items()) {
    if (key == "rope_scaling") continue;
    ASSERT_TRUE(back.contains(key)) << config["model_type"] << ": " << key;
    EXPECT_EQ(back[key], value) << config["model_type"] << ": " << key;
  }
}

TEST(GgufConfig, SurvivesTheFile) {
  const std::vector<std::pair<std::string, std::vector<int64_t>>> own_head = {{"token_embd.weight", {320, 64}},
                                                                              {"output.weight", {320, 64}}};
  expect_same(config_with("llama", {{"head_dim", 16},
                                    {"tie_word_embeddings", false},
                                    {"rope_parameters",
                                     {{"rope_type", "llama3"},
                                      {"rope_theta", 500000.0},
                                      {"factor", 8.0},
                                      {"low_freq_factor", 1.0},
                                      {"high_freq_factor", 4.0},
                                      {"original_max_position_embeddings", 128}}}}),
              through_file(config_with("llama", {{"head_dim", 16},
                                                 {"rope_parameters",
                                                  {{"rope_type", "llama3"},
                                                   {"rope_theta", 500000.0},
                                                   {"factor", 8.0},
                                                   {"low_freq_factor", 1.0},
                                                   {"high_freq_factor", 4.0},
                                                   {"original_max_position_embeddings", 128}}}}),
                           own_head));
  const std::vector<json> configs = {
      config_with("llama", {{"rope_parameters", {{"rope_type", "linear"}, {"rope_theta", 10000.0}, {"factor", 2.0}}}}),
      config_with("mistral", {{"sliding_window", 16}, {"head_dim", 16}}),
      config_with("mixtral", {{"num_local_experts", 4},
                              {"num_experts_per_tok", 2},
                              {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}}}),
      config_with(
          "qwen3",
          {{"head_dim", 32},
           {"rope_parameters",
            {{"rope_type", "yarn"}, {"rope_theta", 1e6}, {"factor", 4.0}, {"original_max_position_embeddings", 128}}}}),
      config_with("qwen2_moe", {{"num_experts", 4},
                                {"num_experts_per_tok", 2},
                                {"moe_intermediate_size", 32},
                                {"shared_expert_intermediate_size", 48},
                                {"norm_topk_prob", false}}),
      config_with("qwen3_moe", {{"num_experts", 4},
                                {"num_experts_per_tok", 2},
                                {"moe_intermediate_size", 32},
                                {"norm_topk_prob", true},
                                {"head_dim", 32}}),
      config_with("olmoe",
                  {{"num_experts", 4}, {"num_experts_per_tok", 2}, {"norm_topk_prob", false}, {"clip_qkv", 8.0}}),
      config_with("gemma", {{"head_dim", 32}, {"hidden_act", "gelu_pytorch_tanh"}}),
      config_with("gemma2", {{"head_dim", 32},
                             {"sliding_window", 16},
                             {"query_pre_attn_scalar", 32},
                             {"attn_logit_softcapping", 50.0},
                             {"final_logit_softcapping", 30.0},
                             {"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}}}),
      config_with("gemma3_text", {{"head_dim", 32},
                                  {"sliding_window", 16},
                                  {"query_pre_attn_scalar", 32},
                                  {"layer_types", {"full_attention", "sliding_attention", "sliding_attention"}},
                                  {"rope_parameters",
                                   {{"full_attention", {{"rope_type", "linear"}, {"rope_theta", 1e6}, {"factor", 8.0}}},
                                    {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 10000.0}}}}}}),
      config_with("phi3", {{"sliding_window", 7}, {"original_max_position_embeddings", 512}}),
      config_with("phimoe", {{"num_local_experts", 4}, {"num_experts_per_tok", 2}, {"sliding_window", nullptr}}),
      config_with("deepseek_v2", {{"num_key_value_heads", 4},
                                  {"q_lora_rank", nullptr},
                                  {"kv_lora_rank", 32},
                                  {"qk_rope_head_dim", 8},
                                  {"qk_nope_head_dim", 16},
                                  {"v_head_dim", 12},
                                  {"n_routed_experts", 8},
                                  {"num_experts_per_tok", 2},
                                  {"n_shared_experts", 1},
                                  {"n_group", 4},
                                  {"topk_group", 2},
                                  {"topk_method", "group_limited_greedy"},
                                  {"moe_intermediate_size", 32},
                                  {"first_k_dense_replace", 1},
                                  {"routed_scaling_factor", 1.5},
                                  {"norm_topk_prob", false}}),
      config_with("deepseek_v3", {{"num_key_value_heads", 4},
                                  {"q_lora_rank", 24},
                                  {"kv_lora_rank", 32},
                                  {"qk_rope_head_dim", 8},
                                  {"qk_nope_head_dim", 16},
                                  {"v_head_dim", 12},
                                  {"n_routed_experts", 8},
                                  {"num_experts_per_tok", 2},
                                  {"n_shared_experts", 1},
                                  {"n_group", 4},
                                  {"topk_group", 2},
                                  {"moe_intermediate_size", 32},
                                  {"first_k_dense_replace", 1},
                                  {"routed_scaling_factor", 2.5},
                                  {"norm_topk_prob", true},
                                  {"rope_parameters",
                                   {{"rope_type", "yarn"},
                                    {"rope_theta", 10000.0},
                                    {"factor", 4.0},
                                    {"mscale", 0.75},
                                    {"mscale_all_dim", 0.75},
                                    {"beta_fast", 32.0},
                                    {"beta_slow", 1.0},
                                    {"original_max_position_embeddings", 128}}}}),
      config_with("granite", {{"embedding_multiplier", 12.0},
                              {"logits_scaling", 8.0},
                              {"residual_multiplier", 0.22},
                              {"attention_multiplier", 0.0625}}),
      config_with("granitemoeshared", {{"num_local_experts", 4},
                                       {"num_experts_per_tok", 2},
                                       {"shared_intermediate_size", 48},
                                       {"embedding_multiplier", 2.0}}),
      config_with("gpt_oss", {{"num_local_experts", 4},
                              {"num_experts_per_tok", 2},
                              {"head_dim", 16},
                              {"sliding_window", 16},
                              {"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}},
                              {"rope_parameters",
                               {{"rope_type", "yarn"},
                                {"rope_theta", 150000.0},
                                {"factor", 32.0},
                                {"beta_fast", 32.0},
                                {"beta_slow", 1.0},
                                {"truncate", false},
                                {"original_max_position_embeddings", 4096}}}}),
      config_with("olmo2", json::object()),
      config_with("olmo3",
                  {{"sliding_window", 16}, {"layer_types", {"sliding_attention", "full_attention", "full_attention"}}}),
      config_with("smollm3", {{"no_rope_layers", {1, 1, 1}}}),
  };
  for (const json& c : configs) expect_same(c, through_file(c, own_head));
}

TEST(GgufConfig, TellsTiedEmbeddingsAndFlags) {
  const json c = through_file(config_with("llama", json::object()), {{"token_embd.weight", {320, 64}}});
  EXPECT_EQ(c["tie_word_embeddings"], true);
  EXPECT_EQ(c["moiety_rope_interleaved"], true);
  EXPECT_FALSE(c.contains("moiety_norm_offset_folded"));
  EXPECT_FALSE(c.contains("moiety_rope_freqs"));
}

TEST(GgufConfig, DivisorsOfNoKnownKindRaiseTheFlag) {
  const TemporaryFolder folder;
  GgufWriter writer(folder / "m.gguf");
  writer.set("general.architecture", std::string("llama"));
  write_gguf_config(writer, config_with("llama", json::object()));
  const std::vector<float> divisors = {1, 3, 1, 9, 2, 1, 5, 7};
  for (int64_t i = 0; i < 3; ++i) writer.declare({fmt::format("blk.{}.attn_norm.weight", i), Format::F32, {1}});
  writer.declare({"rope_freqs.weight", Format::F32, {8}});
  for (int64_t i = 0; i < 3; ++i)
    writer.write(fmt::format("blk.{}.attn_norm.weight", i), std::as_bytes(std::span(divisors).first(1)));
  writer.write("rope_freqs.weight", std::as_bytes(std::span(divisors)));
  writer.finish();
  const json c = hf_config(*GgufFile::open(folder / "m.gguf"));
  EXPECT_EQ(c["moiety_rope_freqs"], true);
  EXPECT_EQ(c["rope_parameters"]["rope_type"], "default");
}

TEST(GgufConfig, BadFilesAreErrors) {
  const TemporaryFolder folder;
  auto open = [&](const std::function<void(GgufWriter&)>& fill) {
    GgufWriter writer(folder / "bad.gguf");
    fill(writer);
    writer.declare({"token_embd.weight", Format::F32, {1}});
    const float one = 1;
    writer.write("token_embd.weight", std::as_bytes(std::span(&one, 1)));
    writer.finish();
    return hf_config(*GgufFile::open(folder / "bad.gguf"));
  };
  EXPECT_THROW(open([](GgufWriter&) {}), Error);  // no architecture
  EXPECT_THROW(open([](GgufWriter& w) { w.set("general.architecture", std::string("mamba")); }), Error);  // unknown
  EXPECT_THROW(open([](GgufWriter& w) { w.set("general.architecture", std::string("llama")); }), Error);  // no sizes
  EXPECT_THROW(open([](GgufWriter& w) {  // absurd count
                 w.set("general.architecture", std::string("llama"));
                 w.set_u32("llama.block_count", 4000000000u);
               }),
               Error);
  EXPECT_THROW(open([](GgufWriter& w) {
                 w.set("general.architecture", std::string("llama"));
                 w.set("moiety.config", std::string("[1,"));
               }),
               Error);
}

TEST(HfDefaults, FillWhatIsMissingOnly) {
  const json c = with_defaults({{"model_type", "mixtral"}, {"num_local_experts", 6}, {"sliding_window", nullptr}});
  EXPECT_EQ(c["num_local_experts"], 6);
  EXPECT_EQ(c["num_experts_per_tok"], 2);
  EXPECT_TRUE(c["sliding_window"].is_null());
  EXPECT_FALSE(with_defaults({{"model_type", "qwen3_moe"}, {"num_local_experts", 4}}).contains("num_experts"));
  EXPECT_EQ(with_defaults({{"model_type", "unheard"}}).size(), 1u);
}

}  // namespace
}  // namespace moiety
