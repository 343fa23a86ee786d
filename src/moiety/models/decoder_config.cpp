#include "moiety/models/decoder_config.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/gguf_names.h"
#include "moiety/io/hf_defaults.h"

namespace moiety {
namespace {

using Json = nlohmann::json;

// Limits far above any model that exists, so that products of a few sizes stay far below 63 bits.
constexpr int64_t kMany = int64_t{1} << 28, kLongest = int64_t{1} << 40, kWidest = 65536;

// config.json with typed access and errors that name the key. null counts as absent.
class Keys {
 public:
  explicit Keys(const Json& json) : json_(json) {}
  bool has(const char* key) const {
    const auto it = json_.find(key);
    return it != json_.end() && !it->is_null();
  }
  int64_t integer(const char* key, int64_t fallback) const { return has(key) ? whole(key) : fallback; }
  double number(const char* key, double fallback) const {
    if (!has(key)) return fallback;
    check(json_[key].is_number(), "config.json: '{}' is {}, not a number", key, json_[key].dump());
    return json_[key].get<double>();
  }
  bool flag(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    check(json_[key].is_boolean(), "config.json: '{}' is {}, not true or false", key, json_[key].dump());
    return json_[key].get<bool>();
  }
  std::string string(const char* key, const std::string& fallback) const {
    if (!has(key)) return fallback;
    check(json_[key].is_string(), "config.json: '{}' is {}, not a string", key, json_[key].dump());
    return json_[key].get<std::string>();
  }
  const Json& at(const char* key) const { return json_.at(key); }
  /// A number that must be finite and above zero.
  double positive(const char* key, double fallback) const {
    const double value = number(key, fallback);
    check(std::isfinite(value) && value > 0.0, "config.json: '{}' is {}, it must be positive", key, value);
    return value;
  }
  /// A count or a size: 0 to kMany.
  int64_t count(const char* key, int64_t fallback) const { return size(key, fallback, 0, kMany); }
  /// A number in an inclusive range.
  int64_t size(const char* key, int64_t fallback, int64_t low, int64_t high) const {
    check(has(key) || fallback >= low, "config.json: '{}' is missing", key);
    const int64_t value = integer(key, fallback);
    check(value >= low && value <= high, "config.json: '{}' is {}, allowed is {} to {}", key, value, low, high);
    return value;
  }

 private:
  int64_t whole(const char* key) const {
    const Json& value = json_[key];
    const bool fits = !value.is_number_unsigned() || value.get<uint64_t>() <= std::numeric_limits<int64_t>::max();
    check(value.is_number_integer() && fits, "config.json: '{}' is {}, not a whole number of 63 bits", key,
          value.dump());
    return value.get<int64_t>();
  }
  const Json& json_;
};

RopeConfig rope_of(const Keys& keys, const DecoderConfig& c, const Json& parameters, double theta, double partial) {
  RopeConfig r;
  r.head_dim = c.latent ? c.mla.rope : c.head_dim;
  r.max_positions = c.context;
  r.theta = theta;
  r.partial = partial;
  if (parameters.is_object()) {
    r.parameters = parameters;
    const Keys p(r.parameters);
    r.type = p.string("rope_type", p.string("type", "default"));
    r.theta = p.number("rope_theta", theta);
    r.partial = p.number("partial_rotary_factor", partial);
    if (!p.has("original_max_position_embeddings") && keys.has("original_max_position_embeddings"))
      r.parameters["original_max_position_embeddings"] = keys.at("original_max_position_embeddings");
    check(r.theta > 0.0 && std::isfinite(r.theta), "config.json: rope_theta must be positive, not {}", r.theta);
  }
  if (keys.has("moiety_rope_divisors"))
    for (const Json& x : keys.at("moiety_rope_divisors")) {
      check(x.is_number(), "config.json: 'moiety_rope_divisors' holds {}, not a number", x.dump());
      r.frequency_divisors.push_back(x.get<float>());
    }
  return r;
}

// One rope, or one for full and one for sliding layers (index 1) where the family has two.
void set_ropes(const Keys& keys, DecoderConfig& c, bool interleaved = false, bool two = false) {
  const double partial = keys.number("partial_rotary_factor", 1.0), theta = keys.number("rope_theta", 10000.0);
  const Json none;
  const Json* full = &none;
  const Json* sliding = &none;
  bool nested = false;
  const char* key = keys.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (keys.has(key)) {
    const Json& p = keys.at(key);
    check(p.is_object(), "config.json: '{}' is {}, not an object", key, p.dump());
    nested = p.contains("full_attention") || p.contains("sliding_attention");
    full = nested ? (p.contains("full_attention") ? &p.at("full_attention") : &none) : &p;
    if (nested && p.contains("sliding_attention")) sliding = &p.at("sliding_attention");
  }
  c.ropes.push_back(rope_of(keys, c, *full, theta, partial));
  if (two || nested)
    c.ropes.push_back(rope_of(keys, c, *sliding, keys.number("rope_local_base_freq", two ? 10000.0 : theta), partial));
  for (RopeConfig& r : c.ropes) r.interleaved = interleaved || keys.flag("moiety_rope_interleaved", false);
}

// Window and rope of every layer from layer_types, or from the family's own rule.
void set_layers(const Keys& keys, DecoderConfig& c, int64_t count, const std::function<bool(int64_t)>& sliding_rule) {
  const int64_t window = keys.size("sliding_window", 0, 0, kLongest);
  const bool listed = keys.has("layer_types");
  if (listed)
    check(keys.at("layer_types").is_array() && static_cast<int64_t>(keys.at("layer_types").size()) >= count,
          "config.json: 'layer_types' must name all {} layers", count);
  for (int64_t i = 0; i < count; ++i) {
    LayerConfig layer;
    bool sliding = false;
    if (listed) {
      const Json& type = keys.at("layer_types")[i];
      check(type == "full_attention" || type == "sliding_attention" || type == "chunked_attention",
            "config.json: layer {} is of type {}; full_attention and sliding_attention are supported", i, type.dump());
      sliding = type == "sliding_attention";
    } else {
      sliding = sliding_rule(i);
    }
    if (sliding) layer.window = window;
    layer.rope = sliding && c.ropes.size() > 1 ? 1 : 0;
    c.layers.push_back(layer);
  }
}

const auto kNever = [](int64_t) { return false; };
const auto kAlways = [](int64_t) { return true; };

struct Context {
  const Keys& keys;
  DecoderConfig& c;
  int64_t layers;
};
using Family = std::function<void(Context&)>;

void all_mixture(DecoderConfig& c) {
  for (LayerConfig& layer : c.layers) layer.mixture = true;
}

// One rope; every layer looks at everything, unless layer_types say otherwise.
void plain_layers(Context& x, bool interleaved = false) {
  set_ropes(x.keys, x.c, interleaved);
  set_layers(x.keys, x.c, x.layers, kNever);
}

// One rope; every layer has the window of the config, if there is one.
void windowed_layers(Context& x) {
  set_ropes(x.keys, x.c);
  set_layers(x.keys, x.c, x.layers, kAlways);
}

void llama_biases(Context& x) {
  x.c.qkv_bias = x.c.o_bias = x.keys.flag("attention_bias", x.keys.flag("use_bias", false));
  x.c.mlp_bias = x.keys.flag("mlp_bias", x.keys.flag("use_bias", false));
}

void llama(Context& x) {
  llama_biases(x);
  plain_layers(x);
}

void mistral(Context& x) {
  windowed_layers(x);
}

void qwen2(Context& x) {
  x.c.qkv_bias = true;
  set_ropes(x.keys, x.c);
  const bool use = x.keys.flag("use_sliding_window", false);
  const int64_t from = x.keys.count("max_window_layers", 28);
  set_layers(x.keys, x.c, x.layers, [=](int64_t i) { return use && i >= from; });
}

void qwen3(Context& x) {
  qwen2(x);
  x.c.qkv_bias = x.c.o_bias = x.keys.flag("attention_bias", false);
  x.c.qk_norm = true;
}

void qwen_mixture(Context& x) {
  auto& m = x.c.moe;
  m.experts = x.keys.count("num_experts", x.keys.count("num_local_experts", 0));
  m.width = x.keys.count("moe_intermediate_size", 0);
  m.router.top_k = x.keys.count("num_experts_per_tok", 1);
  m.router.normalize = x.keys.flag("norm_topk_prob", false);
  const int64_t step = x.keys.size("decoder_sparse_step", 1, 1, kMany);
  for (int64_t i = 0; i < x.layers; ++i) x.c.layers[i].mixture = m.experts > 0 && (i + 1) % step == 0;
  if (x.keys.has("mlp_only_layers"))
    for (const Json& i : x.keys.at("mlp_only_layers"))
      if (i.is_number_integer() && i >= 0 && i < x.layers) x.c.layers[i.get<int64_t>()].mixture = false;
}

void qwen2_moe(Context& x) {
  x.c.qkv_bias = x.keys.flag("qkv_bias", false);
  set_ropes(x.keys, x.c);
  const bool use = x.keys.flag("use_sliding_window", false);
  const int64_t below = x.keys.count("max_window_layers", 28);
  set_layers(x.keys, x.c, x.layers, [=](int64_t i) { return use && i % 2 == 0 && i < below; });
  qwen_mixture(x);
  x.c.moe.shared_width = x.keys.count("shared_expert_intermediate_size", 0);
  x.c.moe.shared_gate = x.c.moe.shared_width > 0;
}

void qwen3_moe(Context& x) {
  x.c.qkv_bias = x.c.o_bias = x.keys.flag("attention_bias", false);
  x.c.qk_norm = true;
  set_ropes(x.keys, x.c);
  const bool use = x.keys.flag("use_sliding_window", false);
  set_layers(x.keys, x.c, x.layers, [=](int64_t) { return use; });
  qwen_mixture(x);
}

void gemma_switches(Context& x) {
  auto& c = x.c;
  c.norm = x.keys.flag("moiety_norm_offset_folded", false) ? NormKind::rms : NormKind::rms_offset;
  c.act = x.keys.string("hidden_activation", c.act);
  // Gemma 1 checkpoints say "gelu" and mean the tanh form.
  if (c.act == "gelu") c.act = "gelu_pytorch_tanh";
  c.embedding_scale = std::sqrt(static_cast<double>(c.hidden));
  c.qkv_bias = c.o_bias = x.keys.flag("attention_bias", false);
}

void gemma(Context& x) {
  gemma_switches(x);
  plain_layers(x);
}

// Gemma 2 and 3: norms on both sides, soft caps, the query scale apart from the head size.
void sandwich_gemma_switches(Context& x) {
  gemma_switches(x);
  auto& c = x.c;
  c.placement = Placement::sandwich;
  c.attention_scale = 1.0 / std::sqrt(x.keys.positive("query_pre_attn_scalar", 256.0));
  c.attention_softcap = x.keys.number("attn_logit_softcapping", 0.0);
  c.logits_softcap = x.keys.number("final_logit_softcapping", 0.0);
}

void gemma2(Context& x) {
  sandwich_gemma_switches(x);
  set_ropes(x.keys, x.c);
  set_layers(x.keys, x.c, x.layers, [](int64_t i) { return i % 2 == 0; });
}

void gemma3(Context& x) {
  sandwich_gemma_switches(x);
  x.c.qk_norm = true;
  set_ropes(x.keys, x.c, false, /*two=*/true);
  const int64_t pattern =
      x.keys.size("sliding_window_pattern", x.keys.size("_sliding_window_pattern", 6, 1, kMany), 1, kMany);
  set_layers(x.keys, x.c, x.layers, [=](int64_t i) { return (i + 1) % pattern != 0; });
}

void phi3(Context& x) {
  windowed_layers(x);
}

void phi(Context& x) {
  auto& c = x.c;
  c.norm = NormKind::layer;
  c.gated = false;
  c.placement = Placement::parallel;
  c.qkv_bias = c.o_bias = c.mlp_bias = c.head_bias = true;
  check(!x.keys.flag("qk_layernorm", false), "config.json: 'qk_layernorm' of phi models is not supported");
  plain_layers(x);
}

void smollm3(Context& x) {
  llama_biases(x);
  auto& c = x.c;
  set_ropes(x.keys, c);
  const int64_t interval = x.keys.size("no_rope_layer_interval", 4, 1, kMany);
  std::vector<bool> rope(x.layers);
  for (int64_t i = 0; i < x.layers; ++i) rope[i] = (i + 1) % interval != 0;
  if (x.keys.has("no_rope_layers")) {
    const Json& list = x.keys.at("no_rope_layers");
    check(list.is_array() && static_cast<int64_t>(list.size()) >= x.layers,
          "config.json: 'no_rope_layers' must have one entry for each of the {} layers", x.layers);
    for (int64_t i = 0; i < x.layers; ++i) rope[i] = list[i] == 1 || list[i] == true;
  }
  const bool use = x.keys.flag("use_sliding_window", false);
  set_layers(x.keys, c, x.layers, [&](int64_t i) { return use && !rope[i]; });
  for (int64_t i = 0; i < x.layers; ++i) {
    if (!use) c.layers[i].window = 0;
    if (!rope[i]) c.layers[i].rope = -1;
  }
}

double jitter(const Keys& keys, const char* key) {
  const double value = keys.number(key, 0.0);
  check(value >= 0.0 && value < 1.0, "config.json: '{}' is {}, it must be at least 0 and below 1", key, value);
  return value;
}

void mixtral(Context& x) {
  windowed_layers(x);
  all_mixture(x.c);
  auto& m = x.c.moe;
  m.experts = x.keys.count("num_local_experts", x.keys.count("num_experts", 0));
  m.width = x.c.intermediate;
  m.router.top_k = x.keys.count("num_experts_per_tok", 1);
  m.router.normalize = true;
  m.jitter = jitter(x.keys, "router_jitter_noise");
}

void phimoe(Context& x) {
  mixtral(x);
  auto& c = x.c;
  c.norm = NormKind::layer;
  c.qkv_bias = c.o_bias = x.keys.flag("attention_bias", false);
  c.head_bias = x.keys.flag("lm_head_bias", false);
  c.moe.sparse_mixer = true;
  c.moe.sparse_mixer_jitter = x.keys.number("router_jitter_noise", 0.0);
  c.moe.jitter = jitter(x.keys, "input_jitter_noise");
  for (RopeConfig& r : c.ropes) r.scale_by_length = r.type == "longrope" && r.parameters.contains("short_mscale");
}

void olmoe(Context& x) {
  llama(x);
  auto& c = x.c;
  c.mlp_bias = false;
  c.qk_norm = c.qk_norm_all_heads = true;
  c.clip_qkv = x.keys.number("clip_qkv", 0.0);
  all_mixture(c);
  auto& m = c.moe;
  m.experts = x.keys.count("num_experts", x.keys.count("num_local_experts", 0));
  m.width = c.intermediate;
  m.router.top_k = x.keys.count("num_experts_per_tok", 1);
  m.router.normalize = x.keys.flag("norm_topk_prob", false);
}

void flex_olmo(Context& x) {
  olmoe(x);
  x.c.placement = Placement::post;
}

void olmo(Context& x) {
  llama(x);
  x.c.mlp_bias = false;
  x.c.norm = NormKind::layer_plain;
  x.c.norm_eps = 1e-5;
  x.c.clip_qkv = x.keys.number("clip_qkv", 0.0);
}

void olmo2_switches(Context& x) {
  llama_biases(x);
  x.c.mlp_bias = false;
  x.c.placement = Placement::post;
  x.c.qk_norm = x.c.qk_norm_all_heads = true;
}

void olmo2(Context& x) {
  olmo2_switches(x);
  plain_layers(x);
}

void olmo3(Context& x) {
  olmo2_switches(x);
  set_ropes(x.keys, x.c);
  set_layers(x.keys, x.c, x.layers, [](int64_t i) { return (i + 1) % 4 != 0; });
}

void deepseek_mixture(Context& x) {
  auto& m = x.c.moe;
  m.experts = x.keys.count("n_routed_experts", x.keys.count("num_experts", x.keys.count("num_local_experts", 0)));
  m.width = x.keys.count("moe_intermediate_size", 0);
  m.router.top_k = x.keys.count("num_experts_per_tok", 1);
  m.router.scale = x.keys.number("routed_scaling_factor", 1.0);
  m.shared_width = x.keys.count("n_shared_experts", 0) * m.width;
  m.balance.kind = x.keys.flag("seq_aux", true) ? "sequence" : "switch";
  const int64_t dense = x.keys.count("first_k_dense_replace", 0), every = x.keys.size("moe_layer_freq", 1, 1, kMany);
  for (int64_t i = 0; i < x.layers; ++i) x.c.layers[i].mixture = m.experts > 0 && i >= dense && i % every == 0;
}

void sigmoid_routing(Context& x) {
  auto& m = x.c.moe;
  m.router.scoring = Scoring::sigmoid;
  m.router.normalize = x.keys.flag("norm_topk_prob", true);
  m.router.normalize_eps = 1e-20;
  m.router.groups = x.keys.count("n_group", 1);
  m.router.top_groups = x.keys.count("topk_group", 1);
  m.router.group_by_top2 = true;
  m.choice_bias = true;
}

void latent(Context& x) {
  auto& c = x.c;
  c.latent = true;
  c.mla = {.q_rank = x.keys.count("q_lora_rank", 0),
           .rank = x.keys.size("kv_lora_rank", 512, 1, kMany),
           .nope = x.keys.size("qk_nope_head_dim", 128, 0, kWidest),
           .rope = x.keys.size("qk_rope_head_dim", 64, 2, kWidest),
           .v = x.keys.size("v_head_dim", 128, 1, kWidest)};
  c.o_bias = x.keys.flag("attention_bias", false);
  c.mlp_bias = x.keys.flag("mlp_bias", false);
  c.head_dim = c.mla.nope + c.mla.rope;
  // Rows of the rotary part are in neighbour order in every file of this family.
  plain_layers(x, x.keys.flag("rope_interleave", true));
  c.attention_scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  const RopeConfig& r = c.ropes[0];
  const Keys p(r.parameters);
  const double all = p.number("mscale_all_dim", 0.0), factor = p.number("factor", 1.0);
  if (r.type != "default" && all != 0.0 && factor > 1.0) {
    const double m = 0.1 * all * std::log(factor) + 1.0;
    c.attention_scale *= m * m;
  }
}

void deepseek_v2(Context& x) {
  latent(x);
  deepseek_mixture(x);
  if (x.keys.string("topk_method", "greedy") == "group_limited_greedy") {
    x.c.moe.router.groups = x.keys.count("n_group", 1);
    x.c.moe.router.top_groups = x.keys.count("topk_group", 1);
  }
}

void deepseek_v3(Context& x) {
  latent(x);
  deepseek_mixture(x);
  sigmoid_routing(x);
}

// DeepSeekMoE 16B: Llama attention, softmax routing.
void deepseek(Context& x) {
  llama(x);
  deepseek_mixture(x);
  auto& r = x.c.moe.router;
  r.normalize = x.keys.flag("norm_topk_prob", false);
  r.normalize_eps = 1e-20;
}

void glm4_moe(Context& x) {
  auto& c = x.c;
  c.qkv_bias = x.keys.flag("attention_bias", false);
  c.qk_norm = x.keys.flag("use_qk_norm", false);
  plain_layers(x);
  deepseek_mixture(x);
  sigmoid_routing(x);
}

void dots1(Context& x) {
  auto& c = x.c;
  c.qkv_bias = c.o_bias = x.keys.flag("attention_bias", false);
  c.qk_norm = true;
  plain_layers(x);
  deepseek_mixture(x);
  sigmoid_routing(x);
  x.c.moe.router.normalize = x.keys.flag("norm_topk_prob", false);
}

void granite(Context& x) {
  llama(x);
  auto& c = x.c;
  c.embedding_scale = x.keys.number("embedding_multiplier", 1.0);
  c.residual_scale = x.keys.number("residual_multiplier", 1.0);
  c.logits_scale = 1.0 / x.keys.positive("logits_scaling", 1.0);
  c.attention_scale = x.keys.number("attention_multiplier", 1.0);
}

void granitemoe(Context& x) {
  granite(x);
  x.c.mlp_bias = false;
  all_mixture(x.c);
  auto& m = x.c.moe;
  m.experts = x.keys.count("num_local_experts", 0);
  m.width = x.c.intermediate;
  m.router.top_k = x.keys.count("num_experts_per_tok", 1);
  m.router.scoring = Scoring::softmax_kept;
  m.shared_width = x.keys.count("shared_intermediate_size", 0);
}

void gpt_oss(Context& x) {
  auto& c = x.c;
  c.qkv_bias = c.o_bias = x.keys.flag("attention_bias", false);
  c.sinks = true;
  set_ropes(x.keys, c);
  set_layers(x.keys, c, x.layers, [](int64_t i) { return i % 2 == 0; });
  all_mixture(c);
  auto& m = c.moe;
  m.experts = x.keys.count("num_local_experts", 0);
  m.width = c.intermediate;
  m.router.top_k = x.keys.count("num_experts_per_tok", x.keys.count("experts_per_token", 1));
  m.router.scoring = Scoring::softmax_kept;
  m.router_bias = true;
  m.clamped = true;
  m.clamp_alpha = x.keys.number("swiglu_alpha", 1.702);
  m.clamp_limit = x.keys.number("swiglu_limit", 7.0);
}

void starcoder2(Context& x) {
  auto& c = x.c;
  c.norm = NormKind::layer;
  c.gated = false;
  c.qkv_bias = c.o_bias = c.mlp_bias = x.keys.flag("use_bias", false);
  windowed_layers(x);
}

void stablelm(Context& x) {
  auto& c = x.c;
  c.norm = NormKind::layer;
  c.qkv_bias = x.keys.flag("use_qkv_bias", false);
  c.qk_norm = c.qk_norm_per_head_layer = x.keys.flag("qk_layernorm", false);
  if (x.keys.flag("use_parallel_residual", false)) c.placement = Placement::parallel;
  plain_layers(x);
}

void cohere_switches(Context& x) {
  auto& c = x.c;
  c.norm = NormKind::layer_without_bias;
  c.placement = Placement::parallel;
  c.logits_scale = x.keys.number("logit_scale", 1.0);
  c.qkv_bias = c.o_bias = x.keys.flag("attention_bias", false);
  c.qk_norm = c.qk_norm_per_head_layer = x.keys.flag("use_qk_norm", false);
}

void cohere(Context& x) {
  cohere_switches(x);
  plain_layers(x, /*interleaved=*/true);
}

void cohere2(Context& x) {
  cohere_switches(x);
  auto& c = x.c;
  set_ropes(x.keys, c, /*interleaved=*/true);
  const int64_t pattern = x.keys.size("sliding_window_pattern", 4, 1, kMany);
  set_layers(x.keys, c, x.layers, [=](int64_t i) { return (i + 1) % pattern != 0; });
  for (LayerConfig& layer : c.layers)
    if (layer.window == 0) layer.rope = -1;
}

// Helium and ERNIE 4.5: Llama with neighbouring features rotated.
void interleaved_llama(Context& x) {
  llama_biases(x);
  plain_layers(x, /*interleaved=*/true);
}

void glm(Context& x) {
  auto& c = x.c;
  c.qkv_bias = x.keys.flag("attention_bias", false);
  plain_layers(x, /*interleaved=*/true);
}

void glm4(Context& x) {
  glm(x);
  x.c.placement = Placement::sandwich;
}

void exaone4(Context& x) {
  auto& c = x.c;
  c.placement = Placement::post;
  c.qk_norm = true;
  set_ropes(x.keys, c);
  const bool hybrid = x.keys.has("sliding_window");
  // Older files spell the pattern "LLLG".
  const bool number =
      hybrid && x.keys.has("sliding_window_pattern") && !x.keys.at("sliding_window_pattern").is_string();
  const int64_t pattern = number ? x.keys.count("sliding_window_pattern", 0) : 0;
  const int64_t layers = x.layers;
  set_layers(x.keys, c, layers, [=](int64_t i) { return pattern > 0 && (i + 1) % pattern != 0; });
  // Hybrid models: full-attention layers have no positions.
  if (hybrid)
    for (LayerConfig& layer : c.layers)
      if (layer.window == 0) layer.rope = -1;
}

void seed_oss(Context& x) {
  llama(x);
  x.c.qkv_bias = x.keys.flag("attention_bias", false);
  x.c.o_bias = x.keys.flag("attention_out_bias", false);
}

void hunyuan(Context& x) {
  llama(x);
  x.c.qk_norm = x.c.qk_norm_after_rope = true;
}

// Its mixtures are parts (io/moduleformer_names.h); nothing of it knows positions.
void moduleformer(Context& x) {
  plain_layers(x);
  x.c.norm = NormKind::layer;
  x.c.gated = false;
  for (LayerConfig& layer : x.c.layers) layer.rope = -1;
}

void ungated_llama(Context& x) {
  llama(x);
  x.c.gated = false;
}

const std::map<std::string, Family>& families() {
  static const std::map<std::string, Family> table = {
      {"llama", llama},
      {"mistral", mistral},
      {"ministral", mistral},
      {"qwen2", qwen2},
      {"qwen3", qwen3},
      {"qwen2_moe", qwen2_moe},
      {"qwen3_moe", qwen3_moe},
      {"gemma", gemma},
      {"gemma2", gemma2},
      {"gemma3_text", gemma3},
      {"gemma3", gemma3},
      {"phi", phi},
      {"phi3", phi3},
      {"smollm3", smollm3},
      {"mixtral", mixtral},
      {"phimoe", phimoe},
      {"olmo", olmo},
      {"olmo2", olmo2},
      {"olmo3", olmo3},
      {"olmoe", olmoe},
      {"flex_olmo", flex_olmo},
      {"deepseek", deepseek},
      {"deepseek_v2", deepseek_v2},
      {"deepseek_v3", deepseek_v3},
      {"dots1", dots1},
      {"glm", glm},
      {"glm4", glm4},
      {"glm4_moe", glm4_moe},
      {"granite", granite},
      {"granitemoe", granitemoe},
      {"granitemoeshared", granitemoe},
      {"gpt_oss", gpt_oss},
      {"starcoder2", starcoder2},
      {"stablelm", stablelm},
      {"cohere", cohere},
      {"cohere2", cohere2},
      {"helium", interleaved_llama},
      {"ernie4_5", interleaved_llama},
      {"exaone4", exaone4},
      {"seed_oss", seed_oss},
      {"hunyuan_v1_dense", hunyuan},
      {"arcee", ungated_llama},
      {"moduleformer", moduleformer},
  };
  return table;
}

}  // namespace

std::vector<std::string> decoder_families() {
  std::vector<std::string> names;
  for (const auto& [name, unused] : families()) names.push_back(name);
  return names;
}

namespace {

// What `moiety.experts` says of single layers.
void set_own_experts(const Json& own, DecoderConfig& c) {
  check(own.is_object(), "config.json: 'moiety.experts' is {}, not an object of layers", own.dump());
  for (const auto& [name, entry] : own.items()) {
    const bool number = !name.empty() && name.size() < 7 && name.find_first_not_of("0123456789") == std::string::npos;
    const auto layer = number ? static_cast<size_t>(std::stoul(name)) : c.layers.size();
    check(layer < c.layers.size() && c.layers[layer].mixture,
          "config.json: 'moiety.experts' names '{}', which is no layer with experts", shown(name));
    check(entry.is_object(), "config.json: 'moiety.experts.{}' is {}, not an object", name, entry.dump());
    LayerConfig& l = c.layers[layer];
    l.experts = Keys(entry).size("count", -1, 1, kWidest);
    if (!entry.contains("map")) continue;
    const Json& map = entry["map"];
    check(map.is_array() && !map.empty() && map.size() <= static_cast<size_t>(kWidest),
          "config.json: 'moiety.experts.{}.map' must be a list of experts", name);
    for (const Json& e : map) {
      check(e.is_number_integer() && e >= 0 && e < l.experts,
            "config.json: 'moiety.experts.{}.map' holds {}; the layer has experts 0 to {}", name, e.dump(),
            l.experts - 1);
      l.expert_map.push_back(e.get<int64_t>());
    }
  }
}

}  // namespace

MixtureConfig DecoderConfig::mixture_of(int64_t layer) const {
  MixtureConfig m = moe;
  const LayerConfig& l = layers.at(static_cast<size_t>(layer));
  if (l.experts == 0) return m;
  m.matrices = l.experts;
  m.expert_map = l.expert_map;
  m.experts = l.expert_map.empty() ? l.experts : static_cast<int64_t>(l.expert_map.size());
  m.router.top_k = std::min(m.router.top_k, m.experts);
  return m;
}

DecoderConfig parse_decoder_config(const nlohmann::json& whole) {
  check(whole.is_object(), "config.json must be an object");
  Json json = with_defaults(whole);
  // Some multimodal models say this only beside the text model.
  if (const Json& text = text_config(whole);
      !text.contains("tie_word_embeddings") && whole.contains("tie_word_embeddings"))
    json["tie_word_embeddings"] = whole["tie_word_embeddings"];
  const Keys keys(json);
  DecoderConfig c;
  c.family = keys.string("model_type", Keys(whole).string("model_type", ""));
  check(!c.family.empty(), "config.json: 'model_type' is missing");
  const auto family = families().find(c.family);
  if (family == families().end())
    fail("config.json: model_type '{}' is not supported{}", shown(c.family),
         did_you_mean(c.family, decoder_families()));
  c.vocab = keys.size("vocab_size", -1, 1, kMany);
  c.hidden = keys.size("hidden_size", -1, 1, kMany);
  const int64_t layers = keys.size("num_hidden_layers", -1, 1, 100000);
  c.heads = keys.size("num_attention_heads", -1, 1, kWidest);
  c.kv_heads = keys.size("num_key_value_heads", c.heads, 1, c.heads);
  check(c.heads % c.kv_heads == 0, "config.json: {} attention heads cannot share {} key/value heads", c.heads,
        c.kv_heads);
  c.head_dim = keys.size("head_dim", std::max<int64_t>(1, c.hidden / c.heads), 1, kWidest);
  c.intermediate = keys.count("intermediate_size", 4 * c.hidden);
  c.context = keys.size("max_position_embeddings", 2048, 1, kLongest);
  c.act = keys.string("hidden_act", "silu");
  c.norm_eps = keys.number("rms_norm_eps", keys.number("layer_norm_eps", keys.number("norm_epsilon", 1e-6)));
  check(c.norm_eps >= 0.0 && std::isfinite(c.norm_eps), "config.json: the epsilon of norms is {}", c.norm_eps);
  c.init_std = keys.number("initializer_range", 0.02);
  c.tied = keys.flag("tie_word_embeddings", false);
  Context context{keys, c, layers};
  c.moe.balance.kind = "pooled";
  family->second(context);
  const auto weight = [&](const char* key, double otherwise) {
    const double value = keys.number(key, otherwise);
    check(value >= 0.0 && std::isfinite(value), "config.json: '{}' is {}, it must be at least 0", key, value);
    return value;
  };
  c.moe.balance.coef = weight("router_aux_loss_coef", weight("aux_loss_alpha", 0.0));
  c.moe.balance.z_coef = weight("router_z_loss_coef", 0.0);
  if (const auto own = whole.find("moiety"); own != whole.end() && own->is_object()) {
    c.added_choice_bias = Keys(*own).flag("choice_bias", false);
    if (own->contains("experts")) set_own_experts((*own)["experts"], c);
  }
  if (c.attention_scale == 0.0) c.attention_scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  const bool mixture = std::any_of(c.layers.begin(), c.layers.end(), [](const LayerConfig& l) { return l.mixture; });
  if (mixture || c.moe.experts > 0) {
    check(c.moe.router.top_k >= 1 && c.moe.router.top_k <= c.moe.experts,
          "config.json: {} of {} experts per token is impossible", c.moe.router.top_k, c.moe.experts);
    check(c.moe.width >= 1,
          "config.json: experts of {} hidden units are impossible; is 'moe_intermediate_size' missing?", c.moe.width);
    for (size_t i = 0; i < c.layers.size(); ++i)
      check(c.layers[i].experts == 0 || c.moe.router.groups <= 1,
            "config.json: layer {} has a number of experts of its own, but the model routes in groups of experts", i);
  }
  return c;
}

}  // namespace moiety
