#pragma once
// Feed-forward layers: gated (down(act(gate x) * up x)) or plain (down(act(up x))).
#include <torch/nn/module.h>
#include <torch/types.h>

#include "moiety/nn/activation.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/pass.h"

namespace moiety {

/// A feed-forward site: x [B, T, d] -> [B, T, d].
class FeedForwardBase : public torch::nn::Module {
 public:
  virtual torch::Tensor forward(const torch::Tensor& x, Pass& pass) = 0;
  /// True when forward takes the residual stream and returns it: the norm before and the residual are the layer's own.
  virtual bool whole_half() const { return false; }
  /// Experts to choose from; 0: the layer is dense.
  virtual int64_t expert_count() const { return 0; }
};

class FeedForward : public FeedForwardBase {
 public:
  /// `gate` may be empty: then the layer is not gated.
  FeedForward(Linear gate, Linear up, Linear down, Activation act);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override { return apply(x, pass); }
  /// x [..., d] -> [..., d].
  torch::Tensor apply(const torch::Tensor& x, Pass& pass);
  Activation act() const { return act_; }
  Linear gate{nullptr}, up{nullptr}, down{nullptr};

 private:
  Activation act_;
};

}  // namespace moiety
