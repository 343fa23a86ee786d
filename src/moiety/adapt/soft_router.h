#pragma once
// A router that gives every token all experts.
#include <torch/types.h>

#include "moiety/moe/router.h"

namespace moiety {

/// gates = softmax(W x) over all experts, in f32.
class SoftRouter : public Router {
 public:
  explicit SoftRouter(Linear projection);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return projection->out(); }
  void set_active(int64_t k) override;
  Linear projection{nullptr};
};

/// What the routers of adapters compute in: f32, f64 where x is.
inline torch::Tensor router_input(const torch::Tensor& x) {
  return x.scalar_type() == torch::kFloat64 ? x : x.to(torch::kFloat32);
}

/// 0 ... experts - 1 for each of n rows: [n, experts] int64.
torch::Tensor every_expert(int64_t n, int64_t experts, torch::Device device);

}  // namespace moiety
