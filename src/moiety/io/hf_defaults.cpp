#include "moiety/io/hf_defaults.h"

#include <algorithm>
#include <string_view>

#include "moiety/io/gguf_names.h"

using nlohmann::json;

namespace moiety {
namespace {

struct Defaults {
  std::string_view model_type;
  const char* values;
};

// Class attributes of transformers 5's configuration classes.
constexpr Defaults kDefaults[] = {
    {"llama", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
              R"("max_position_embeddings":2048,"rms_norm_eps":1e-06,"tie_word_embeddings":false})"},
    {"mistral", R"({"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,)"
                R"("num_key_value_heads":8,"max_position_embeddings":131072,"rms_norm_eps":1e-06,)"
                R"("tie_word_embeddings":false,"sliding_window":4096})"},
    {"mixtral", R"({"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,)"
                R"("num_key_value_heads":8,"max_position_embeddings":131072,"rms_norm_eps":1e-05,)"
                R"("tie_word_embeddings":false,"num_experts_per_tok":2,"num_local_experts":8})"},
    {"smollm3", R"({"hidden_size":2048,"intermediate_size":11008,"num_hidden_layers":36,"num_attention_heads":16,)"
                R"("num_key_value_heads":4,"max_position_embeddings":32768,"rms_norm_eps":1e-06,)"
                R"("tie_word_embeddings":true,"use_sliding_window":false})"},
    {"qwen2", R"({"hidden_size":4096,"intermediate_size":22016,"num_hidden_layers":32,"num_attention_heads":32,)"
              R"("num_key_value_heads":32,"max_position_embeddings":32768,"rms_norm_eps":1e-06,)"
              R"("tie_word_embeddings":false,"sliding_window":4096,"use_sliding_window":false})"},
    {"qwen3", R"({"hidden_size":4096,"intermediate_size":22016,"num_hidden_layers":32,"num_attention_heads":32,)"
              R"("num_key_value_heads":32,"head_dim":128,"max_position_embeddings":32768,"rms_norm_eps":1e-06,)"
              R"("tie_word_embeddings":false,"sliding_window":4096,"use_sliding_window":false})"},
    {"qwen2_moe", R"({"hidden_size":2048,"intermediate_size":5632,"num_hidden_layers":24,"num_attention_heads":16,)"
                  R"("num_key_value_heads":16,"max_position_embeddings":32768,"rms_norm_eps":1e-06,)"
                  R"("tie_word_embeddings":false,"sliding_window":4096,"use_sliding_window":false,)"
                  R"("num_experts_per_tok":4,"num_experts":60,"moe_intermediate_size":1408,)"
                  R"("shared_expert_intermediate_size":5632,"norm_topk_prob":false})"},
    {"qwen3_moe", R"({"hidden_size":2048,"intermediate_size":6144,"num_hidden_layers":24,"num_attention_heads":32,)"
                  R"("num_key_value_heads":4,"max_position_embeddings":32768,"rms_norm_eps":1e-06,)"
                  R"("tie_word_embeddings":false,"sliding_window":4096,"use_sliding_window":false,)"
                  R"("num_experts_per_tok":8,"num_experts":128,"moe_intermediate_size":768,"norm_topk_prob":false})"},
    {"olmoe", R"({"hidden_size":2048,"intermediate_size":2048,"num_hidden_layers":16,"num_attention_heads":16,)"
              R"("max_position_embeddings":4096,"rms_norm_eps":1e-05,"tie_word_embeddings":false,)"
              R"("num_experts_per_tok":8,"num_experts":64,"norm_topk_prob":false})"},
    {"olmo2", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
              R"("max_position_embeddings":2048,"rms_norm_eps":1e-05,"tie_word_embeddings":false})"},
    {"olmo3", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
              R"("max_position_embeddings":2048,"rms_norm_eps":1e-05,"tie_word_embeddings":false,)"
              R"("sliding_window":4096})"},
    {"gemma", R"({"hidden_size":3072,"intermediate_size":24576,"num_hidden_layers":28,"num_attention_heads":16,)"
              R"("num_key_value_heads":16,"head_dim":256,"max_position_embeddings":8192,"rms_norm_eps":1e-06,)"
              R"("tie_word_embeddings":true})"},
    {"gemma2", R"({"hidden_size":2304,"intermediate_size":9216,"num_hidden_layers":26,"num_attention_heads":8,)"
               R"("num_key_value_heads":4,"head_dim":256,"max_position_embeddings":8192,"rms_norm_eps":1e-06,)"
               R"("tie_word_embeddings":true,"sliding_window":4096,"query_pre_attn_scalar":256,)"
               R"("final_logit_softcapping":30.0,"attn_logit_softcapping":50.0})"},
    {"gemma3_text", R"({"hidden_size":2304,"intermediate_size":9216,"num_hidden_layers":26,"num_attention_heads":8,)"
                    R"("num_key_value_heads":4,"head_dim":256,"max_position_embeddings":131072,"rms_norm_eps":1e-06,)"
                    R"("tie_word_embeddings":true,"sliding_window":4096,"query_pre_attn_scalar":256})"},
    {"phi3", R"({"hidden_size":3072,"intermediate_size":8192,"num_hidden_layers":32,"num_attention_heads":32,)"
             R"("max_position_embeddings":4096,"rms_norm_eps":1e-05,"tie_word_embeddings":false,)"
             R"("original_max_position_embeddings":4096})"},
    {"phimoe", R"({"hidden_size":4096,"intermediate_size":6400,"num_hidden_layers":32,"num_attention_heads":32,)"
               R"("num_key_value_heads":8,"max_position_embeddings":131072,"rms_norm_eps":1e-05,)"
               R"("tie_word_embeddings":false,"num_experts_per_tok":2,"num_local_experts":16})"},
    {"deepseek_v2", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
                    R"("max_position_embeddings":2048,"rms_norm_eps":1e-06,"tie_word_embeddings":false,)"
                    R"("n_routed_experts":64,"n_shared_experts":2,"moe_intermediate_size":1407,"norm_topk_prob":false,)"
                    R"("first_k_dense_replace":0,"kv_lora_rank":512,"q_lora_rank":1536,"qk_rope_head_dim":64,)"
                    R"("qk_nope_head_dim":128,"v_head_dim":128,"topk_method":"greedy","routed_scaling_factor":1.0})"},
    {"deepseek_v3",
     R"({"hidden_size":7168,"intermediate_size":18432,"num_hidden_layers":61,"num_attention_heads":128,)"
     R"("num_key_value_heads":128,"max_position_embeddings":4096,"rms_norm_eps":1e-06,)"
     R"("tie_word_embeddings":false,"num_experts_per_tok":8,"n_routed_experts":256,"n_shared_experts":1,)"
     R"("moe_intermediate_size":2048,"norm_topk_prob":true,"first_k_dense_replace":3,"kv_lora_rank":512,)"
     R"("q_lora_rank":1536,"qk_rope_head_dim":64,"qk_nope_head_dim":128,"v_head_dim":128,"n_group":8,)"
     R"("topk_group":4,"routed_scaling_factor":2.5})"},
    {"granite", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
                R"("max_position_embeddings":2048,"rms_norm_eps":1e-06,"tie_word_embeddings":false,)"
                R"("embedding_multiplier":1.0,"logits_scaling":1.0,"residual_multiplier":1.0,)"
                R"("attention_multiplier":1.0})"},
    {"granitemoe", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
                   R"("max_position_embeddings":2048,"rms_norm_eps":1e-06,"tie_word_embeddings":false,)"
                   R"("num_experts_per_tok":2,"num_local_experts":8,"embedding_multiplier":1.0,"logits_scaling":1.0,)"
                   R"("residual_multiplier":1.0,"attention_multiplier":1.0})"},
    {"granitemoeshared",
     R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,"num_attention_heads":32,)"
     R"("max_position_embeddings":2048,"rms_norm_eps":1e-06,"tie_word_embeddings":false,)"
     R"("num_experts_per_tok":2,"num_local_experts":8,"shared_intermediate_size":0,)"
     R"("embedding_multiplier":1.0,"logits_scaling":1.0,"residual_multiplier":1.0,)"
     R"("attention_multiplier":1.0})"},
    {"gpt_oss", R"({"hidden_size":2880,"intermediate_size":2880,"num_hidden_layers":36,"num_attention_heads":64,)"
                R"("num_key_value_heads":8,"head_dim":64,"max_position_embeddings":131072,"rms_norm_eps":1e-05,)"
                R"("tie_word_embeddings":false,"sliding_window":128,"num_experts_per_tok":4,)"
                R"("num_local_experts":128})"},
    {"bert", R"({"hidden_size":768,"intermediate_size":3072,"num_hidden_layers":12,"num_attention_heads":12,)"
             R"("max_position_embeddings":512,"layer_norm_eps":1e-12,"tie_word_embeddings":true,)"
             R"("type_vocab_size":2,"pad_token_id":0})"},
    {"roberta", R"({"hidden_size":768,"intermediate_size":3072,"num_hidden_layers":12,"num_attention_heads":12,)"
                R"("max_position_embeddings":512,"layer_norm_eps":1e-12,"tie_word_embeddings":true,)"
                R"("type_vocab_size":2,"pad_token_id":1})"},
    {"distilbert", R"({"max_position_embeddings":512,"tie_word_embeddings":true,"pad_token_id":0,"dim":768,)"
                   R"("n_layers":6,"n_heads":12,"hidden_dim":3072})"},
    {"nomic_bert", R"({"hidden_size":768,"intermediate_size":3072,"num_hidden_layers":12,"num_attention_heads":12,)"
                   R"("max_position_embeddings":2048,"layer_norm_eps":1e-12,"tie_word_embeddings":true,)"
                   R"("type_vocab_size":2})"},
};

}  // namespace

json with_defaults(const json& config) {
  json out = text_config(config);
  std::string type = out.value("model_type", config.value("model_type", ""));
  if (type == "gemma3") type = "gemma3_text";
  const auto* found =
      std::find_if(std::begin(kDefaults), std::end(kDefaults), [&](const Defaults& d) { return d.model_type == type; });
  if (found == std::end(kDefaults)) return out;
  constexpr const char* expert_counts[] = {"num_local_experts", "num_experts", "n_routed_experts"};
  const bool has_experts =
      std::any_of(std::begin(expert_counts), std::end(expert_counts), [&](const char* k) { return out.contains(k); });
  const json defaults = json::parse(found->values);
  for (const auto& [key, value] : defaults.items()) {
    const bool counts_experts =
        std::find(std::begin(expert_counts), std::end(expert_counts), key) != std::end(expert_counts);
    if (!out.contains(key) && !(counts_experts && has_experts)) out[key] = value;
  }
  return out;
}

}  // namespace moiety
