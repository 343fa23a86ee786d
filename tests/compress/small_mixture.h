#pragma once
// Small mixtures with random weights, in every layout that checkpoints keep experts in.
#include <torch/torch.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "moiety/io/overlay.h"
#include "moiety/models/model.h"
#include "moiety/models/random_checkpoint.h"
#include "moiety/nn/weights.h"

namespace moiety::small_mixture {

inline nlohmann::json config_of(const std::string& family, int64_t experts = 6, int64_t top_k = 2) {
  nlohmann::json c = {{"model_type", family},
                      {"vocab_size", 40},
                      {"hidden_size", 32},
                      {"num_hidden_layers", 3},
                      {"num_attention_heads", 4},
                      {"num_key_value_heads", 2},
                      {"head_dim", 8},
                      {"intermediate_size", 24},
                      {"moe_intermediate_size", 24},
                      {"max_position_embeddings", 64},
                      {"initializer_range", 0.3},
                      {"num_experts_per_tok", top_k},
                      {"tie_word_embeddings", false}};
  if (family == "mixtral" || family == "gpt_oss" || family == "granitemoe")
    c["num_local_experts"] = experts;
  else if (family == "deepseek_v3")
    c.update({{"n_routed_experts", experts},
              {"first_k_dense_replace", 1},
              {"n_group", 1},
              {"topk_group", 1},
              {"n_shared_experts", 1},
              {"num_key_value_heads", 4},
              {"q_lora_rank", 12},
              {"kv_lora_rank", 16},
              {"qk_nope_head_dim", 8},
              {"qk_rope_head_dim", 4},
              {"v_head_dim", 8}});
  else
    c["num_experts"] = experts;
  if (family == "qwen2_moe") c["shared_expert_intermediate_size"] = 24;
  return c;
}

/// With one tensor an expert and projection, as checkpoints of the Hub have them.
inline std::shared_ptr<const Checkpoint> separate(std::shared_ptr<const Checkpoint> base) {
  std::vector<OverlayTensor> tensors;
  std::set<std::string> removed;
  const bool mixtral = base->config()["model_type"] == "mixtral";
  for (const auto& t : base->tensors()) {
    const bool both = t.name.ends_with("mlp.experts.gate_up_proj"), down = t.name.ends_with("mlp.experts.down_proj");
    if (!both && !down) continue;
    removed.insert(t.name);
    const std::string at = t.name.substr(0, t.name.find("mlp.experts."));
    const auto all = dequantize(base->get(t.name));
    for (int64_t e = 0; e < t.shape[0]; ++e) {
      const auto add = [&](const char* hub, const char* plain, const torch::Tensor& w) {
        const auto c = w.contiguous();
        tensors.push_back(overlay_of(fmt::format("{}{}experts.{}.{}.weight", at, mixtral ? "block_sparse_moe." : "mlp.",
                                                 e, mixtral ? hub : plain),
                                     c.sizes().vec(),
                                     std::vector<float>(c.data_ptr<float>(), c.data_ptr<float>() + c.numel())));
      };
      const int64_t f = t.shape[1] / 2;
      if (both) {
        add("w1", "gate_proj", all[e].narrow(0, 0, f));
        add("w3", "up_proj", all[e].narrow(0, f, f));
      } else {
        add("w2", "down_proj", all[e]);
      }
    }
    if (both && mixtral) {
      const auto gate = dequantize(base->get(at + "mlp.gate.weight")).contiguous();
      removed.insert(at + "mlp.gate.weight");
      tensors.push_back(overlay_of(at + "block_sparse_moe.gate.weight", gate.sizes().vec(),
                                   std::vector<float>(gate.data_ptr<float>(), gate.data_ptr<float>() + gate.numel())));
    }
  }
  return overlay(base, base->config(), std::move(tensors), removed);
}

inline std::shared_ptr<const Checkpoint> make(const std::string& family, int64_t experts = 6, int64_t top_k = 2,
                                              uint64_t seed = 5) {
  return random_checkpoint(config_of(family, experts, top_k), "/nowhere", seed);
}

inline torch::Tensor ids() {
  return (torch::arange(48, torch::kInt64) * 7 % 40).view({2, 24});
}

inline torch::Tensor logits(const Checkpoint& checkpoint, Edits edits = {}) {
  const torch::NoGradGuard frozen;
  const auto model = load_causal(checkpoint, {.dtype = "f32"});
  Pass pass;
  pass.edits = std::move(edits);
  return model->forward(ids(), pass);
}

}  // namespace moiety::small_mixture
