#include "moiety/io/gguf_names.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <numbers>
#include <unordered_map>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/hf_defaults.h"

using nlohmann::json;

namespace moiety {
namespace {

constexpr GgufArch kArchs[] = {
    {"llama", true, false},      {"smollm3", true, false},   {"qwen2", false, false},     {"qwen3", false, false},
    {"qwen2moe", false, false},  {"qwen3moe", false, false}, {"olmoe", false, false},     {"olmo2", false, false},
    {"gemma", false, true},      {"gemma2", false, true},    {"gemma3", false, true},     {"phi3", false, false},
    {"phimoe", false, false},    {"deepseek", true, false},  {"deepseek2", false, false}, {"granite", true, false},
    {"granitemoe", true, false}, {"gpt-oss", false, false},  {"bert", false, false},      {"nomic-bert", false, false},
};

struct TypeToArch {
  std::string_view model_type, arch, architecture;
};
constexpr TypeToArch kTypes[] = {
    {"llama", "llama", "LlamaForCausalLM"},
    {"mistral", "llama", "MistralForCausalLM"},
    {"mixtral", "llama", "MixtralForCausalLM"},
    {"smollm3", "smollm3", "SmolLM3ForCausalLM"},
    {"qwen2", "qwen2", "Qwen2ForCausalLM"},
    {"qwen3", "qwen3", "Qwen3ForCausalLM"},
    {"qwen2_moe", "qwen2moe", "Qwen2MoeForCausalLM"},
    {"qwen3_moe", "qwen3moe", "Qwen3MoeForCausalLM"},
    {"olmoe", "olmoe", "OlmoeForCausalLM"},
    {"olmo2", "olmo2", "Olmo2ForCausalLM"},
    {"olmo3", "olmo2", "Olmo3ForCausalLM"},
    {"gemma", "gemma", "GemmaForCausalLM"},
    {"gemma2", "gemma2", "Gemma2ForCausalLM"},
    {"gemma3_text", "gemma3", "Gemma3ForCausalLM"},
    {"gemma3", "gemma3", "Gemma3ForConditionalGeneration"},
    {"phi3", "phi3", "Phi3ForCausalLM"},
    {"phimoe", "phimoe", "PhimoeForCausalLM"},
    {"deepseek", "deepseek", "DeepseekForCausalLM"},
    {"deepseek_v2", "deepseek2", "DeepseekV2ForCausalLM"},
    {"deepseek_v3", "deepseek2", "DeepseekV3ForCausalLM"},
    {"granite", "granite", "GraniteForCausalLM"},
    {"granitemoe", "granitemoe", "GraniteMoeForCausalLM"},
    {"granitemoeshared", "granitemoe", "GraniteMoeSharedForCausalLM"},
    {"gpt_oss", "gpt-oss", "GptOssForCausalLM"},
    {"bert", "bert", "BertModel"},
    {"roberta", "bert", "RobertaModel"},
    {"distilbert", "bert", "DistilBertModel"},
    {"nomic_bert", "nomic-bert", "NomicBertModel"},
};

const TypeToArch* find_type(std::string_view model_type) {
  for (const auto& t : kTypes)
    if (t.model_type == model_type) return &t;
  return nullptr;
}

// ---- Tensor names ----

/// Both directions of one family. Keys of layer maps are what follows "blk.N." and the HF layer prefix with its number.
struct Names {
  std::string hf_layer;                                                     // "model.layers."
  std::unordered_map<std::string, std::string> to_hf, to_gguf;              // outside layers
  std::unordered_map<std::string, std::string> layer_to_hf, layer_to_gguf;  // inside a layer
  // One tensor per expert: "ffn_gate" <-> "mlp.experts." E ".gate_proj.weight"
  std::string experts;
  std::map<std::string, std::string> expert_to_hf, expert_to_gguf;

  void add(const std::string& gguf, const std::string& hf) { to_hf[gguf] = hf, to_gguf[hf] = gguf; }
  void add_layer(const std::string& gguf, const std::string& hf) { layer_to_hf[gguf] = hf, layer_to_gguf[hf] = gguf; }
  /// Another HF name of the same tensor, only read.
  void alias(const std::string& gguf, const std::string& hf) { layer_to_gguf[hf] = gguf; }
  void stem(const std::string& gguf, const std::string& hf) {
    add(gguf + ".weight", hf + ".weight");
    add(gguf + ".bias", hf + ".bias");
  }
  void layer_stem(const std::string& gguf, const std::string& hf) {
    add_layer(gguf + ".weight", hf + ".weight");
    add_layer(gguf + ".bias", hf + ".bias");
  }
  void expert_names(const std::string& prefix, const char* gate, const char* up, const char* down) {
    experts = prefix;
    for (auto [gguf, hf] : {std::pair{"ffn_gate", gate}, {"ffn_up", up}, {"ffn_down", down}})
      expert_to_hf[gguf] = hf, expert_to_gguf[hf] = gguf;
  }
};

Names build(std::string_view type) {
  Names n;
  const bool encoder = type == "bert" || type == "roberta" || type == "distilbert" || type == "nomic_bert";
  if (encoder) {
    n.hf_layer = type == "distilbert"   ? "transformer.layer."
                 : type == "nomic_bert" ? "encoder.layers."
                                        : "encoder.layer.";
    n.stem("token_embd", "embeddings.word_embeddings");
    n.stem("token_types", "embeddings.token_type_embeddings");
    n.stem("position_embd", "embeddings.position_embeddings");
    if (type == "nomic_bert") {
      n.stem("token_embd_norm", "emb_ln");
      n.layer_stem("attn_qkv", "attn.Wqkv");
      n.layer_stem("attn_output", "attn.out_proj");
      n.layer_stem("attn_output_norm", "norm1");
      n.layer_stem("ffn_up", "mlp.fc11");
      n.layer_stem("ffn_gate", "mlp.fc12");
      n.layer_stem("ffn_down", "mlp.fc2");
      n.layer_stem("layer_output_norm", "norm2");
    } else {
      const bool distil = type == "distilbert";
      n.stem("token_embd_norm", "embeddings.LayerNorm");
      n.stem("cls", distil ? "pre_classifier" : "classifier.dense");
      n.stem("cls.output", distil ? "classifier" : "classifier.out_proj");
      n.layer_stem("attn_q", distil ? "attention.q_lin" : "attention.self.query");
      n.layer_stem("attn_k", distil ? "attention.k_lin" : "attention.self.key");
      n.layer_stem("attn_v", distil ? "attention.v_lin" : "attention.self.value");
      n.layer_stem("attn_output", distil ? "attention.out_lin" : "attention.output.dense");
      n.layer_stem("attn_output_norm", distil ? "sa_layer_norm" : "attention.output.LayerNorm");
      n.layer_stem("ffn_up", distil ? "ffn.lin1" : "intermediate.dense");
      n.layer_stem("ffn_down", distil ? "ffn.lin2" : "output.dense");
      n.layer_stem("layer_output_norm", distil ? "output_layer_norm" : "output.LayerNorm");
    }
    return n;
  }

  n.hf_layer = "model.layers.";
  n.stem("token_embd", "model.embed_tokens");
  n.stem("output_norm", "model.norm");
  n.stem("output", "lm_head");
  n.add("rope_freqs.weight", "moiety.rope_freqs");
  n.add("rope_factors_long.weight", "moiety.rope_factors_long");
  n.add("rope_factors_short.weight", "moiety.rope_factors_short");
  n.layer_stem("attn_q", "self_attn.q_proj");
  n.layer_stem("attn_k", "self_attn.k_proj");
  n.layer_stem("attn_v", "self_attn.v_proj");
  n.layer_stem("attn_qkv", "self_attn.qkv_proj");
  n.layer_stem("attn_output", "self_attn.o_proj");
  n.layer_stem("attn_q_norm", "self_attn.q_norm");
  n.layer_stem("attn_k_norm", "self_attn.k_norm");
  n.layer_stem("ffn_down", "mlp.down_proj");
  if (type == "phi3") {
    n.layer_stem("ffn_up", "mlp.gate_up_proj");  // gate above up, as in HF
  } else {
    n.layer_stem("ffn_gate", "mlp.gate_proj");
    n.layer_stem("ffn_up", "mlp.up_proj");
  }
  if (type == "olmo2" || type == "olmo3") {
    n.layer_stem("post_attention_norm", "post_attention_layernorm");
    n.layer_stem("post_ffw_norm", "post_feedforward_layernorm");
  } else if (type == "gemma2" || type == "gemma3" || type == "gemma3_text") {
    n.layer_stem("attn_norm", "input_layernorm");
    n.layer_stem("post_attention_norm", "post_attention_layernorm");
    n.layer_stem("ffn_norm", "pre_feedforward_layernorm");
    n.layer_stem("post_ffw_norm", "post_feedforward_layernorm");
  } else {
    n.layer_stem("attn_norm", "input_layernorm");
    n.layer_stem(type == "gpt_oss" ? "post_attention_norm" : "ffn_norm", "post_attention_layernorm");
  }

  for (auto [gguf, hf] : {std::pair{"ffn_gate_exps", "gate"}, {"ffn_up_exps", "up"}, {"ffn_down_exps", "down"}}) {
    const std::string stack = fmt::format("mlp.experts.{}_proj", hf);
    n.add_layer(fmt::format("{}.weight", gguf), stack);
    n.add_layer(fmt::format("{}.bias", gguf), stack + "_bias");
  }
  n.expert_names("mlp.experts.", "gate_proj", "up_proj", "down_proj");
  if (type == "mixtral" || type == "phimoe") {
    n.layer_stem("ffn_gate_inp", "block_sparse_moe.gate");
    n.alias("ffn_gate_inp.weight", type == "mixtral" ? "mlp.gate.weight" : "mlp.router.weight");
    n.expert_names("block_sparse_moe.experts.", "w1", "w3", "w2");
  } else if (type == "granitemoe" || type == "granitemoeshared") {
    n.layer_stem("ffn_gate_inp", "block_sparse_moe.router.layer");
    n.alias("ffn_gate_inp.weight", "block_sparse_moe.router.weight");
    n.layer_stem("ffn_gate_shexp", "shared_mlp.gate_proj");
    n.layer_stem("ffn_up_shexp", "shared_mlp.up_proj");
    n.layer_stem("ffn_down_shexp", "shared_mlp.output_linear");
  } else if (type == "gpt_oss") {
    n.layer_stem("ffn_gate_inp", "mlp.router");
    n.add_layer("attn_sinks.weight", "self_attn.sinks");
  } else if (type == "qwen2_moe") {
    n.layer_stem("ffn_gate_inp", "mlp.gate");
    n.layer_stem("ffn_gate_inp_shexp", "mlp.shared_expert_gate");
    for (const char* part : {"gate", "up", "down"})
      n.layer_stem(fmt::format("ffn_{}_shexp", part), fmt::format("mlp.shared_expert.{}_proj", part));
  } else if (type == "deepseek" || type == "deepseek_v2" || type == "deepseek_v3") {
    n.layer_stem("ffn_gate_inp", "mlp.gate");
    n.add_layer("exp_probs_b.bias", "mlp.gate.e_score_correction_bias");
    for (const char* part : {"gate", "up", "down"})
      n.layer_stem(fmt::format("ffn_{}_shexp", part), fmt::format("mlp.shared_experts.{}_proj", part));
    n.layer_stem("attn_q_a", "self_attn.q_a_proj");
    n.layer_stem("attn_q_b", "self_attn.q_b_proj");
    n.layer_stem("attn_q_a_norm", "self_attn.q_a_layernorm");
    n.layer_stem("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa");
    n.layer_stem("attn_kv_a_norm", "self_attn.kv_a_layernorm");
    n.layer_stem("attn_kv_b", "self_attn.kv_b_proj");
    n.add_layer("attn_k_b.weight", "self_attn.k_b_proj");
    n.add_layer("attn_v_b.weight", "self_attn.v_b_proj");
  } else {
    n.layer_stem("ffn_gate_inp", "mlp.gate");
  }
  return n;
}

const Names& names(std::string_view model_type) {
  static std::mutex mutex;
  static std::map<std::string, Names, std::less<>> cache;
  const std::lock_guard lock(mutex);
  auto it = cache.find(model_type);
  if (it == cache.end()) it = cache.emplace(model_type, build(model_type)).first;
  return it->second;
}

/// Splits "PREFIX<number>.REST"; false when `name` has another form.
bool split_number(const std::string& name, std::string_view prefix, std::string_view& number, std::string& rest) {
  if (!name.starts_with(prefix)) return false;
  const size_t dot = name.find('.', prefix.size());
  if (dot == std::string::npos || dot == prefix.size() || dot + 1 == name.size()) return false;
  number = std::string_view(name).substr(prefix.size(), dot - prefix.size());
  if (!std::all_of(number.begin(), number.end(), [](char c) { return c >= '0' && c <= '9'; })) return false;
  rest = name.substr(dot + 1);
  return true;
}

}  // namespace

const GgufArch* find_gguf_arch(std::string_view name) {
  for (const auto& a : kArchs)
    if (a.name == name) return &a;
  return nullptr;
}

std::vector<std::string_view> gguf_arch_names() {
  std::vector<std::string_view> out;
  for (const auto& a : kArchs) out.push_back(a.name);
  return out;
}

std::string gguf_arch_of(const json& config) {
  const auto found = config.find("model_type");
  check(found != config.end() && found->is_string(), "config.json: 'model_type' is missing or no text");
  const std::string type = *found;
  const TypeToArch* t = find_type(type);
  if (!t) {
    std::vector<std::string_view> known;
    for (const auto& k : kTypes) known.push_back(k.model_type);
    fail("GGUF has no architecture that moiety knows for model_type '{}'; it knows {}", type, fmt::join(known, ", "));
  }
  return std::string(t->arch);
}

std::string hf_tensor_name(std::string_view model_type, const std::string& gguf_name) {
  const Names& n = names(model_type);
  std::string_view number;
  std::string rest;
  if (split_number(gguf_name, "blk.", number, rest)) {
    if (const auto it = n.layer_to_hf.find(rest); it != n.layer_to_hf.end())
      return fmt::format("{}{}.{}", n.hf_layer, number, it->second);
    for (const auto& [gguf, hf] : n.expert_to_hf) {
      std::string_view expert;
      std::string tail;
      if (split_number(rest, gguf + ".", expert, tail) && (tail == "weight" || tail == "bias"))
        return fmt::format("{}{}.{}{}.{}.{}", n.hf_layer, number, n.experts, expert, hf, tail);
    }
  } else if (const auto it = n.to_hf.find(gguf_name); it != n.to_hf.end()) {
    return it->second;
  }
  return "gguf." + gguf_name;
}

std::optional<std::string> gguf_tensor_name(std::string_view model_type, const std::string& hf_name) {
  if (hf_name.starts_with("gguf.")) return hf_name.substr(5);
  const Names& n = names(model_type);
  std::string_view number;
  std::string rest;
  if (split_number(hf_name, n.hf_layer, number, rest)) {
    if (const auto it = n.layer_to_gguf.find(rest); it != n.layer_to_gguf.end())
      return fmt::format("blk.{}.{}", number, it->second);
    std::string_view expert;
    std::string tail;
    if (!n.experts.empty() && split_number(rest, n.experts, expert, tail)) {
      const size_t dot = tail.find('.');
      if (dot == std::string::npos) return std::nullopt;
      const auto it = n.expert_to_gguf.find(tail.substr(0, dot));
      const std::string leaf = tail.substr(dot + 1);
      if (it != n.expert_to_gguf.end() && (leaf == "weight" || leaf == "bias"))
        return fmt::format("blk.{}.{}.{}.{}", number, it->second, expert, leaf);
    }
  } else if (const auto it = n.to_gguf.find(hf_name); it != n.to_gguf.end()) {
    return it->second;
  }
  return std::nullopt;
}

// ---- Config ----

const json& text_config(const json& config) {
  const auto it = config.find("text_config");
  return it != config.end() && it->is_object() ? *it : config;
}

json rope_parameters(const json& config, const std::string& layer_type, double default_theta) {
  json out = json::object();
  const auto params = config.find("rope_parameters");
  if (params != config.end() && params->is_object()) {
    const auto nested = params->find(layer_type);
    out = nested != params->end() && nested->is_object() ? *nested : *params;
  } else if (layer_type == "full_attention") {
    if (const auto scaling = config.find("rope_scaling"); scaling != config.end() && scaling->is_object())
      out = *scaling;
  }
  if (!out.contains("rope_type")) out["rope_type"] = out.contains("type") ? out["type"] : json("default");
  check(out["rope_type"].is_string(), "config.json: the rope type is {}, not text", shown(out["rope_type"].dump()));
  if (out["rope_type"] == "su") out["rope_type"] = "longrope";
  if (!out.contains("rope_theta")) {
    const char* key = layer_type == "sliding_attention" ? "rope_local_base_freq" : "rope_theta";
    out["rope_theta"] = config.contains(key) && config[key].is_number() ? config[key] : json(default_theta);
  }
  check(out["rope_theta"].is_number(), "config.json: 'rope_theta' is {}, not a number",
        shown(out["rope_theta"].dump()));
  for (const char* key : {"original_max_position_embeddings", "partial_rotary_factor"})
    if (!out.contains(key) && config.contains(key) && config[key].is_number() &&
        (out["rope_type"] != "default" || std::string_view(key) == "partial_rotary_factor"))
      out[key] = config[key];
  return out;
}

namespace {

/// The double with the fewest digits that is this float32 (1e-6 and not 9.99999997e-07).
double shortest(double value) {
  if (!(std::abs(value) <= std::numeric_limits<float>::max())) return value;
  const float f = static_cast<float>(value);
  if (static_cast<double>(f) != value || !std::isfinite(f)) return value;
  std::array<char, 32> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), f).ptr;
  double out = value;
  std::from_chars(text.data(), end, out);
  return out;
}

/// Keys of one architecture, "{arch}." put in front.
struct Meta {
  const GgufFile& file;
  std::string arch;

  std::string full(std::string_view key) const { return fmt::format("{}.{}", arch, key); }
  bool has(std::string_view key) const { return file.find(full(key)) != nullptr; }
  std::optional<double> number(std::string_view key) const {
    auto v = file.number(full(key));
    if (v) *v = shortest(*v);
    return v;
  }
  /// An integer, or an array whose entries are all the same (some converters write one per layer).
  std::optional<int64_t> integer(std::string_view key) const {
    const GgufValue* v = file.find(full(key));
    if (!v) return std::nullopt;
    if (v->type != 9) return file.integer(full(key));
    const auto all = file.numbers(full(key));
    check(!all.empty() && std::all_of(all.begin(), all.end(), [&](double x) { return x == all[0]; }),
          "{}: key '{}' differs from layer to layer, which no model family here has; one value was expected",
          file.where(), full(key));
    check(std::abs(all[0]) < 9e15, "{}: key '{}' is out of range", file.where(), full(key));
    return static_cast<int64_t>(all[0]);
  }
  int64_t need(std::string_view key) const {
    const auto v = integer(key);
    check(v.has_value(), "{}: key '{}' is missing", file.where(), full(key));
    check(*v >= 0 && *v <= int64_t{1} << 40, "{}: key '{}' is {}, which cannot be", file.where(), full(key), *v);
    return *v;
  }
  int64_t get(std::string_view key, int64_t otherwise) const { return has(key) ? need(key) : otherwise; }
};

int64_t rows_of(const GgufFile& file, const std::string& tensor, int64_t otherwise) {
  return file.has(tensor) ? file.get(tensor).rows() : otherwise;
}

/// rope_type llama3 settings that give exactly these divisors, if there are any: the high frequencies are kept (1), the
/// low ones divided by the factor, and those between interpolated. Solved from the interpolated ones, then checked on
/// all.
std::optional<json> llama3_from_freqs(const std::vector<float>& divisors, double theta, int64_t dims) {
  if (divisors.empty() || static_cast<int64_t>(divisors.size()) * 2 != dims) return std::nullopt;
  const double factor = shortest(*std::max_element(divisors.begin(), divisors.end()));
  if (!(factor > 1.0) || !std::isfinite(factor)) return std::nullopt;
  double low = 1.0, high = 4.0;
  double original = 8192;
  for (size_t i = 0; i < divisors.size(); ++i) {
    const double d = divisors[i];
    if (d <= 1.0 + 1e-6 || d >= factor * (1 - 1e-6)) continue;
    const double smooth = (1 / d - 1 / factor) / (1 - 1 / factor);
    const double wavelength =
        2 * std::numbers::pi * std::pow(theta, 2.0 * static_cast<double>(i) / static_cast<double>(dims));
    original = std::round((smooth * (high - low) + low) * wavelength);
    if (!(original >= 1 && original <= 1e9)) return std::nullopt;
    break;
  }
  json out = {{"rope_type", "llama3"},    {"rope_theta", theta},
              {"factor", factor},         {"low_freq_factor", low},
              {"high_freq_factor", high}, {"original_max_position_embeddings", static_cast<int64_t>(original)}};
  const auto again = llama3_rope_freqs({{"head_dim", dims}, {"rope_parameters", out}});
  for (size_t i = 0; i < divisors.size(); ++i)
    if (!(std::abs(again[i] - divisors[i]) <= 1e-4 * std::abs(divisors[i]))) return std::nullopt;
  return out;
}

json floats_of(const GgufFile& file, const std::string& tensor) {
  json out = json::array();
  for (const float x : file.get(tensor).to_float()) out.push_back(shortest(x));
  return out;
}

json rope_of(const Meta& meta, int64_t dims, double default_theta, bool& freqs_flag) {
  const GgufFile& file = meta.file;
  json rope = {{"rope_type", "default"}, {"rope_theta", meta.number("rope.freq_base").value_or(default_theta)}};
  const std::string type = file.string(meta.full("rope.scaling.type")).value_or("");
  const auto original = meta.integer("rope.scaling.original_context_length");
  if (file.has("rope_factors_long.weight") && file.has("rope_factors_short.weight")) {
    rope["rope_type"] = "longrope";
    rope["long_factor"] = floats_of(file, "rope_factors_long.weight");
    rope["short_factor"] = floats_of(file, "rope_factors_short.weight");
    if (original) rope["original_max_position_embeddings"] = *original;
    if (const auto f = meta.number("rope.scaling.attn_factor")) rope["attention_factor"] = *f;
  } else if (type == "linear") {
    rope["rope_type"] = "linear";
    rope["factor"] = meta.number("rope.scaling.factor").value_or(1.0);
  } else if (type == "yarn") {
    rope["rope_type"] = "yarn";
    rope["factor"] = meta.number("rope.scaling.factor").value_or(1.0);
    if (original) rope["original_max_position_embeddings"] = *original;
    if (const auto f = meta.number("rope.scaling.yarn_attn_factor")) rope["attention_factor"] = *f;
    if (const auto f = meta.number("rope.scaling.yarn_beta_fast")) rope["beta_fast"] = *f;
    if (const auto f = meta.number("rope.scaling.yarn_beta_slow")) rope["beta_slow"] = *f;
    if (const auto f = meta.number("rope.scaling.yarn_log_multiplier"); f && *f != 0) {
      // Converters write 0.1 * mscale_all_dim; mscale is the same number in every DeepSeek release.
      rope["mscale"] = rope["mscale_all_dim"] = shortest(static_cast<float>(*f * 10));
    }
  } else if (type.empty() && meta.has("rope.scale_linear")) {  // key of files from before rope.scaling
    rope["rope_type"] = "linear";
    rope["factor"] = meta.number("rope.scale_linear").value_or(1.0);
  }
  if (file.has("rope_freqs.weight")) {
    const auto divisors = file.get("rope_freqs.weight").to_float();
    if (auto found = llama3_from_freqs(divisors, rope["rope_theta"].get<double>(), dims))
      rope = *found;
    else if (std::any_of(divisors.begin(), divisors.end(), [](float d) { return d != 1.0f; }))
      freqs_flag = true;
  }
  return rope;
}

bool has_layer_tensor(const GgufFile& file, const std::string& leaf, int64_t layers) {
  for (int64_t i = 0; i < layers; ++i)
    if (file.has(fmt::format("blk.{}.{}", i, leaf))) return true;
  return false;
}

json sliding_pattern(const Meta& meta, int64_t layers, int64_t period) {
  // An array of flags, one a layer, or every `period`-th layer attends to everything.
  json types = json::array();
  std::vector<double> flags = meta.file.numbers(meta.full("attention.sliding_window_pattern"));
  if (flags.size() == 1 && flags[0] >= 1) period = static_cast<int64_t>(std::min(flags[0], 1e6));
  for (int64_t i = 0; i < layers; ++i) {
    const bool sliding = static_cast<int64_t>(flags.size()) == layers && layers > 1 ? flags[static_cast<size_t>(i)] != 0
                                                                                    : (i + 1) % period != 0;
    types.push_back(sliding ? "sliding_attention" : "full_attention");
  }
  return types;
}

const char* dtype_of(const GgufFile& file) {
  // Of the largest tensor: norms and routers are always F32.
  const TensorInfo* largest = nullptr;
  for (const auto& t : file.tensors())
    if (!largest || t.elements() > largest->elements()) largest = &t;
  if (largest && largest->format == Format::F32) return "float32";
  if (largest && largest->format == Format::F16) return "float16";
  return "bfloat16";
}

std::string arch_of(const GgufFile& file) {
  const auto arch = file.string("general.architecture");
  check(arch.has_value(), "{}: key 'general.architecture' is missing: not a model", file.where());
  const std::string type = file.string("general.type").value_or("model");
  check(type == "model", "{}: general.type is '{}'; a model was expected", file.where(), type);
  check(find_gguf_arch(*arch) != nullptr, "{}: architecture '{}' is not among those that moiety knows: {}",
        file.where(), *arch, fmt::join(gguf_arch_names(), ", "));
  return *arch;
}

json encoder_config(const GgufFile& file, const Meta& meta, const std::string& type) {
  const int64_t layers = meta.need("block_count"), hidden = meta.need("embedding_length");
  const int64_t heads = meta.need("attention.head_count"), ff = meta.need("feed_forward_length");
  const int64_t vocabulary = rows_of(file, "token_embd.weight", meta.get("vocab_size", 0));
  const int64_t positions = rows_of(file, "position_embd.weight", meta.get("context_length", 512));
  json c = {{"model_type", type},
            {"architectures", json::array({find_type(type)->architecture})},
            {"vocab_size", vocabulary},
            {"max_position_embeddings", positions}};
  if (type == "distilbert") {
    c.update({{"dim", hidden},
              {"n_layers", layers},
              {"n_heads", heads},
              {"hidden_dim", ff},
              {"activation", "gelu"},
              {"sinusoidal_pos_embds", false}});
  } else {
    c.update({{"hidden_size", hidden},
              {"num_hidden_layers", layers},
              {"num_attention_heads", heads},
              {"intermediate_size", ff},
              {"hidden_act", type == "nomic_bert" ? "silu" : "gelu"},
              {"layer_norm_eps", meta.number("attention.layer_norm_epsilon").value_or(1e-12)},
              {"type_vocab_size", rows_of(file, "token_types.weight", 0)}});
  }
  if (type == "nomic_bert")
    c["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", meta.number("rope.freq_base").value_or(1000.0)}};
  return c;
}

}  // namespace

std::string hf_model_type(const GgufFile& file) {
  const std::string arch = arch_of(file);
  const Meta meta{file, arch};
  if (arch == "llama") {
    if (meta.get("expert_count", 0) > 0) return "mixtral";
    // Standard llama files never have a window; moiety writes one for Mistral.
    return meta.get("attention.sliding_window", 0) > 0 ? "mistral" : "llama";
  }
  if (arch == "bert") return file.has("token_types.weight") ? "bert" : "distilbert";
  if (arch == "olmo2") return meta.get("attention.sliding_window", 0) > 0 ? "olmo3" : "olmo2";
  if (arch == "granitemoe")
    return meta.get("expert_shared_feed_forward_length", 0) > 0 ? "granitemoeshared" : "granitemoe";
  if (arch == "deepseek2") {
    const bool sigmoid = meta.get("expert_gating_func", 1) == 2;
    return sigmoid || has_layer_tensor(file, "exp_probs_b.bias", std::min<int64_t>(meta.get("block_count", 0), 1024))
               ? "deepseek_v3"
               : "deepseek_v2";
  }
  if (arch == "gemma3") return "gemma3_text";
  for (const auto& t : kTypes)
    if (t.arch == arch) return std::string(t.model_type);
  fail("{}: architecture '{}' has no Hugging Face counterpart", file.where(), arch);
}

namespace {

json config_of_gguf(const GgufFile& file, bool derive) {
  const std::string arch = arch_of(file);
  const std::string type = hf_model_type(file);
  const GgufArch& facts = *find_gguf_arch(arch);
  const Meta meta{file, arch};
  json c;
  bool freqs_flag = false;

  if (const auto embedded = file.string("moiety.config"); embedded && !derive) {
    c = parse_json(*embedded, file.where() + ": key 'moiety.config'");
    check(c.is_object() && c.contains("model_type") && c["model_type"].is_string(),
          "{}: key 'moiety.config' does not hold a config.json with a model_type", file.where());
  } else if (type == "bert" || type == "distilbert" || type == "nomic_bert") {
    c = encoder_config(file, meta, type);
    c["dtype"] = dtype_of(file);
  } else {
    const int64_t layers = meta.need("block_count");
    check(layers <= static_cast<int64_t>(file.tensors().size()),
          "{}: key '{}.block_count' is {}, more than the file has tensors", file.where(), arch, layers);
    const int64_t hidden = meta.need("embedding_length"), heads = meta.need("attention.head_count");
    check(heads > 0 && hidden > 0, "{}: keys '{}.embedding_length' and '{}.attention.head_count' must be positive",
          file.where(), arch, arch);
    const int64_t kv_heads = meta.get("attention.head_count_kv", heads);
    const int64_t head_dim = meta.get("attention.key_length", meta.get("rope.dimension_count", hidden / heads));
    const int64_t experts = meta.get("expert_count", 0);
    const double theta = 10000.0;
    const bool mla = type == "deepseek_v2" || type == "deepseek_v3";
    const int64_t rope_dims = mla ? meta.get("rope.dimension_count", 64) : meta.get("rope.dimension_count", head_dim);

    c = {{"model_type", type},
         {"architectures", json::array({find_type(type)->architecture})},
         {"dtype", dtype_of(file)},
         {"vocab_size", rows_of(file, "token_embd.weight", meta.get("vocab_size", 0))},
         {"hidden_size", hidden},
         {"num_hidden_layers", layers},
         {"num_attention_heads", heads},
         {"num_key_value_heads", kv_heads},
         {"intermediate_size", meta.get("feed_forward_length", meta.get("expert_feed_forward_length", 0))},
         {"max_position_embeddings", meta.need("context_length")},
         {"rms_norm_eps", meta.number("attention.layer_norm_rms_epsilon").value_or(1e-6)},
         {"hidden_act", "silu"},
         {"tie_word_embeddings", !file.has("output.weight")},
         {"attention_bias", has_layer_tensor(file, "attn_q.bias", layers)},
         {"rope_parameters", rope_of(meta, rope_dims, theta, freqs_flag)}};
    if (type != "olmo2" && type != "olmo3" && type != "olmoe" && type != "granite" && type != "granitemoe" &&
        type != "granitemoeshared" && type != "qwen2" && type != "qwen2_moe" && type != "phi3" && type != "phimoe" &&
        type != "smollm3" && type != "deepseek")
      c["head_dim"] = head_dim;

    const int64_t window = meta.get("attention.sliding_window", 0);
    if (type == "llama" || type == "smollm3" || type == "granite")
      c["mlp_bias"] = has_layer_tensor(file, "ffn_up.bias", layers);
    if (type == "mistral" || type == "mixtral" || type == "phi3" || type == "phimoe")
      c["sliding_window"] = window > 0 ? json(window) : json(nullptr);
    if (type == "mistral" || type == "mixtral" || type == "phi3") c.erase("attention_bias");
    if (type == "qwen2" || type == "qwen2_moe") {
      c.erase("attention_bias");  // always biased
      c["use_sliding_window"] = false;
    }
    if (type == "qwen2_moe") c["qkv_bias"] = has_layer_tensor(file, "attn_q.bias", layers);
    if (type == "qwen3" || type == "qwen3_moe") c["use_sliding_window"] = false;
    if (type == "smollm3") {
      c["use_sliding_window"] = false;
      c["no_rope_layer_interval"] = 4;  // files of this architecture cannot say otherwise
      json rope_layers = json::array();
      for (int64_t i = 0; i < layers; ++i) rope_layers.push_back((i + 1) % 4 != 0 ? 1 : 0);
      c["no_rope_layers"] = rope_layers;
    }
    if (type == "phi3" || type == "phimoe") {
      const auto original = meta.integer("rope.scaling.original_context_length");
      if (type == "phi3")
        c["original_max_position_embeddings"] = original ? json(*original) : c["max_position_embeddings"];
      json& rope = c["rope_parameters"];
      if (type == "phi3")
        rope["partial_rotary_factor"] =
            static_cast<double>(rope_dims) / static_cast<double>(std::max<int64_t>(hidden / heads, 1));
      else if (rope["rope_type"] == "longrope") {
        // SparseMixer models scale attention by these instead of attention_factor.
        rope["short_mscale"] = rope["long_mscale"] = rope.value("attention_factor", 1.0);
        rope.erase("attention_factor");
      }
      if (type == "phimoe") c["lm_head_bias"] = file.has("output.bias");
    }

    if (experts > 0) {
      const int64_t used = meta.get("expert_used_count", 0);
      const int64_t expert_ff = meta.get("expert_feed_forward_length", 0);
      c["num_experts_per_tok"] = used;
      if (type == "mixtral" || type == "phimoe" || type == "granitemoe" || type == "granitemoeshared" ||
          type == "gpt_oss")
        c["num_local_experts"] = experts;
      else if (type == "deepseek" || mla)
        c["n_routed_experts"] = experts;
      else
        c["num_experts"] = experts;
      const auto norm = file.boolean(meta.full("expert_weights_norm"));
      if (type == "qwen2_moe" || type == "olmoe") c["norm_topk_prob"] = norm.value_or(false);
      if (type == "qwen3_moe") c["norm_topk_prob"] = norm.value_or(true);  // the architecture always renormalises
      if (type == "qwen2_moe" || type == "qwen3_moe") {
        // [E, f, d]
        const auto stack = file.has("blk.0.ffn_gate_exps.weight") ? file.get("blk.0.ffn_gate_exps.weight").shape
                                                                  : std::vector<int64_t>{};
        const int64_t stacked = stack.size() == 3 ? stack[1] : file.integer("edgemoe.expert_width").value_or(0);
        c["moe_intermediate_size"] = expert_ff > 0 ? expert_ff : stacked;
        c["decoder_sparse_step"] = 1;
        c["mlp_only_layers"] = json::array();
        for (int64_t i = 0; i < layers; ++i)
          if (file.has(fmt::format("blk.{}.ffn_gate.weight", i))) c["mlp_only_layers"].push_back(i);
        if (c["intermediate_size"] == 0) c["intermediate_size"] = c["moe_intermediate_size"];
      }
      if (type == "qwen2_moe")
        c["shared_expert_intermediate_size"] =
            meta.get("expert_shared_feed_forward_length", rows_of(file, "blk.0.ffn_gate_shexp.weight", 0));
      if (type == "deepseek" || mla) {
        c["first_k_dense_replace"] = meta.get("leading_dense_block_count", 0);
        c["n_shared_experts"] = meta.get("expert_shared_count", 0);
        c["moe_intermediate_size"] = expert_ff;
        c["norm_topk_prob"] = norm.value_or(false);
        if (type == "deepseek") c["moe_layer_freq"] = 1;
      }
    } else if (mla) {
      c["first_k_dense_replace"] = layers;
    }
    if (mla) {
      c["attention_bias"] = has_layer_tensor(file, "attn_kv_a_mqa.bias", layers);
      const auto q_rank = meta.integer("attention.q_lora_rank");
      const int64_t kv_rank = meta.get("attention.kv_lora_rank", 512);
      // Newer files describe the absorbed form in key_length and the real heads in *_mla.
      const int64_t key = meta.get("attention.key_length_mla", meta.get("attention.key_length", 192));
      const int64_t value = meta.get("attention.value_length_mla", meta.get("attention.value_length", 128));
      c["num_key_value_heads"] = heads;
      c["q_lora_rank"] = q_rank && *q_rank > 0 ? json(*q_rank) : json(nullptr);
      c["kv_lora_rank"] = kv_rank;
      c["qk_rope_head_dim"] = rope_dims;
      c["qk_nope_head_dim"] = key - rope_dims;
      c["v_head_dim"] = value;
      c["head_dim"] = rope_dims;
      c["routed_scaling_factor"] = meta.number("expert_weights_scale").value_or(1.0);
      // Files from before the group keys: 160 experts is DeepSeek-V2, 256 with sigmoid scores DeepSeek-V3.
      const bool v2 = type == "deepseek_v2" && experts == 160, v3 = type == "deepseek_v3" && experts == 256;
      const int64_t groups = meta.get("expert_group_count", v2 || v3 ? 8 : 1);
      const int64_t kept = meta.get("expert_group_used_count", v2 ? 3 : v3 ? 4 : 1);
      c["n_group"] = groups;
      c["topk_group"] = kept;
      if (type == "deepseek_v2") {
        c["topk_method"] = groups > 1 ? "group_limited_greedy" : "greedy";
      } else {
        c["topk_method"] = "noaux_tc";
        c["scoring_func"] = "sigmoid";
        c["rope_interleave"] = true;
        c["num_nextn_predict_layers"] = 0;
      }
    }
    if (type == "granite" || type == "granitemoe" || type == "granitemoeshared") {
      c["embedding_multiplier"] = meta.number("embedding_scale").value_or(1.0);
      c["residual_multiplier"] = meta.number("residual_scale").value_or(1.0);
      c["logits_scaling"] = meta.number("logit_scale").value_or(1.0);
      c["attention_multiplier"] =
          meta.number("attention.scale").value_or(shortest(1.0f / std::sqrt(static_cast<float>(head_dim))));
      if (type == "granitemoeshared") c["shared_intermediate_size"] = meta.get("expert_shared_feed_forward_length", 0);
    }
    if (arch.starts_with("gemma")) {
      c.erase("hidden_act");
      c[arch == "gemma" ? "hidden_act" : "hidden_activation"] = "gelu_pytorch_tanh";
      if (arch != "gemma") {
        // The query scale is not in the file; only the 27B models differ from the head size.
        const bool is_27b = (arch == "gemma2" && layers == 46) || (arch == "gemma3" && layers == 62);
        c["query_pre_attn_scalar"] = is_27b ? hidden / heads : head_dim;
        c["sliding_window"] = window > 0 ? json(window) : json(nullptr);
        c["layer_types"] = window > 0 ? sliding_pattern(meta, layers, arch == "gemma2" ? 2 : 6)
                                      : json(std::vector<std::string>(static_cast<size_t>(layers), "full_attention"));
        const auto final_cap = meta.number("final_logit_softcapping"), attn_cap = meta.number("attn_logit_softcapping");
        c["final_logit_softcapping"] = final_cap ? json(*final_cap) : arch == "gemma2" ? json(30.0) : json(nullptr);
        c["attn_logit_softcapping"] = attn_cap ? json(*attn_cap) : arch == "gemma2" ? json(50.0) : json(nullptr);
      }
      if (arch == "gemma3") {
        json full = c["rope_parameters"];
        if (!meta.has("rope.freq_base")) full["rope_theta"] = 1000000.0;
        c["rope_parameters"] = {
            {"full_attention", full},
            {"sliding_attention",
             {{"rope_type", "default"}, {"rope_theta", meta.number("rope.freq_base_swa").value_or(10000.0)}}}};
      }
    }
    if (type == "olmoe")
      if (const auto clip = meta.number("attention.clamp_kqv")) c["clip_qkv"] = *clip;
    if (type == "olmo3") {
      c["sliding_window"] = window;
      c["layer_types"] = sliding_pattern(meta, layers, 4);
    }
    if (type == "gpt_oss") {
      c["intermediate_size"] = meta.get("expert_feed_forward_length", meta.get("feed_forward_length", 0));
      c["sliding_window"] = window;
      c["layer_types"] = sliding_pattern(meta, layers, 2);
      c["swiglu_alpha"] = 1.702;
      c["swiglu_limit"] = 7.0;
      json& rope = c["rope_parameters"];
      if (rope["rope_type"] == "yarn") {
        if (!rope.contains("beta_fast")) rope["beta_fast"] = 32.0;
        if (!rope.contains("beta_slow")) rope["beta_slow"] = 1.0;
        rope["truncate"] = false;
      }
    }
  }

  for (const auto& [key, name] : {std::pair{"bos_token_id", "tokenizer.ggml.bos_token_id"},
                                  {"eos_token_id", "tokenizer.ggml.eos_token_id"},
                                  {"pad_token_id", "tokenizer.ggml.padding_token_id"}})
    if (const auto id = file.integer(name); id && !c.contains(key)) c[key] = *id;

  if (facts.rope_interleaved) c["moiety_rope_interleaved"] = true;
  if (facts.norm_offset_folded) c["moiety_norm_offset_folded"] = true;
  if (freqs_flag) c["moiety_rope_freqs"] = true;
  return c;
}

}  // namespace

json hf_generation_config(const GgufFile& file) {
  if (const auto embedded = file.string("moiety.generation_config")) {
    json c = parse_json(*embedded, file.where() + ": key 'moiety.generation_config'");
    check(c.is_object(), "{}: key 'moiety.generation_config' is not a JSON object", file.where());
    return c;
  }
  json c = json::object();
  for (const auto& [key, name] : {std::pair{"bos_token_id", "tokenizer.ggml.bos_token_id"},
                                  {"eos_token_id", "tokenizer.ggml.eos_token_id"},
                                  {"pad_token_id", "tokenizer.ggml.padding_token_id"}})
    if (const auto id = file.integer(name)) c[key] = *id;
  for (const char* name : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
    if (const auto id = file.integer(name); id && c.contains("eos_token_id")) {
      if (!c["eos_token_id"].is_array()) c["eos_token_id"] = json::array({c["eos_token_id"]});
      if (std::find(c["eos_token_id"].begin(), c["eos_token_id"].end(), *id) == c["eos_token_id"].end())
        c["eos_token_id"].push_back(*id);
    }
  for (const auto& [key, name] : {std::pair{"temperature", "general.sampling.temp"},
                                  {"top_p", "general.sampling.top_p"},
                                  {"min_p", "general.sampling.min_p"},
                                  {"repetition_penalty", "general.sampling.penalty_repeat"}})
    if (const auto v = file.number(name)) c[key] = shortest(*v), c["do_sample"] = true;
  if (const auto k = file.integer("general.sampling.top_k")) c["top_k"] = *k, c["do_sample"] = true;
  return c;
}

}  // namespace moiety

// ---- HF config -> GGUF keys ----

namespace moiety {

namespace {

std::vector<float> llama3_freqs(const json& config) {
  const json c = with_defaults(config);
  const json rope = rope_parameters(c);
  if (rope["rope_type"] != "llama3") return {};
  const int64_t heads = c.value("num_attention_heads", int64_t{1});
  int64_t dims = c.contains("head_dim") && c["head_dim"].is_number()
                     ? c["head_dim"].get<int64_t>()
                     : c.value("hidden_size", int64_t{0}) / std::max<int64_t>(heads, 1);
  check(dims > 0 && dims <= 65536, "config: head_dim {} cannot be", dims);
  const double theta = rope["rope_theta"].get<double>(), factor = rope.value("factor", 8.0);
  const double low = rope.value("low_freq_factor", 1.0), high = rope.value("high_freq_factor", 4.0);
  const double original = rope.value("original_max_position_embeddings", 8192.0);
  std::vector<float> out;
  for (int64_t i = 0; i < dims / 2; ++i) {
    const double wavelength =
        2 * std::numbers::pi * std::pow(theta, 2.0 * static_cast<double>(i) / static_cast<double>(dims));
    double divisor = 1.0;
    if (wavelength > original / low) {
      divisor = factor;
    } else if (wavelength >= original / high) {
      const double smooth = (original / wavelength - low) / (high - low);
      divisor = 1.0 / ((1.0 - smooth) / factor + smooth);
    }
    out.push_back(static_cast<float>(divisor));
  }
  return out;
}

}  // namespace

namespace {

/// Typed access to an HF config with Errors that name the key.
struct Config {
  const json& c;
  bool has(const char* key) const { return c.contains(key) && !c[key].is_null(); }
  int64_t integer(const char* key) const {
    check(has(key) && c[key].is_number(), "config: '{}' must be an integer", key);
    const double v = c[key].get<double>();
    check(v == std::floor(v) && v >= 0 && v < 4294967296.0, "config: '{}' is {}, which is not a 32-bit count", key, v);
    return static_cast<int64_t>(v);
  }
  int64_t integer(const char* key, int64_t otherwise) const { return has(key) ? integer(key) : otherwise; }
  double number(const char* key, double otherwise) const {
    if (!has(key)) return otherwise;
    check(c[key].is_number(), "config: '{}' must be a number", key);
    return c[key].get<double>();
  }
};

}  // namespace

namespace {

void declare_config(GgufWriter& writer, const json& config) {
  const json c = with_defaults(config);
  const std::string arch = gguf_arch_of(config), type = config.value("model_type", "");
  const Config get{c};
  auto u32 = [&](const char* key, int64_t v) {
    writer.set_u32(fmt::format("{}.{}", arch, key), static_cast<uint32_t>(v));
  };
  auto f32 = [&](const char* key, double v) { writer.set_f32(fmt::format("{}.{}", arch, key), static_cast<float>(v)); };
  auto flag = [&](const char* key, bool v) { writer.set_bool(fmt::format("{}.{}", arch, key), v); };
  auto text = [&](const char* key, const std::string& v) { writer.set(fmt::format("{}.{}", arch, key), v); };

  const bool distil = type == "distilbert";
  const int64_t layers = get.integer(distil ? "n_layers" : "num_hidden_layers");
  const int64_t hidden = get.integer(distil ? "dim" : "hidden_size");
  const int64_t heads = get.integer(distil ? "n_heads" : "num_attention_heads");
  check(heads > 0, "config: the number of attention heads must be positive");
  u32("block_count", layers);
  u32("embedding_length", hidden);
  u32("attention.head_count", heads);

  if (arch == "bert" || arch == "nomic-bert") {
    int64_t positions = get.integer("max_position_embeddings");
    if (type == "roberta") positions -= get.integer("pad_token_id", 1) + 1;  // GGUF counts positions from 0
    u32("context_length", positions);
    u32("feed_forward_length", get.integer(distil ? "hidden_dim" : "intermediate_size"));
    f32("attention.layer_norm_epsilon", distil ? 1e-12 : get.number("layer_norm_eps", 1e-12));
    flag("attention.causal", false);
    u32("pooling_type", 1);  // mean
    if (arch == "nomic-bert")
      f32("rope.freq_base", rope_parameters(c, "full_attention", 1000.0)["rope_theta"].get<double>());
    return;
  }

  const bool mla = arch == "deepseek2";
  const int64_t head_dim = get.integer("head_dim", hidden / heads);
  const int64_t kv_heads = get.integer("num_key_value_heads", heads);
  u32("context_length", get.integer("max_position_embeddings"));
  const bool moe_ff = (type == "gpt_oss");
  u32("feed_forward_length", get.integer("intermediate_size"));
  u32("attention.head_count_kv", mla ? 1 : kv_heads);
  f32("attention.layer_norm_rms_epsilon",
      get.number("rms_norm_eps", type == "olmoe" || type == "gpt_oss" ? 1e-5 : 1e-6));
  if (get.has("vocab_size")) u32("vocab_size", get.integer("vocab_size"));

  if (mla) {
    const int64_t rank = get.integer("kv_lora_rank"), rot = get.integer("qk_rope_head_dim");
    if (get.has("q_lora_rank")) u32("attention.q_lora_rank", get.integer("q_lora_rank"));
    u32("attention.kv_lora_rank", rank);
    u32("attention.key_length", rank + rot);
    u32("attention.value_length", rank);
    u32("attention.key_length_mla", get.integer("qk_nope_head_dim") + rot);
    u32("attention.value_length_mla", get.integer("v_head_dim"));
    u32("rope.dimension_count", rot);
  } else {
    if (head_dim * heads != hidden || arch.starts_with("gemma") || arch == "gpt-oss" || arch.starts_with("qwen3")) {
      u32("attention.key_length", head_dim);
      u32("attention.value_length", head_dim);
    }
    if (!arch.starts_with("gemma")) {
      const double part = rope_parameters(c).value("partial_rotary_factor", 1.0);
      u32("rope.dimension_count", static_cast<int64_t>(static_cast<double>(head_dim) * part));
    }
  }

  // Rope.
  const double default_theta = type == "mixtral" || type == "phimoe" ? 1e6
                               : type == "gpt_oss"                   ? 150000.0
                               : type == "smollm3"                   ? 2e6
                               : arch == "gemma3"                    ? 1e6
                                                                     : 10000.0;
  const json rope = rope_parameters(c, "full_attention", default_theta);
  const std::string rope_type = rope["rope_type"].get<std::string>();
  f32("rope.freq_base", rope["rope_theta"].get<double>());
  if (arch == "gemma3")
    f32("rope.freq_base_swa", rope_parameters(c, "sliding_attention", 10000.0)["rope_theta"].get<double>());
  if (rope_type == "linear" || rope_type == "yarn") {
    text("rope.scaling.type", rope_type);
    check(rope.contains("factor") && rope["factor"].is_number(), "config: rope_parameters of type {} need a 'factor'",
          rope_type);
    f32("rope.scaling.factor", rope["factor"].get<double>());
  } else if (rope_type == "longrope") {
    text("rope.scaling.type", "longrope");
  } else {
    check(rope_type == "default" || rope_type == "llama3",
          "config: GGUF cannot hold rope_type '{}'; it has default, linear, yarn, llama3 and longrope", rope_type);
  }
  if ((rope_type == "yarn" || rope_type == "longrope" || arch == "phi3") &&
      (rope.contains("original_max_position_embeddings") || get.has("original_max_position_embeddings")))
    u32("rope.scaling.original_context_length", rope.contains("original_max_position_embeddings")
                                                    ? rope["original_max_position_embeddings"].get<int64_t>()
                                                    : get.integer("original_max_position_embeddings"));
  if (rope_type == "yarn") {
    for (const auto& [key, name] : {std::pair{"beta_fast", "rope.scaling.yarn_beta_fast"},
                                    {"beta_slow", "rope.scaling.yarn_beta_slow"},
                                    {"attention_factor", "rope.scaling.yarn_attn_factor"}})
      if (rope.contains(key) && rope[key].is_number()) f32(name, rope[key].get<double>());
    if (mla && rope.contains("mscale_all_dim") && rope["mscale_all_dim"].is_number())
      f32("rope.scaling.yarn_log_multiplier", 0.1 * rope["mscale_all_dim"].get<double>());
  }
  if (rope_type == "longrope") {
    const double original = rope.contains("original_max_position_embeddings")
                                ? rope["original_max_position_embeddings"].get<double>()
                                : get.number("original_max_position_embeddings", 4096);
    const double scale = static_cast<double>(get.integer("max_position_embeddings")) / original;
    double factor = scale > 1 ? std::sqrt(1 + std::log(scale) / std::log(original)) : 1.0;
    for (const char* key : {"attention_factor", "long_mscale"})
      if (rope.contains(key) && rope[key].is_number()) factor = rope[key].get<double>();
    f32("rope.scaling.attn_factor", factor);
  }

  // Windows.
  const bool windowed = get.has("sliding_window") && c["sliding_window"].is_number() &&
                        get.integer("sliding_window") > 0 &&
                        (!get.has("use_sliding_window") || c["use_sliding_window"] == true);
  if (arch == "phi3")
    u32("attention.sliding_window", windowed ? get.integer("sliding_window") : 0);
  else if (windowed)
    u32("attention.sliding_window", get.integer("sliding_window"));
  // Which layers have the window: always said for Olmo 3, and where the layers differ from what the architecture
  // implies.
  if (windowed && (type == "olmo3" || arch == "gemma3" || arch == "gpt-oss" || arch == "gemma2")) {
    const int64_t period = type == "olmo3" ? 4 : arch == "gemma3" ? get.integer("sliding_window_pattern", 6) : 2;
    const int64_t implied = type == "olmo3" ? 4 : arch == "gemma3" ? 6 : 2;
    const json types = get.has("layer_types") && c["layer_types"].is_array() ? c["layer_types"] : json::array();
    std::vector<int32_t> flags;
    bool usual = true;
    for (int64_t i = 0; i < layers; ++i) {
      const bool sliding = i < static_cast<int64_t>(types.size()) ? types[static_cast<size_t>(i)] == "sliding_attention"
                                                                  : period > 0 && (i + 1) % period != 0;
      flags.push_back(sliding);
      usual = usual && sliding == ((i + 1) % implied != 0);
    }
    if (type == "olmo3" || !usual)
      writer.set_array_i32(fmt::format("{}.attention.sliding_window_pattern", arch), flags);
  }

  // Mixtures.
  int64_t experts = 0;
  for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts"})
    if (experts == 0 && get.has(key)) experts = get.integer(key);
  if (experts > 0) {
    u32("expert_count", experts);
    u32("expert_used_count", get.integer("num_experts_per_tok"));
    const int64_t expert_ff =
        get.has("moe_intermediate_size") ? get.integer("moe_intermediate_size") : get.integer("intermediate_size");
    if (get.has("moe_intermediate_size") || moe_ff) u32("expert_feed_forward_length", expert_ff);
    if (get.has("shared_expert_intermediate_size"))
      u32("expert_shared_feed_forward_length", get.integer("shared_expert_intermediate_size"));
    if (type == "granitemoeshared")
      u32("expert_shared_feed_forward_length", get.integer("shared_intermediate_size", 0));
    if (get.has("norm_topk_prob") && c["norm_topk_prob"].is_boolean())
      flag("expert_weights_norm", c["norm_topk_prob"].get<bool>());
  }
  if (mla || type == "deepseek") {
    u32("leading_dense_block_count", experts > 0 ? get.integer("first_k_dense_replace", 0) : layers);
    u32("expert_shared_count", get.integer("n_shared_experts", 0));
    f32("expert_weights_scale", get.number("routed_scaling_factor", 1.0));
  }
  if (mla && experts > 0) {
    const bool grouped = type == "deepseek_v3" || c.value("topk_method", "greedy") == "group_limited_greedy";
    u32("expert_gating_func", type == "deepseek_v3" ? 2 : 1);
    if (grouped && get.has("n_group")) u32("expert_group_count", get.integer("n_group"));
    if (grouped && get.has("topk_group")) u32("expert_group_used_count", get.integer("topk_group"));
  }

  // Scales and caps.
  if (arch.starts_with("granite")) {
    f32("attention.scale", get.number("attention_multiplier", 1.0));
    f32("embedding_scale", get.number("embedding_multiplier", 1.0));
    f32("residual_scale", get.number("residual_multiplier", 1.0));
    f32("logit_scale", get.number("logits_scaling", 1.0));
  }
  if (get.has("clip_qkv")) f32("attention.clamp_kqv", get.number("clip_qkv", 0));
  if (arch == "gemma2" || arch == "gemma3") {
    if (get.has("attn_logit_softcapping")) f32("attn_logit_softcapping", get.number("attn_logit_softcapping", 0));
    if (get.has("final_logit_softcapping")) f32("final_logit_softcapping", get.number("final_logit_softcapping", 0));
  }
}

}  // namespace

json hf_config(const GgufFile& file, bool derive) {
  return reading_json(file.where(), [&] { return config_of_gguf(file, derive); });
}

std::vector<float> llama3_rope_freqs(const json& config) {
  return reading_json("config.json", [&] { return llama3_freqs(config); });
}

void write_gguf_config(GgufWriter& writer, const json& config) {
  reading_json("config.json", [&] { declare_config(writer, config); });
}

}  // namespace moiety
