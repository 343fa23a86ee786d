#pragma once
// The mixture layer: Router, Experts, and the dispatch between them, written once and used by all.
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/moe/experts.h"
#include "moiety/moe/router.h"
#include "moiety/nn/feed_forward.h"

namespace moiety {

/// The (token, expert) pairs of a routing, sorted by expert, tokens in order inside an expert. Sized by what is really
/// used: unused slots are left out, experts that share weights (`map` [E] -> physical expert) are joined and their
/// gates summed.
struct Dispatch {
  torch::Tensor tokens;         ///< [P] int64
  torch::Tensor gates;          ///< [P] f32, with gradient
  std::vector<int64_t> counts;  ///< [E] pairs per (physical) expert

  static Dispatch of(const Routing& routing, int64_t experts, const torch::Tensor& map = {});
  /// x [N, d] -> the rows of every pair [P, d].
  torch::Tensor gather(const torch::Tensor& x) const { return x.index_select(0, tokens); }
  /// Expert outputs [P, d] -> sum over pairs of gate * output [N, d].
  torch::Tensor reduce(const torch::Tensor& y, int64_t rows) const;
};

/// y = sum of gate * expert(x) over the chosen + shared(x) (times sigmoid(shared_gate x) when there is one).
class Mixture : public FeedForwardBase {
 public:
  Mixture(std::shared_ptr<Router> router, std::shared_ptr<Experts> experts,
          std::shared_ptr<FeedForward> shared = nullptr, Linear shared_gate = nullptr);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override;

  std::shared_ptr<Router> router;
  std::shared_ptr<Experts> experts;
  std::shared_ptr<FeedForward> shared;
  Linear shared_gate{nullptr};
  torch::Tensor expert_map;  ///< [E] int64 to physical experts; undefined: the identity
};

}  // namespace moiety
