#pragma once
// DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066): fine-grained experts beside shared ones that every token passes, and
// two balance losses.
#include <memory>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/moe/mixture.h"

namespace moiety {

struct DeepseekMoeConfig {
  int64_t experts = 64;  ///< routed ones, N_r
  int64_t shared = 2;    ///< K_s
  int64_t top_k = 6;     ///< routed ones a token, K_r
  int64_t width = 0;     ///< hidden units of one expert; 0: the dense layer's over the active experts
  bool norm_topk_prob = false;
  double alpha1 = 0.001;  ///< weight of the expert-level balance loss
  double alpha2 = 0.0;    ///< of the device-level one
  bool seq_aux = true;    ///< statistics of one sequence at a time
  std::vector<int64_t> device_of_expert;
  void fields(Fields& f);
  std::string problem() const;
};

/// Softmax over the routed experts, the K_r best, their scores as gates (over their sum with norm_topk_prob and K_r >
/// 1), and the losses "deepseekmoe.expert_balance" and "deepseekmoe.device_balance".
std::shared_ptr<TopKRouter> deepseek_router(Linear projection, const DeepseekMoeConfig& config,
                                            torch::Tensor choice_bias = {});

struct ExpertTensors {
  torch::Tensor gate, up, down;  ///< [N, f, d], [N, f, d], [N, d, f]
};
/// Every expert of width I cut into m of width I / m: expert e becomes e*m ... e*m + m-1, whose sum is the old one.
/// `units` [N, I] int64 orders the hidden units of each expert first (undefined: as they are). Error: m does not divide
/// I.
ExpertTensors segment_experts(const ExpertTensors& experts, int64_t segments, const torch::Tensor& units = {});

}  // namespace moiety
