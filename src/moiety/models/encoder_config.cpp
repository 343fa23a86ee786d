#include "moiety/models/encoder_config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/models/model.h"

namespace moiety {
namespace {

using nlohmann::json;

std::string family_of(const json& config) {
  const auto it = config.find("model_type");
  return it != config.end() && it->is_string() ? it->get<std::string>() : "";
}

int64_t integer(const json& config, std::initializer_list<const char*> keys,
                std::optional<int64_t> fallback = std::nullopt) {
  for (const char* key : keys) {
    const auto it = config.find(key);
    if (it == config.end() || it->is_null()) continue;
    check(it->is_number_integer(), "config.json: {} must be a whole number, not {}", key, it->dump());
    const auto value = it->get<int64_t>();
    check(value >= 0 && value <= std::numeric_limits<int32_t>::max(), "config.json: {} is {}, outside 0 .. 2147483647",
          key, value);
    return value;
  }
  check(fallback.has_value(), "config.json has no {}", *keys.begin());
  return *fallback;
}

double real(const json& config, const char* key, double fallback) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return fallback;
  check(it->is_number(), "config.json: {} must be a number, not {}", key, it->dump());
  return it->get<double>();
}

std::string text(const json& config, const char* key, const std::string& fallback) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return fallback;
  check(it->is_string(), "config.json: {} must be a string, not {}", key, it->dump());
  return it->get<std::string>();
}

bool flag(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return false;
  check(it->is_boolean(), "config.json: {} must be true or false, not {}", key, it->dump());
  return it->get<bool>();
}

json object(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return json::object();
  check(it->is_object(), "config.json: {} must be an object, not {}", key, it->dump());
  return *it;
}

/// RoPE of one kind of layer.
RopeConfig rope_of(const EncoderSpec& s, const json& parameters, double theta) {
  RopeConfig rope;
  rope.theta = real(parameters, "rope_theta", theta);
  check(rope.theta > 0.0 && std::isfinite(rope.theta), "config.json: rope_theta must be positive, not {}", rope.theta);
  rope.type = text(parameters, "rope_type", text(parameters, "type", "default"));
  rope.parameters = parameters;
  rope.head_dim = s.head_dim;
  rope.max_positions = s.positions;
  return rope;
}

}  // namespace

std::vector<std::string> encoder_families() {
  return {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "nomic_bert", "modernbert"};
}

EncoderSpec parse_encoder_config(const json& config) {
  check(config.is_object(), "config.json must be an object");
  EncoderSpec s;
  s.family = family_of(config);
  const auto known = encoder_families();
  check(std::find(known.begin(), known.end(), s.family) != known.end(),
        "config.json: model_type `{}` is not an encoder that moiety knows{}; known are {}", shown(s.family),
        did_you_mean(s.family, known), list_of(known, "and"));
  const bool distil = s.family == "distilbert", nomic = s.family == "nomic_bert", modern = s.family == "modernbert";
  s.vocabulary = integer(config, {"vocab_size"});
  s.hidden = integer(config, {"hidden_size", "dim", "n_embd"});
  s.heads = integer(config, {"num_attention_heads", "n_heads", "n_head"});
  s.layers = integer(config, {"num_hidden_layers", "n_layers", "n_layer"});
  check(s.layers <= 100000, "config.json: {} layers, allowed is up to 100000", s.layers);
  s.intermediate = integer(config, {distil ? "hidden_dim" : "intermediate_size", "n_inner"});
  s.positions = integer(config, {"max_position_embeddings", "n_positions"});
  s.types = integer(config, {"type_vocab_size"}, 0);
  s.embedding = s.family == "electra" ? integer(config, {"embedding_size"}, s.hidden) : s.hidden;
  check(s.hidden > 0 && s.heads > 0 && s.hidden % s.heads == 0,
        "config.json: hidden_size {} must be a positive multiple of num_attention_heads {}", s.hidden, s.heads);
  s.head_dim = integer(config, {"head_dim"}, s.hidden / s.heads);
  check(s.head_dim > 0 && s.head_dim <= 65536 && s.heads <= 65536,
        "config.json: {} heads of size {}, allowed is 1 to 65536 for both", s.heads, s.head_dim);
  s.activation = distil   ? text(config, "activation", "gelu")
                 : modern ? text(config, "hidden_activation", "gelu")
                          : text(config, "hidden_act", nomic ? "silu" : "gelu");
  // Nomic's own config.json names the gated activation.
  const std::string own = text(config, "activation_function", "");
  if (nomic && own == "swiglu") s.activation = "silu";
  if (nomic && own == "geglu") s.activation = "gelu";
  s.eps = distil   ? 1e-12
          : modern ? real(config, "norm_eps", 1e-5)
                   : real(config, "layer_norm_eps", real(config, "layer_norm_epsilon", 1e-12));
  if (s.family == "roberta" || s.family == "xlm-roberta" || s.family == "camembert")
    s.padding = integer(config, {"pad_token_id"}, 1);
  if (s.family == "mpnet") s.padding = 1;  // fixed in the model, whatever the config says
  const std::string kind = text(config, "position_embedding_type", "absolute");
  check(kind == "absolute", "config.json: position_embedding_type '{}' is not supported; only 'absolute' is", kind);
  s.buckets = integer(config, {"relative_attention_num_buckets"}, s.buckets);
  if (nomic) {
    s.rotary = true;
    s.rope = rope_of(s, object(config, "rope_parameters"),
                     real(config, "rotary_emb_base", real(config, "rope_theta", 1000.0)));
    const double fraction = real(config, "rotary_emb_fraction", 1.0);
    check(fraction == 1.0, "config.json: rotary_emb_fraction {} is not supported; only 1 is", fraction);
    check(!flag(config, "rotary_emb_interleaved") && !flag(config, "prenorm"),
          "config.json: rotary_emb_interleaved and prenorm are not supported in nomic_bert");
  }
  if (modern) {
    s.rotary = s.pre_norm = true;
    s.window = integer(config, {"local_attention"}, 128) / 2;
    const json both = object(config, "rope_parameters");
    s.rope = rope_of(s, object(both, "full_attention"), real(config, "global_rope_theta", 160000.0));
    s.local_rope = rope_of(s, object(both, "sliding_attention"), real(config, "local_rope_theta", 10000.0));
    const auto kinds = config.find("layer_types");
    if (kinds != config.end() && !kinds->is_null()) {
      check(kinds->is_array() && static_cast<int64_t>(kinds->size()) == s.layers,
            "config.json: layer_types must be a list of {} names, one a layer", s.layers);
      for (const auto& k : *kinds) {
        check(k == "sliding_attention" || k == "full_attention",
              "config.json: layer_types holds {}; known are full_attention, sliding_attention", k.dump());
        s.local.push_back(k == "sliding_attention");
      }
    } else {
      const int64_t every = integer(config, {"global_attn_every_n_layers"}, 3);
      check(every > 0, "config.json: global_attn_every_n_layers is 0");
      for (int64_t i = 0; i < s.layers; ++i) s.local.push_back(i % every != 0);
    }
  }
  return s;
}

EncoderNames encoder_names(const std::string& family, bool transformers_names) {
  if (family == "electra") return {.projection = "embeddings_project", .pooler = ""};
  if (family == "mpnet")
    return {.type = "",
            .relative = "encoder.relative_attention_bias",
            .q = "attention.attn.q",
            .k = "attention.attn.k",
            .v = "attention.attn.v",
            .out = "attention.attn.o",
            .attention_norm = "attention.LayerNorm"};
  if (family == "distilbert")
    return {.type = "",
            .pooler = "",
            .layer = "transformer.layer.",
            .q = "attention.q_lin",
            .k = "attention.k_lin",
            .v = "attention.v_lin",
            .out = "attention.out_lin",
            .attention_norm = "sa_layer_norm",
            .up = "ffn.lin1",
            .down = "ffn.lin2",
            .ffn_norm = "output_layer_norm"};
  if (family == "nomic_bert" && transformers_names)
    return {.position = "",
            .pooler = "",
            .layer = "layers.",
            .q = "self_attn.q_proj",
            .k = "self_attn.k_proj",
            .v = "self_attn.v_proj",
            .out = "self_attn.o_proj",
            .attention_norm = "post_attention_layernorm",
            .up = "mlp.up_proj",
            .gate = "mlp.gate_proj",
            .down = "mlp.down_proj",
            .ffn_norm = "post_mlp_layernorm"};
  if (family == "nomic_bert")
    return {.position = "",
            .embedding_norm = "emb_ln",
            .pooler = "",
            .layer = "encoder.layers.",
            .qkv = "attn.Wqkv",
            .out = "attn.out_proj",
            .attention_norm = "norm1",
            .up = "mlp.fc11",
            .gate = "mlp.fc12",
            .down = "mlp.fc2",
            .ffn_norm = "norm2"};
  if (family == "modernbert")
    return {.word = "embeddings.tok_embeddings",
            .position = "",
            .type = "",
            .embedding_norm = "embeddings.norm",
            .final_norm = "final_norm",
            .pooler = "",
            .layer = "layers.",
            .qkv = "attn.Wqkv",
            .out = "attn.Wo",
            .attention_norm = "attn_norm",
            .gate_up = "mlp.Wi",
            .down = "mlp.Wo",
            .ffn_norm = "mlp_norm"};
  return {};
}

}  // namespace moiety
