#pragma once
// MoLA: mixtures of LoRA experts beside every matrix, a token's best k by a router each, and more experts in higher
// layers (Gao et al. 2024, arXiv 2402.08562).
#include <torch/types.h>

#include <vector>

#include "moiety/adapt/routed_lora.h"

namespace moiety {

struct MolaConfig {
  nlohmann::json experts, top_k = 2, rank = 8;
  std::vector<int64_t> pattern;
  double alpha = 16.0, dropout = 0.05, coef = 0.0;

  void fields(Fields& f);
  std::string problem() const;
};

/// Experts of each of `layers` layers: G values, layer l has pattern[floor(l G / layers)]. Error: an empty pattern,
/// more values than layers, or one below 1.
std::vector<int64_t> mola_allocation(const std::vector<int64_t>& pattern, int64_t layers);

/// E sum_i f_i P_i over rows of logits [N, E]: f the share of i among the choices of the k best (sums to 1, without a
/// gradient), P the mean of the softmax. 1 when even; rows where `real` is false do not count.
torch::Tensor mola_balance_loss(const torch::Tensor& logits, int64_t top_k, const torch::Tensor& real = {});

/// That loss of every layer, over the rows of all its matrices together; layers are added up.
class MolaBalance : public RoutingLoss {
 public:
  explicit MolaBalance(double coef);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;
};

/// The router of one matrix: softmax over all experts, the k best, gates over their sum.
std::shared_ptr<Router> mola_router(Linear rows, int64_t top_k, double coef);

}  // namespace moiety
