#pragma once
// One description of every decoder family: config.json of a Hugging Face checkpoint reduced to switches.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/gguf_names.h"
#include "moiety/moe/router.h"
#include "moiety/nn/rope.h"

namespace moiety {

enum class NormKind { rms, rms_offset, layer, layer_without_bias, layer_plain };
enum class Placement {
  pre,       ///< x + attn(norm x), then x + ffn(norm x)
  post,      ///< x + norm(attn x), then x + norm(ffn x) (OLMo 2)
  sandwich,  ///< x + norm(attn(norm x)), then x + norm(ffn(norm x)) (Gemma 2, 3)
  parallel,  ///< x + attn(norm x) + ffn(norm x) (Phi-2, Cohere)
};

struct MixtureConfig {
  int64_t experts = 0;              ///< to choose from: rows of the router
  int64_t matrices = 0;             ///< experts that there are, where some rows share one (`expert_map`); 0: `experts`
  std::vector<int64_t> expert_map;  ///< row of the router -> expert; empty: the identity
  int64_t width = 0;                ///< hidden units of one expert
  TopKRouterOptions router;
  bool sparse_mixer = false;
  double sparse_mixer_jitter = 0.01;
  int64_t shared_width = 0;  ///< hidden units of the shared expert, 0: none
  bool shared_gate = false;
  bool choice_bias = false;
  BalanceRule balance;  ///< what the family is trained with; without a weight unless the config gives one
  double jitter = 0.0;  ///< see Mixture::jitter
  bool router_bias = false;
  bool clamped = false;  ///< gpt-oss experts
  double clamp_alpha = 1.702, clamp_limit = 7.0;
};

struct LatentConfig {
  int64_t q_rank = 0, rank = 0, nope = 0, rope = 0, v = 0;
};

struct LayerConfig {
  int64_t window = 0;  ///< sliding window, 0: full attention
  int64_t rope = 0;    ///< index into DecoderConfig::ropes, -1: no positions
  bool mixture = false;
  int64_t experts = 0;              ///< of this layer alone, from `moiety.experts`; 0: as in all layers
  std::vector<int64_t> expert_map;  ///< see MixtureConfig
};

struct DecoderConfig {
  std::string family;
  int64_t vocab = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, context = 0;
  std::string act = "silu";
  bool gated = true;
  NormKind norm = NormKind::rms;
  double norm_eps = 1e-6;
  Placement placement = Placement::pre;
  bool tied = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false, head_bias = false;
  bool qk_norm = false, qk_norm_all_heads = false, qk_norm_per_head_layer = false, qk_norm_after_rope = false,
       sinks = false;
  double clip_qkv = 0.0;
  double attention_scale = 0.0, attention_softcap = 0.0;
  double embedding_scale = 1.0, residual_scale = 1.0, logits_scale = 1.0, logits_softcap = 0.0;
  double init_std = 0.02;
  bool latent = false;
  LatentConfig mla;
  MixtureConfig moe;
  bool added_choice_bias = false;  ///< `moiety.choice_bias`: routers have one that their family does not know
  std::vector<RopeConfig> ropes;
  std::vector<LayerConfig> layers;

  /// The mixture of one layer, whose number of experts may be its own.
  MixtureConfig mixture_of(int64_t layer) const;
};

/// Reads config.json (nested text_config included; current and older key names). Throws Error for an unknown model_type
/// (naming the nearest), missing or impossible values (naming the key). `moiety.experts` of a model that was made
/// smaller says what its layers have of their own: {"LAYER": {"count": experts, "map": [row of the router -> expert]}}.
DecoderConfig parse_decoder_config(const nlohmann::json& config);
/// model_type values that parse_decoder_config knows.
std::vector<std::string> decoder_families();

}  // namespace moiety
