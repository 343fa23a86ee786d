#pragma once
// Chain-of-Experts (Wang et al. 2025, arXiv 2506.18945): one expert set runs several times inside a feed-forward site,
// every round routed anew on the output of the round before.
#include <memory>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/norm.h"

namespace moiety {

struct ChainOfExpertsConfig {
  int64_t rounds = 2;  ///< C
  int64_t experts = 63;
  int64_t shared = 1;
  int64_t top_k = 4;  ///< a round
  int64_t width = 0;  ///< hidden units of one expert; 0: the dense layer's over the active experts of all rounds
  bool per_round_router = true;
  bool inner_residual = true;   ///< I_r
  bool outer_residual = false;  ///< O_r
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1.0;
  int64_t groups = 0, top_groups = 0;  ///< choose inside the groups with the best expert only; 0: no groups
  double aux_loss_alpha = 0.001;
  bool seq_aux = true;
  void fields(Fields& f);
  std::string problem() const;
};

/// A router of one round, as DeepSeek-V2's gate: raw scores times the scaling factor, or scores over their sum; adds
/// the loss "chain-of-experts.balance".
std::shared_ptr<TopKRouter> chain_router(Linear projection, const ChainOfExpertsConfig& config,
                                         torch::Tensor choice_bias = {});

/// The whole half of a block: norm once; per round h = mixture(h) + shared(h) (+ h); and (+ the input). With the
/// method's switches the residual stream is replaced.
class ChainOfExperts : public FeedForwardBase {
 public:
  /// One router a round, or one for all. Error: as many routers as rounds, or one; shared may be null.
  ChainOfExperts(std::shared_ptr<Norm> norm, std::vector<std::shared_ptr<Router>> routers,
                 std::shared_ptr<Experts> experts, std::shared_ptr<FeedForward> shared, ChainOfExpertsConfig config);
  /// x [B, T, d], the residual stream -> the same behind the site.
  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override;
  bool whole_half() const override { return true; }
  int64_t expert_count() const override { return experts->count(); }

  std::shared_ptr<Norm> norm;
  std::vector<std::shared_ptr<Router>> routers;
  std::shared_ptr<Experts> experts;
  std::shared_ptr<FeedForward> shared;
  ChainOfExpertsConfig config;
};

}  // namespace moiety
