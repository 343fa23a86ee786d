#include "moiety/io/hf_defaults.h"

#include <algorithm>
#include <string_view>
#include <utility>

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
    {"llama", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
              R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-06,)"
              R"("tie_word_embeddings":false})"},
    {"mistral", R"({"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,)"
                R"("num_attention_heads":32,"num_key_value_heads":8,"max_position_embeddings":131072,)"
                R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"sliding_window":4096})"},
    {"ministral", R"({"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,)"
                  R"("num_attention_heads":32,"num_key_value_heads":8,"max_position_embeddings":131072,)"
                  R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"sliding_window":4096})"},
    {"mixtral", R"({"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,)"
                R"("num_attention_heads":32,"num_key_value_heads":8,"max_position_embeddings":131072,)"
                R"("rms_norm_eps":1e-05,"tie_word_embeddings":false,"num_experts_per_tok":2,)"
                R"("num_local_experts":8,"router_jitter_noise":0.0,"rope_theta":1000000.0})"},
    {"smollm3", R"({"hidden_size":2048,"intermediate_size":11008,"num_hidden_layers":36,)"
                R"("num_attention_heads":16,"num_key_value_heads":4,"max_position_embeddings":32768,)"
                R"("rms_norm_eps":1e-06,"tie_word_embeddings":true,"use_sliding_window":false,)"
                R"("rope_theta":2000000.0})"},
    {"qwen2", R"({"hidden_size":4096,"intermediate_size":22016,"num_hidden_layers":32,)"
              R"("num_attention_heads":32,"num_key_value_heads":32,"max_position_embeddings":32768,)"
              R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"sliding_window":4096,)"
              R"("use_sliding_window":false})"},
    {"qwen3", R"({"hidden_size":4096,"intermediate_size":22016,"num_hidden_layers":32,)"
              R"("num_attention_heads":32,"num_key_value_heads":32,"head_dim":128,)"
              R"("max_position_embeddings":32768,"rms_norm_eps":1e-06,"tie_word_embeddings":false,)"
              R"("sliding_window":4096,"use_sliding_window":false})"},
    {"qwen2_moe", R"({"hidden_size":2048,"intermediate_size":5632,"num_hidden_layers":24,)"
                  R"("num_attention_heads":16,"num_key_value_heads":16,"max_position_embeddings":32768,)"
                  R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"sliding_window":4096,)"
                  R"("use_sliding_window":false,"num_experts_per_tok":4,"num_experts":60,)"
                  R"("moe_intermediate_size":1408,"shared_expert_intermediate_size":5632,"norm_topk_prob":false,)"
                  R"("qkv_bias":true})"},
    {"qwen3_moe", R"({"hidden_size":2048,"intermediate_size":6144,"num_hidden_layers":24,)"
                  R"("num_attention_heads":32,"num_key_value_heads":4,"max_position_embeddings":32768,)"
                  R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"sliding_window":4096,)"
                  R"("use_sliding_window":false,"num_experts_per_tok":8,"num_experts":128,)"
                  R"("moe_intermediate_size":768,"norm_topk_prob":false})"},
    {"olmo", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
             R"("num_attention_heads":32,"max_position_embeddings":2048,"tie_word_embeddings":false})"},
    {"olmo2", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
              R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-05,)"
              R"("tie_word_embeddings":false})"},
    {"olmo3", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
              R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-05,)"
              R"("tie_word_embeddings":false,"sliding_window":4096,"rope_theta":500000.0})"},
    {"olmoe", R"({"hidden_size":2048,"intermediate_size":2048,"num_hidden_layers":16,)"
              R"("num_attention_heads":16,"max_position_embeddings":4096,"rms_norm_eps":1e-05,)"
              R"("tie_word_embeddings":false,"num_experts_per_tok":8,"num_experts":64,"norm_topk_prob":false})"},
    {"flex_olmo", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
                  R"("num_attention_heads":32,"max_position_embeddings":4096,"rms_norm_eps":1e-06,)"
                  R"("tie_word_embeddings":false,"num_experts":7,"num_experts_per_tok":5,"norm_topk_prob":false,)"
                  R"("rope_theta":500000.0})"},
    {"gemma", R"({"hidden_size":3072,"intermediate_size":24576,"num_hidden_layers":28,)"
              R"("num_attention_heads":16,"num_key_value_heads":16,"head_dim":256,)"
              R"("max_position_embeddings":8192,"rms_norm_eps":1e-06,"tie_word_embeddings":true,)"
              R"("hidden_act":"gelu_pytorch_tanh"})"},
    {"gemma2", R"({"hidden_size":2304,"intermediate_size":9216,"num_hidden_layers":26,"num_attention_heads":8,)"
               R"("num_key_value_heads":4,"head_dim":256,"max_position_embeddings":8192,"rms_norm_eps":1e-06,)"
               R"("tie_word_embeddings":true,"sliding_window":4096,"query_pre_attn_scalar":256,)"
               R"("final_logit_softcapping":30.0,"attn_logit_softcapping":50.0,)"
               R"("hidden_activation":"gelu_pytorch_tanh"})"},
    {"gemma3_text", R"({"hidden_size":2304,"intermediate_size":9216,"num_hidden_layers":26,"num_attention_heads":8,)"
                    R"("num_key_value_heads":4,"head_dim":256,"max_position_embeddings":131072,)"
                    R"("rms_norm_eps":1e-06,"tie_word_embeddings":true,"sliding_window":4096,)"
                    R"("query_pre_attn_scalar":256,"hidden_activation":"gelu_pytorch_tanh","rope_theta":1000000.0})"},
    {"phi", R"({"hidden_size":2048,"intermediate_size":8192,"num_hidden_layers":24,)"
            R"("num_attention_heads":32,"max_position_embeddings":2048,"layer_norm_eps":1e-05,)"
            R"("hidden_act":"gelu_new","tie_word_embeddings":false,"partial_rotary_factor":0.5})"},
    {"phi3", R"({"hidden_size":3072,"intermediate_size":8192,"num_hidden_layers":32,)"
             R"("num_attention_heads":32,"max_position_embeddings":4096,"rms_norm_eps":1e-05,)"
             R"("tie_word_embeddings":false,"original_max_position_embeddings":4096})"},
    {"phimoe", R"({"hidden_size":4096,"intermediate_size":6400,"num_hidden_layers":32,)"
               R"("num_attention_heads":32,"num_key_value_heads":8,"max_position_embeddings":131072,)"
               R"("rms_norm_eps":1e-05,"tie_word_embeddings":false,"num_experts_per_tok":2,)"
               R"("num_local_experts":16,"router_jitter_noise":0.01,"rope_theta":1000000.0})"},
    {"deepseek_v2", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
                    R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-06,)"
                    R"("tie_word_embeddings":false,"n_routed_experts":64,"n_shared_experts":2,)"
                    R"("moe_intermediate_size":1407,"norm_topk_prob":false,"first_k_dense_replace":0,)"
                    R"("kv_lora_rank":512,"q_lora_rank":1536,"qk_rope_head_dim":64,"qk_nope_head_dim":128,)"
                    R"("v_head_dim":128,"topk_method":"greedy","routed_scaling_factor":1.0})"},
    {"deepseek_v3", R"({"hidden_size":7168,"intermediate_size":18432,"num_hidden_layers":61,)"
                    R"("num_attention_heads":128,"num_key_value_heads":128,"max_position_embeddings":4096,)"
                    R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"num_experts_per_tok":8,)"
                    R"("n_routed_experts":256,"n_shared_experts":1,"moe_intermediate_size":2048,)"
                    R"("norm_topk_prob":true,"first_k_dense_replace":3,"kv_lora_rank":512,"q_lora_rank":1536,)"
                    R"("qk_rope_head_dim":64,"qk_nope_head_dim":128,"v_head_dim":128,"n_group":8,"topk_group":4,)"
                    R"("routed_scaling_factor":2.5})"},
    {"dots1", R"({"hidden_size":4608,"intermediate_size":10944,"num_hidden_layers":62,)"
              R"("num_attention_heads":32,"num_key_value_heads":32,"max_position_embeddings":2048,)"
              R"("rms_norm_eps":1e-06,"tie_word_embeddings":false,"sliding_window":4096,)"
              R"("norm_topk_prob":false,"moe_intermediate_size":1408,"first_k_dense_replace":0,"n_group":1,)"
              R"("topk_group":1,"routed_scaling_factor":1.0})"},
    {"glm", R"({"hidden_size":4096,"intermediate_size":13696,"num_hidden_layers":40,)"
            R"("num_attention_heads":32,"num_key_value_heads":2,"head_dim":128,)"
            R"("max_position_embeddings":131072,"rms_norm_eps":1.5625e-07,"tie_word_embeddings":false,)"
            R"("attention_bias":true,"partial_rotary_factor":0.5})"},
    {"glm4", R"({"hidden_size":4096,"intermediate_size":13696,"num_hidden_layers":40,)"
             R"("num_attention_heads":32,"num_key_value_heads":2,"head_dim":128,)"
             R"("max_position_embeddings":131072,"rms_norm_eps":1.5625e-07,"tie_word_embeddings":false,)"
             R"("attention_bias":true,"partial_rotary_factor":0.5})"},
    {"glm4_moe", R"({"hidden_size":4096,"intermediate_size":10944,"num_hidden_layers":46,)"
                 R"("num_attention_heads":96,"num_key_value_heads":8,"max_position_embeddings":131072,)"
                 R"("rms_norm_eps":1e-05,"tie_word_embeddings":false,"n_routed_experts":128,)"
                 R"("num_experts_per_tok":8,"norm_topk_prob":true,"moe_intermediate_size":1408,)"
                 R"("n_shared_experts":1,"first_k_dense_replace":1,"n_group":1,"topk_group":1,)"
                 R"("routed_scaling_factor":1.0,"partial_rotary_factor":0.5})"},
    {"granite", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
                R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-06,)"
                R"("tie_word_embeddings":false,"embedding_multiplier":1.0,"logits_scaling":1.0,)"
                R"("residual_multiplier":1.0,"attention_multiplier":1.0})"},
    {"granitemoe", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
                   R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-06,)"
                   R"("tie_word_embeddings":false,"num_experts_per_tok":2,"num_local_experts":8,)"
                   R"("embedding_multiplier":1.0,"logits_scaling":1.0,"residual_multiplier":1.0,)"
                   R"("attention_multiplier":1.0})"},
    {"granitemoeshared", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
                         R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-06,)"
                         R"("tie_word_embeddings":false,"num_experts_per_tok":2,"num_local_experts":8,)"
                         R"("shared_intermediate_size":0,"embedding_multiplier":1.0,"logits_scaling":1.0,)"
                         R"("residual_multiplier":1.0,"attention_multiplier":1.0})"},
    {"gpt_oss", R"({"hidden_size":2880,"intermediate_size":2880,"num_hidden_layers":36,)"
                R"("num_attention_heads":64,"num_key_value_heads":8,"head_dim":64,)"
                R"("max_position_embeddings":131072,"rms_norm_eps":1e-05,"tie_word_embeddings":false,)"
                R"("sliding_window":128,"num_experts_per_tok":4,"num_local_experts":128,"attention_bias":true,)"
                R"("rope_theta":150000.0})"},
    {"starcoder2", R"({"hidden_size":3072,"intermediate_size":12288,"num_hidden_layers":30,)"
                   R"("num_attention_heads":24,"num_key_value_heads":2,"max_position_embeddings":4096,)"
                   R"("norm_epsilon":1e-05,"hidden_act":"gelu_pytorch_tanh","tie_word_embeddings":true,)"
                   R"("use_bias":true})"},
    {"stablelm", R"({"hidden_size":2560,"intermediate_size":6912,"num_hidden_layers":32,)"
                 R"("num_attention_heads":32,"num_key_value_heads":32,"max_position_embeddings":4096,)"
                 R"("layer_norm_eps":1e-05,"tie_word_embeddings":false,"partial_rotary_factor":0.25})"},
    {"cohere", R"({"hidden_size":8192,"intermediate_size":22528,"num_hidden_layers":40,)"
               R"("num_attention_heads":64,"max_position_embeddings":8192,"layer_norm_eps":1e-05,)"
               R"("tie_word_embeddings":true,"logit_scale":0.0625,"rope_theta":500000.0})"},
    {"cohere2", R"({"hidden_size":8192,"intermediate_size":22528,"num_hidden_layers":40,)"
                R"("num_attention_heads":64,"max_position_embeddings":8192,"layer_norm_eps":1e-05,)"
                R"("tie_word_embeddings":true,"sliding_window":4096,"logit_scale":0.0625})"},
    {"helium", R"({"hidden_size":2560,"intermediate_size":7040,"num_hidden_layers":24,)"
               R"("num_attention_heads":20,"num_key_value_heads":20,"head_dim":128,)"
               R"("max_position_embeddings":4096,"rms_norm_eps":1e-08,"tie_word_embeddings":false,)"
               R"("rope_theta":100000.0})"},
    {"ernie4_5", R"({"hidden_size":1024,"intermediate_size":3072,"num_hidden_layers":18,)"
                 R"("num_attention_heads":16,"num_key_value_heads":2,"head_dim":128,)"
                 R"("max_position_embeddings":131072,"rms_norm_eps":1e-05,"tie_word_embeddings":true,)"
                 R"("rope_theta":500000.0})"},
    {"exaone4", R"({"hidden_size":4096,"intermediate_size":16384,"num_hidden_layers":32,)"
                R"("num_attention_heads":32,"num_key_value_heads":32,"max_position_embeddings":2048,)"
                R"("rms_norm_eps":1e-05,"tie_word_embeddings":false,"sliding_window":4096,)"
                R"("sliding_window_pattern":4})"},
    {"seed_oss", R"({"hidden_size":4096,"intermediate_size":27648,"num_hidden_layers":64,)"
                 R"("num_attention_heads":80,"num_key_value_heads":8,"head_dim":128,)"
                 R"("max_position_embeddings":524288,"rms_norm_eps":1e-06,"tie_word_embeddings":false,)"
                 R"("attention_bias":true})"},
    {"hunyuan_v1_dense", R"({"hidden_size":4096,"intermediate_size":11008,"num_hidden_layers":32,)"
                         R"("num_attention_heads":32,"max_position_embeddings":2048,"rms_norm_eps":1e-05,)"
                         R"("tie_word_embeddings":false})"},
    {"arcee", R"({"hidden_size":2560,"intermediate_size":18432,"num_hidden_layers":32,)"
              R"("num_attention_heads":32,"max_position_embeddings":4096,"rms_norm_eps":1e-05,)"
              R"("hidden_act":"relu2","tie_word_embeddings":false})"},
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
  std::string type;
  for (const json* place : {&config, &std::as_const(out)})
    if (const auto it = place->find("model_type"); it != place->end() && it->is_string()) type = *it;
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
