#pragma once
// Dynamic top-p routing (Huang et al. 2024, arXiv 2403.07652): a token takes experts in order of probability until
// their sum passes a threshold.
#include "moiety/base/config.h"
#include "moiety/moe/mixture.h"

namespace moiety {

struct DynamicRoutingConfig {
  int64_t experts = 16;
  int64_t width = 0;  ///< hidden units of one expert; 0: half of the dense layer's
  double p = 0.4;
  double balance_coef = 1e-2;  ///< alpha
  double dynamic_coef = 1e-4;  ///< beta, of the entropy
  int64_t min_k = 1;
  int64_t max_k = 0;         ///< 0: no cap
  bool renormalize = false;  ///< gates over their sum: for models trained that way, not the paper's rule
  void fields(Fields& f);
  std::string problem() const;
};

/// probabilities [N, E] f32 -> experts [N, E] int64 by descending probability (ties: lower index), -1 behind the first
/// whose running sum exceeds p; that one is included. p >= 1 takes all. Gates are the probabilities themselves.
Routing top_p_choice(const torch::Tensor& probabilities, double p, int64_t min_k = 1, int64_t max_k = 0);

/// E * sum_e f_e Q_e with f_e counted per token and not per choice: the mean count when scores are even.
torch::Tensor dynamic_balance_loss(const torch::Tensor& experts, const torch::Tensor& probabilities,
                                   const TokenGroups& groups = {});

/// Adds the losses "dynamic-routing.balance" and "dynamic-routing.entropy".
class TopPRouter : public Router {
 public:
  TopPRouter(Linear projection, DynamicRoutingConfig config);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return projection->out(); }
  void set_active(int64_t k) override {
    check_active(k);
    config.min_k = config.max_k = k;
  }

  Linear projection{nullptr};
  DynamicRoutingConfig config;  ///< p, min_k and max_k may change between passes
};

}  // namespace moiety
