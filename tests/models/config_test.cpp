// Readers of config.json: what they make of real ones, and that whatever is done to a config ends in a config or in one
// Error.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "moiety/base/error.h"
#include "moiety/models/decoder_config.h"
#include "moiety/models/encoder_config.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// Shortened from the Hub; every value is the model's own.
const std::vector<json>& decoders() {
  static const std::vector<json> list = [] {
    std::vector<json> l;
    for (const char* text : {
             R"({"model_type":"llama","hidden_size":2048,"intermediate_size":8192,"num_hidden_layers":16,
                 "num_attention_heads":32,"num_key_value_heads":8,"head_dim":64,"vocab_size":128256,"hidden_act":"silu",
                 "max_position_embeddings":131072,"rms_norm_eps":1e-05,"attention_bias":false,"mlp_bias":false,
                 "rope_theta":500000.0,"rope_scaling":{"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,
                 "original_max_position_embeddings":8192,"rope_type":"llama3"},"tie_word_embeddings":true})",
             R"({"model_type":"mixtral","hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,
                 "num_attention_heads":32,"num_key_value_heads":8,"vocab_size":32000,"max_position_embeddings":32768,
                 "num_experts_per_tok":2,"num_local_experts":8,"rms_norm_eps":1e-05,"rope_theta":1e6,
                 "sliding_window":null,"tie_word_embeddings":false})",
             R"({"model_type":"gemma3","tie_word_embeddings":true,"text_config":{"model_type":"gemma3_text",
                 "hidden_size":2560,"intermediate_size":10240,"num_hidden_layers":34,"num_attention_heads":8,
                 "num_key_value_heads":4,"head_dim":256,"vocab_size":262208,"sliding_window":1024,
                 "query_pre_attn_scalar":256,"sliding_window_pattern":6,"rope_local_base_freq":10000.0,
                 "rope_scaling":{"factor":8.0,"rope_type":"linear"},"rope_theta":1e6}})",
             R"({"model_type":"gemma3_text","hidden_size":640,"num_hidden_layers":2,"num_attention_heads":4,
                 "num_key_value_heads":1,"head_dim":256,"vocab_size":262144,"layer_types":["sliding_attention",
                 "full_attention"],"sliding_window":512,"rope_parameters":{"full_attention":{"rope_type":"default",
                 "rope_theta":1e6},"sliding_attention":{"rope_type":"default","rope_theta":10000.0}}})",
             R"({"model_type":"phi3","hidden_size":96,"intermediate_size":256,"num_hidden_layers":2,
                 "num_attention_heads":6,"num_key_value_heads":6,"vocab_size":32064,"max_position_embeddings":131072,
                 "original_max_position_embeddings":4096,"sliding_window":262144,"rope_scaling":{"type":"longrope",
                 "short_factor":[1.0,1.1,1.2,1.3,1.4,1.5,1.6,1.7],"long_factor":[1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0]}})",
             R"({"model_type":"deepseek_v3","hidden_size":7168,"intermediate_size":18432,"num_hidden_layers":61,
                 "num_attention_heads":128,"num_key_value_heads":128,"vocab_size":129280,"q_lora_rank":1536,
                 "kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,
                 "n_routed_experts":256,"n_shared_experts":1,"num_experts_per_tok":8,"n_group":8,"topk_group":4,
                 "moe_intermediate_size":2048,"first_k_dense_replace":3,"routed_scaling_factor":2.5,
                 "norm_topk_prob":true,"rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":1.0,
                 "mscale_all_dim":1.0,"original_max_position_embeddings":4096,"type":"yarn"}})",
             R"({"model_type":"qwen2_moe","hidden_size":2048,"intermediate_size":5632,"num_hidden_layers":24,
                 "num_attention_heads":16,"num_key_value_heads":16,"vocab_size":151936,"decoder_sparse_step":2,
                 "mlp_only_layers":[3],"num_experts":60,"num_experts_per_tok":4,"moe_intermediate_size":1408,
                 "shared_expert_intermediate_size":5632,"use_sliding_window":false,"sliding_window":32768,
                 "max_window_layers":21})",
             R"({"model_type":"gpt_oss","hidden_size":2880,"num_hidden_layers":2,"vocab_size":201088,
                 "layer_types":["sliding_attention","full_attention"],"rope_scaling":{"beta_fast":32.0,"beta_slow":1.0,
                 "factor":32.0,"original_max_position_embeddings":4096,"rope_type":"yarn","truncate":false},
                 "swiglu_limit":7.0,"num_local_experts":32,"experts_per_token":4})",
             R"({"model_type":"smollm3","hidden_size":2048,"num_hidden_layers":4,"vocab_size":128256,
                 "no_rope_layers":[1,1,1,0],"no_rope_layer_interval":4,"use_sliding_window":false})",
             R"({"model_type":"granitemoe","hidden_size":1024,"intermediate_size":512,"num_hidden_layers":24,
                 "num_attention_heads":16,"num_key_value_heads":8,"vocab_size":49155,"num_local_experts":32,
                 "num_experts_per_tok":8,"logits_scaling":6.0,"embedding_multiplier":12.0,"residual_multiplier":0.22,
                 "attention_multiplier":0.015625})",
             R"({"model_type":"cohere2","hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,
                 "num_attention_heads":32,"num_key_value_heads":8,"vocab_size":256000,"sliding_window":4096,
                 "sliding_window_pattern":4,"logit_scale":0.25,"rope_theta":50000,"layer_norm_eps":1e-05})",
         })
      l.push_back(json::parse(text));
    return l;
  }();
  return list;
}

std::vector<json> encoders() {
  std::vector<json> l;
  for (const auto& entry : fs::directory_iterator(fs::path(MOIETY_SOURCE_DIR) / "tests/data/encoders"))
    if (fs::exists(entry.path() / "config.json")) l.push_back(json::parse(std::ifstream(entry.path() / "config.json")));
  std::sort(l.begin(), l.end());
  return l;
}

/// Changes 1 to 3 places of a config, the same for one state of `random`.
json mutated(json config, std::mt19937& random, const std::vector<json>& others) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  static const std::vector<json> garbage = [] {
    std::vector<json> g = {nullptr,
                           true,
                           false,
                           -1,
                           0,
                           1,
                           2,
                           3,
                           7,
                           -1000000,
                           int64_t{1} << 31,
                           int64_t{1} << 40,
                           std::numeric_limits<int64_t>::max(),
                           std::numeric_limits<int64_t>::min(),
                           std::numeric_limits<uint64_t>::max(),
                           0.5,
                           -0.5,
                           1e-300,
                           1e300,
                           -1e300,
                           "",
                           "x",
                           "default",
                           "linear",
                           "dynamic",
                           "yarn",
                           "longrope",
                           "llama3",
                           "relu2",
                           json::array(),
                           json::array({1}),
                           json::array({"full_attention", nullptr, 4}),
                           json::object(),
                           {{"factor", 0}},
                           {{"rope_type", "yarn"}, {"factor", -4}},
                           {{"full_attention", 3}},
                           std::string(5000, 'a')};
    json deep = 1;
    for (int i = 0; i < 200; ++i) deep = i % 2 ? json::array({deep}) : json({{"text_config", deep}});
    g.push_back(deep);
    g.push_back(json(std::vector<int>(1000, -7)));
    return g;
  }();
  for (size_t n = 1 + below(3); n > 0; --n) {
    // A random walk down to the place.
    json* at = &config;
    json* parent = nullptr;
    std::string key;
    do {
      if (at->empty() || !(at->is_object() || at->is_array())) break;
      auto it = at->begin();
      std::advance(it, static_cast<ptrdiff_t>(below(at->size())));
      parent = at;
      key = at->is_object() ? it.key() : "";
      at = &*it;
    } while (below(3) != 0);
    switch (below(4)) {
      case 0:
        if (parent && parent->is_object()) parent->erase(key);
        break;
      case 1: {
        // A value of another model under the same key, or of any key.
        const json& other = others[below(others.size())];
        const json& from = other.contains("text_config") ? other["text_config"] : other;
        if (from.contains(key) && below(2) == 0)
          *at = from[key];
        else
          *at = std::next(from.begin(), static_cast<ptrdiff_t>(below(from.size()))).value();
        break;
      }
      default:
        *at = garbage[below(garbage.size())];
    }
  }
  return config;
}

int64_t peak_kilobytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

template <class Parse>
void expect_config_or_error(const std::vector<json>& configs, int rounds, Parse parse) {
  std::mt19937 random(20260101);
  int accepted = 0, refused = 0;
  const int64_t before = peak_kilobytes();
  for (int round = 0; round < rounds; ++round)
    for (const json& config : configs) {
      const json changed = mutated(config, random, configs);
      try {
        parse(changed);
        ++accepted;
      } catch (const Error& error) {
        EXPECT_GT(std::string(error.what()).size(), 10u);
        ++refused;
      } catch (const std::exception& other) {
        FAIL() << "not an Error but: " << other.what() << "\n" << changed.dump().substr(0, 3000);
      }
    }
  // Both happen often, or the test would see one side only.
  EXPECT_GT(accepted, rounds);
  EXPECT_GT(refused, rounds);
  EXPECT_LT(peak_kilobytes() - before, 64 * 1024);
}

TEST(DecoderConfig, RealConfigsAreRead) {
  for (const json& config : decoders()) {
    SCOPED_TRACE(config.dump().substr(0, 60));
    const auto c = parse_decoder_config(config);
    EXPECT_FALSE(c.layers.empty());
    for (const auto& rope : c.ropes) Rope{rope};
    for (const auto& layer : c.layers) EXPECT_LT(layer.rope, static_cast<int64_t>(c.ropes.size()));
  }
}

TEST(DecoderConfig, MissingKeysTakeTransformersDefaults) {
  const auto bare = [](const char* type, json more = json::object()) {
    json c = {{"model_type", type}, {"vocab_size", 1000}};
    c.update(more);
    return parse_decoder_config(c);
  };
  EXPECT_EQ(bare("starcoder2").kv_heads, 2);
  EXPECT_EQ(bare("qwen3").head_dim, 128);
  EXPECT_EQ(bare("gpt_oss").head_dim, 64);
  EXPECT_EQ(bare("gemma2").head_dim, 256);
  EXPECT_EQ(bare("ernie4_5").head_dim, 128);
  EXPECT_EQ(bare("llama").head_dim, 128);
  for (const char* type : {"gemma", "gemma2", "gemma3", "cohere", "cohere2", "smollm3", "starcoder2", "ernie4_5"})
    EXPECT_TRUE(bare(type).tied) << type;
  for (const char* type : {"llama", "mixtral", "qwen3", "phi", "helium"}) EXPECT_FALSE(bare(type).tied) << type;
  EXPECT_FALSE(bare("gemma", {{"tie_word_embeddings", false}}).tied);
  // Said beside the text model, and by the text model.
  const json text = {{"model_type", "gemma3_text"}, {"vocab_size", 1000}};
  EXPECT_FALSE(parse_decoder_config({{"text_config", text}, {"tie_word_embeddings", false}}).tied);
  EXPECT_DOUBLE_EQ(bare("helium").norm_eps, 1e-8);
  EXPECT_DOUBLE_EQ(bare("glm").norm_eps, 1.5625e-7);
  EXPECT_DOUBLE_EQ(bare("stablelm").norm_eps, 1e-5);
  EXPECT_DOUBLE_EQ(bare("starcoder2").norm_eps, 1e-5);
  EXPECT_DOUBLE_EQ(bare("smollm3").ropes[0].theta, 2e6);
  EXPECT_DOUBLE_EQ(bare("cohere").ropes[0].theta, 5e5);
  EXPECT_DOUBLE_EQ(bare("cohere2").ropes[0].theta, 1e4);
  EXPECT_DOUBLE_EQ(bare("stablelm").ropes[0].partial, 0.25);
  EXPECT_EQ(bare("phi").act, "gelu_new");
  EXPECT_EQ(bare("arcee").act, "relu2");
  EXPECT_EQ(bare("gemma2").layers[0].window, 4096);
  EXPECT_EQ(bare("gemma2").layers[1].window, 0);
  EXPECT_EQ(bare("deepseek_v3").moe.router.groups, 8);
  EXPECT_EQ(bare("deepseek_v3").moe.router.top_k, 8);
  const auto gemma3 = bare("gemma3_text");
  ASSERT_EQ(gemma3.ropes.size(), 2u);
  EXPECT_DOUBLE_EQ(gemma3.ropes[0].theta, 1e6);
  EXPECT_DOUBLE_EQ(gemma3.ropes[1].theta, 1e4);
  EXPECT_EQ(gemma3.layers.size(), 26u);
}

TEST(DecoderConfig, EveryFamilyBuildsItsLayersAndRopesOnce) {
  for (const std::string& family : decoder_families()) {
    SCOPED_TRACE(family);
    const json config = {{"model_type", family},   {"vocab_size", 1000},       {"hidden_size", 64},
                         {"num_hidden_layers", 6}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                         {"head_dim", 16},         {"intermediate_size", 32},  {"num_experts_per_tok", 1}};
    const auto c = parse_decoder_config(config);
    EXPECT_EQ(c.layers.size(), 6u);
    EXPECT_EQ(c.ropes.size(), family == "gemma3" || family == "gemma3_text" ? 2u : 1u);
  }
}

TEST(DecoderConfig, MutationsEndInAConfigOrAnError) {
  expect_config_or_error(decoders(), 3000, [](const json& changed) {
    const auto c = parse_decoder_config(changed);
    for (const auto& rope : c.ropes) Rope{rope};
  });
}

TEST(EncoderConfig, MutationsEndInAConfigOrAnError) {
  expect_config_or_error(encoders(), 3000, [](const json& changed) {
    const auto c = parse_encoder_config(changed);
    if (c.rotary) Rope{c.rope};
    if (c.window > 0) Rope{c.local_rope};
  });
}

}  // namespace
}  // namespace moiety
