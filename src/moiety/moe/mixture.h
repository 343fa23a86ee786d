#pragma once
// The mixture layer: Router, Experts, and the dispatch between them, written once and used by all.
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/moe/dispatch.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/router.h"
#include "moiety/nn/feed_forward.h"

namespace moiety {

/// Routes x [N, d], runs the experts on what was chosen, and returns the weighted sum [N, d]; reports to the trace.
/// `capacity_factor`: see expert_capacity; 0: no limit.
torch::Tensor mix(Router& router, Experts& experts, const torch::Tensor& x, const Site& site, Pass& pass,
                  const torch::Tensor& expert_map = {}, double capacity_factor = 0.0);

/// Reports what was decided for x [N, d], and what came of it, to the pass's trace, if there is one.
void report(Pass& pass, const Site& site, const Routing& routing, int64_t experts, const torch::Tensor& x,
            const torch::Tensor& y);

/// y = routed_scale * (sum of gate * expert(x) over the chosen + bias) + shared_scale * shared(x) (times
/// sigmoid(shared_gate x) when there is one).
class Mixture : public FeedForwardBase {
 public:
  Mixture(std::shared_ptr<Router> router, std::shared_ptr<Experts> experts,
          std::shared_ptr<FeedForward> shared = nullptr, Linear shared_gate = nullptr);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override;
  int64_t expert_count() const override { return router->experts(); }
  void set_bias(torch::Tensor b) { bias = register_parameter("bias", b, b.requires_grad()); }

  std::shared_ptr<Router> router;
  std::shared_ptr<Experts> experts;
  std::shared_ptr<FeedForward> shared;
  Linear shared_gate{nullptr};
  torch::Tensor bias;  ///< [d], added once to the routed sum; undefined: none
  double routed_scale = 1.0, shared_scale = 1.0;
  double jitter =
      0.0;  ///< while training, router and routed experts see x * U(1 - jitter, 1 + jitter), element by element
  double capacity_factor = 0.0;           ///< see expert_capacity; 0: no limit
  double training_capacity_factor = 0.0;  ///< instead of it while training; 0: as else
  torch::Tensor expert_map;               ///< [E] int64 to physical experts; undefined: the identity
};

}  // namespace moiety
