#pragma once
// Compressed Experts (He et al. 2025, arXiv 2503.00634): of the k experts that a token chooses the last n do not run.
// Three vectors stand for each of them; their weighted mean rescales what the matrices of the first k - n read.
#include <cstdint>
#include <memory>
#include <string>

#include "moiety/base/config.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/router.h"

namespace moiety {

struct CompressedExpertsConfig {
  int64_t n_ce = -1;  ///< n, auxiliary experts a token; -1: half of its experts
  void fields(Fields& f);
};

/// n for a token with k experts. Error: none of them would run.
int64_t auxiliary_experts(int64_t n_ce, int64_t k);

/// c_s = sum_j a_j C[i_j, s] over the last n slots of every token, a_j their gates over their sum: [N, 3, w] in C's
/// type, with gradients to C and gates. C [E, 3, w]; a token without gates in these slots gets ones, as C that is all
/// ones gives exactly. Error: fewer than n + 1 slots.
torch::Tensor compressed_inputs(const Routing& routing, int64_t n, const torch::Tensor& ces);

/// Gated experts whose matrices read scaled inputs: down((act(gate (x * c_0)) * up (x * c_2)) * c_1).
class ScaledExperts : public GatedExperts {
 public:
  using GatedExperts::GatedExperts;
  /// The weighted sum over the pairs of `dispatch` [N, d]; c [N, 3, max(d, f)] of the tokens, of which the first
  /// columns count.
  torch::Tensor mix_scaled(const torch::Tensor& x, const torch::Tensor& c, const Dispatch& dispatch);
};

/// The mixture: the router's gates stay what they are, the auxiliary ones' mass is dropped. Its routing is reported
/// with all k slots.
class CompressedExperts : public FeedForwardBase {
 public:
  /// ces [E, 3, max(d, f)]. Error: another shape, experts that have no plain activation.
  CompressedExperts(std::shared_ptr<Router> router, const GatedExperts& experts, torch::Tensor ces, int64_t n_ce,
                    std::shared_ptr<FeedForward> shared = nullptr, Linear shared_gate = nullptr);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override;
  int64_t expert_count() const override { return router->experts(); }

  std::shared_ptr<Router> router;
  std::shared_ptr<ScaledExperts> experts;
  std::shared_ptr<FeedForward> shared;
  Linear shared_gate{nullptr};
  torch::Tensor ces;
  int64_t n_ce;
  double jitter = 0.0;  ///< see Mixture::jitter
};

/// What a decoder of equal mixture layers has, for counting.
struct ActiveSizes {
  int64_t hidden = 0, intermediate = 0, experts = 0, top_k = 0, n_ce = 0;
  int64_t layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
  bool tied = false;
  bool qk_norm = false;  ///< with weights as wide as all heads together
};
struct ActiveParameters {
  int64_t full = 0;        ///< parameters that a token uses with all k experts
  int64_t compressed = 0;  ///< with n_ce of them as vectors
  int64_t added = 0;       ///< parameters of all vectors
};
ActiveParameters active_parameters(const ActiveSizes& sizes);

}  // namespace moiety
