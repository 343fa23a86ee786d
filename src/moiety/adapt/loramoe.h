#pragma once
// LoRAMoE: soft mixtures of LoRA experts beside feed-forward matrices, one half of the experts for samples of each kind
// by a loss (Dou et al. 2023, arXiv 2312.09979).
#include <torch/types.h>

#include "moiety/adapt/routed_lora.h"
#include "moiety/adapt/soft_router.h"

namespace moiety {

struct LoraMoeConfig {
  int64_t experts = 6, rank = 4;
  double alpha = 32.0, dropout = 0.05, delta = 0.1, coef = 0.0;
  std::string form = "cv2";

  void fields(Fields& f);
  std::string problem() const;
};

/// The localized balancing constraint of one matrix: gates [B, T, E], types [B] int64 of 0 and 1. Z = I * Q, Q [B, E]
/// the sum of gates over all T, I = 1 + delta where the expert's type is the sample's (the first half of the experts is
/// of type 1), else 1 - delta. loss = Var(Z) / (mean(Z)^2 + 1e-10), Var unbiased over all B E numbers ("cv2", the
/// authors' code), or Var(Z) / (mean(Z) + 1e-10) ("paper"); 0 for one number. Error: an odd E, another type.
struct LocalizedBalance {
  torch::Tensor loss, z;
};
LocalizedBalance localized_balance(const torch::Tensor& gates, const torch::Tensor& types, double delta,
                                   const std::string& form = "cv2");

/// That constraint as a loss of a router; types are the pass's labels. Error in a pass that trains without them.
class LocalizedBalanceLoss : public RoutingLoss {
 public:
  LocalizedBalanceLoss(double coef, double delta, std::string form);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;

 private:
  double delta_;
  std::string form_;
};

}  // namespace moiety
