#include "moiety/io/moduleformer_names.h"

#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr const char* kPrefix = "transformer.";

bool is_family(const json& config) {
  return config.is_object() && config.value("model_type", json()) == "moduleformer";
}

// What a stored name is called here; "" for tables that can be computed.
std::string common_name(const std::string& stored) {
  if (stored.rfind(kPrefix, 0) != 0) return stored;  // lm_head.weight
  std::string name = stored.substr(std::strlen(kPrefix));
  if (name == "wte.weight") return "model.embed_tokens.weight";
  if (name.rfind("ln_f.", 0) == 0) return "model.norm." + name.substr(5);
  if (name.rfind("h.", 0) != 0) return stored;
  const size_t dot = name.find('.', 2);
  if (dot == std::string::npos) return stored;
  const std::string layer = "model.layers." + name.substr(2, dot - 2) + ".", rest = name.substr(dot + 1);
  if (rest == "attn.mask" || rest == "attn.cum_weight") return "";
  static const std::vector<std::pair<std::string, std::string>> places = {{"attn.q_proj.gate.", "self_attn.gate."},
                                                                          {"attn.", "self_attn."},
                                                                          {"mlpf.", "mlp."},
                                                                          {"ln_1.", "input_layernorm."},
                                                                          {"ln_2.", "post_attention_layernorm."}};
  for (const auto& [from, to] : places)
    if (rest.rfind(from, 0) == 0) return layer + to + rest.substr(from.size());
  return stored;
}

bool is_stack(const TensorInfo& t) {
  return t.shape.size() == 3 && t.name.ends_with("experts.weight");
}

class CommonNames : public Checkpoint {
 public:
  explicit CommonNames(std::shared_ptr<const Checkpoint> stored)
      : stored_(std::move(stored)), config_(moduleformer_config(stored_->config())) {
    for (TensorInfo t : stored_->tensors()) {
      const std::string from = t.name;
      t.name = common_name(from);
      if (t.name.empty()) continue;
      if (is_stack(t)) std::swap(t.shape[1], t.shape[2]);
      check(names_.emplace(t.name, from).second, "{}: two tensors are called '{}'", path().string(), shown(t.name));
      tensors_.push_back(std::move(t));
    }
  }

  const json& config() const override { return config_; }
  const json& generation_config() const override { return stored_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return names_.count(name) > 0; }
  TensorView get(const std::string& name) const override {
    const auto it = names_.find(name);
    check(it != names_.end(), "{}: there is no tensor '{}'", path().string(), shown(name));
    TensorView v = stored_->get(it->second);
    v.name = name;
    if (!is_stack(v)) return v;
    const auto element = static_cast<size_t>(info(v.format).bytes);
    check(!is_block(v.format), "{}: tensor '{}' is quantized; modules are stored as floats", path().string(),
          shown(name));
    const auto count = static_cast<size_t>(v.shape[0]), in = static_cast<size_t>(v.shape[1]),
               out = static_cast<size_t>(v.shape[2]);
    const auto turned = std::make_shared<std::vector<std::byte>>(v.data.size());
    for (size_t m = 0; m < count; ++m)
      for (size_t i = 0; i < in; ++i)
        for (size_t o = 0; o < out; ++o)
          std::memcpy(turned->data() + ((m * out + o) * in + i) * element,
                      v.data.data() + ((m * in + i) * out + o) * element, element);
    std::swap(v.shape[1], v.shape[2]);
    v.data = *turned;
    v.owner = turned;
    return v;
  }
  std::filesystem::path path() const override { return stored_->path(); }
  int64_t bytes_on_disk() const override { return stored_->bytes_on_disk(); }

 private:
  std::shared_ptr<const Checkpoint> stored_;
  json config_;
  std::map<std::string, std::string> names_;  // here -> stored
  std::vector<TensorInfo> tensors_;
};

}  // namespace

json moduleformer_config(const json& config) {
  if (!is_family(config) || (config.contains("moiety") && config["moiety"].contains("parts"))) return config;
  if (config.contains("hidden_size") && !config.contains("n_embd")) return config;
  json out = config;
  const auto number = [&](const char* key, int64_t otherwise) {
    if (!config.contains(key) || config[key].is_null()) return otherwise;
    check(config[key].is_number_integer() && config[key].get<int64_t>() >= 0, "config.json: '{}' is {}, not a number",
          key, config[key].dump());
    return config[key].get<int64_t>();
  };
  const auto real = [&](const char* key, double otherwise) {
    if (!config.contains(key) || config[key].is_null()) return otherwise;
    check(config[key].is_number(), "config.json: '{}' is {}, not a number", key, config[key].dump());
    return config[key].get<double>();
  };
  const auto text = [&](const char* key, const char* otherwise) -> std::string {
    if (!config.contains(key) || config[key].is_null()) return otherwise;
    check(config[key].is_string(), "config.json: '{}' is {}, not a text", key, config[key].dump());
    return config[key].get<std::string>();
  };
  const int64_t hidden = number("n_embd", 1024), heads = number("n_head", 8), width = number("att_hidden", 512);
  check(heads >= 1 && width % heads == 0, "config.json: 'att_hidden' {} cannot be shared by 'n_head' {}", width, heads);
  check(!(heads == 1 && width == hidden),
        "config.json: keys and values that are not projected ('att_hidden' equal to 'n_embd' and one head) are not "
        "supported");
  const std::string act = text("activation_function", "gelu_new");
  check(act == "gelu_new", "config.json: 'activation_function' is {}; modules with gelu_new are supported", shown(act));
  out["hidden_size"] = hidden;
  out["num_hidden_layers"] = number("n_layer", 24);
  out["num_attention_heads"] = heads;
  out["intermediate_size"] = number("ffd_hidden", 2048);
  out["vocab_size"] = number("vocab_size", 50295);
  out["max_position_embeddings"] = number("block_size", 512) + number("history_length", 512);
  out["layer_norm_eps"] = 1e-5;  // of torch's LayerNorm: the released model does not pass its key on
  out["hidden_act"] = act;
  if (!out.contains("tie_word_embeddings")) out["tie_word_embeddings"] = false;
  const auto part = [&](const char* slug, const char* modules, const char* chosen, int64_t size) {
    const int64_t count = number(modules, 32), k = number(chosen, 2);
    check(k >= 1 && k <= count, "config.json: '{}' is {}, but '{}' is {}", chosen, k, modules, count);
    return json{{"slug", slug},
                {"modules", count},
                {"top_k", k},
                {"width", size},
                {"gating_size", number("gating_size", 256)},
                {"gate_type", text("gate_type", "mlp")},
                {"aux_loss", text("aux_loss_type", "mi")},
                {"aux_loss_weight", real("aux_loss_weight", 0.0)},
                {"gate_dropout", real("moe_pdrop", 0.0)},
                {"sample_top_k", number("sample_topk", 0)}};
  };
  auto attention = part("moduleformer-attention", "n_att_experts", "k_att", width);
  attention["heads"] = heads;
  out["moiety"]["parts"] =
      json::array({part("moduleformer", "n_mlp_experts", "k_mlp", out["intermediate_size"]), attention});
  return out;
}

std::shared_ptr<const Checkpoint> with_common_names(std::shared_ptr<const Checkpoint> checkpoint) {
  if (!is_family(checkpoint->config()) || !checkpoint->has(std::string(kPrefix) + "wte.weight")) return checkpoint;
  return std::make_shared<CommonNames>(std::move(checkpoint));
}

}  // namespace moiety
