#pragma once
// DynMoLE: as many LoRA experts as a token's distribution asks for, all of them where its entropy is high (Li et al.
// 2025, arXiv 2504.00661).
#include <torch/types.h>

#include "moiety/adapt/routed_lora.h"

namespace moiety {

struct DynMoleRule {
  double entropy_threshold = 0.9, entropy_index = 1.1, entropy_eps = 1e-5, top_p = 0.75;
  int64_t keep_top_k = 2;
  std::string entropy_type = "tsallis";
};

struct DynMoleConfig {
  int64_t experts = 6, rank = 8;
  double alpha = 16.0, dropout = 0.05, balance_coef = 1e-3, entropy_coef = 1e-2;
  DynMoleRule rule;

  void fields(Fields& f);
  std::string problem() const;
};

/// p [..., N] -> [...]: with p' = p + eps, Tsallis (1 - sum p'^q) / (q - 1), Renyi ln(sum p'^q + 1e-10) / (1 - q), or
/// Shannon's where q is 1; `normalize`: over its value for an even p (without eps). Error: q outside (0, 2], eps not
/// above 0, an unknown type.
torch::Tensor entropy(const torch::Tensor& p, double q, double eps, bool normalize, const std::string& type);

/// For probabilities p [..., E]: the experts of the largest p whose running sum stays within top_p, and the first
/// keep_top_k in any case; all where the normalized entropy is above the threshold (index > 0 and threshold < 1).
/// Weights are p there and 0 elsewhere, not renormalized.
struct DynMoleChoice {
  torch::Tensor weights;  ///< [..., E]
  torch::Tensor mask;     ///< [..., E] bool
  torch::Tensor entropy;  ///< [...]
};
DynMoleChoice dynmole_choose(const torch::Tensor& p, const DynMoleRule& rule);

/// Over logits [N, E] of all matrices: c_dyn * mean entropy + c_aux * E sum_e F_e P_e, P the mean of p, F that of the
/// weights, both with a gradient. With `valid` [N] bool, F and P are sums over valid rows / (their number + 1e-8); the
/// entropy's mean is over all rows.
struct DynMoleLoss {
  torch::Tensor loss, entropy, balance;  ///< weighted sum, and the two without their weights
};
DynMoleLoss dynmole_loss(const torch::Tensor& logits, const DynMoleRule& rule, double balance_coef, double entropy_coef,
                         const torch::Tensor& valid = {});

/// Routes by that rule; the loss joins all matrices of the model at the end of the pass.
class DynMoleRouter : public Router {
 public:
  DynMoleRouter(Linear gate, DynMoleRule rule, double balance_coef = 0.0, double entropy_coef = 0.0);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return gate->out(); }
  /// Of the rule's keep_top_k.
  void set_active(int64_t k) override;
  bool has_rule() const override { return balance_ > 0.0 || entropy_ > 0.0; }
  Linear gate{nullptr};
  DynMoleRule rule;

 private:
  double balance_, entropy_;
};

}  // namespace moiety
