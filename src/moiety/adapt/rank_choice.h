#pragma once
// What mixtures of single ranks share: a bias on the choice that moves with the load, once a training pass.
#include <torch/types.h>

#include "moiety/nn/pass.h"

namespace moiety {

/// How often each of `count` ranks stands in indices [..., k]: [count] int64.
torch::Tensor rank_counts(const torch::Tensor& indices, int64_t count);

/// One step: bias_i + rate * sign(mean count - count_i), sign(0) = 0. Neither argument is changed.
torch::Tensor moved_bias(const torch::Tensor& bias, const torch::Tensor& counts, double rate);

/// The bias [R] of a module, a registered buffer. A pass chooses with the value before its own step, also when it is
/// run again for its gradient.
class MovingBias {
 public:
  MovingBias(torch::Tensor buffer, double rate);
  /// What this pass chooses with.
  torch::Tensor now(const Pass& pass) const { return pass.recomputing && before_.defined() ? before_ : buffer; }
  /// Moves the bias by what a pass chose; rows [N] that `real` says no to do not count. Nothing happens when the pass
  /// is run again.
  void move(const torch::Tensor& indices, const Pass& pass);

  torch::Tensor buffer;

 private:
  double rate_;
  torch::Tensor before_;
};

}  // namespace moiety
