#pragma once
// LoRA-Mixer: one LoRA a task beside the projections of attention, trained apart or brought along, and a router that
// learns to mix them (Li et al. 2025, arXiv 2507.00029).
#include <torch/types.h>

#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

struct LoraMixerConfig {
  int64_t experts = 4, rank = 8, top_k = 3, usage_top_k = 0;
  double alpha = 16.0, dropout = 0.0;
  std::string stage = "soft", router_scope = "site", entropy_sign = "published";
  double sbl_alpha = 1.0, sbl_lambda = 0.1, preserve_beta = 0.0;
  std::vector<int64_t> preserve;
  bool freeze_experts = false;
  std::vector<std::string> adapters;

  void fields(Fields& f);
  std::string problem() const;
};

/// Weights [N, E] of experts for logits [N, E]. soft: their softmax p; topk: the k largest over their sum (g); hard: 1
/// at a row's label [N]; hard_soft: the value of g with the gradient of p. Error: a label that is no expert, or none.
torch::Tensor mixer_weights(const torch::Tensor& logits, const std::string& mode, int64_t top_k,
                            const torch::Tensor& labels = {});

/// The specialization balance loss of rows of logits [N, E] that `real` [N] bool (undefined: all) says yes to:
/// alpha * sum_i P_i f_i + sign * lambda * mean entropy (nats), P the mean of p, f the share of i among the usage_top_k
/// best of every row, without a gradient; sign -1 where `published`, +1 for "specialize".
struct SblLoss {
  torch::Tensor loss, balance, entropy, usage;
};
SblLoss sbl_loss(const torch::Tensor& logits, const torch::Tensor& real, double alpha, double lambda,
                 int64_t usage_top_k, const std::string& entropy_sign);

/// beta * sum of ||t - t0||^2 over experts `of` of stacks t [E, ...] and what they were.
torch::Tensor preserve_loss(const std::vector<torch::Tensor>& now, const std::vector<torch::Tensor>& before,
                            const std::vector<int64_t>& of, double beta);

/// Beside matrices that read one input.
class LoraMixer : public Beside {
 public:
  struct Target {
    std::string site;
    Linear router{nullptr};     ///< [E, in]; one for all targets under router_scope: block
    torch::Tensor a, b, scale;  ///< [E, r, in], [E, out, r], [E]
  };
  LoraMixer(std::vector<Target> targets, const LoraMixerConfig& config);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  torch::Tensor merged(const torch::Tensor& weight, int64_t place) const override;  ///< of one expert
  bool set_active(int64_t k) override;                                              ///< outside of training
  /// What a pass does: the stage while training, topk elsewhere; hard wherever that stage finds labels.
  std::string mode(const Pass& pass) const;

 protected:
  std::string not_one_matrix() const override { return "its router gives every token experts of its own"; }

 private:
  std::vector<Target> targets_;
  LoraMixerConfig config_;
  std::vector<torch::Tensor> start_;  // a and b as they were, to stay near
};

}  // namespace moiety
