#pragma once
// Expert sets behind one interface. A set is given the tokens of each expert side by side and returns their outputs in
// that order.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/nn/activation.h"
#include "moiety/nn/linear.h"

namespace moiety {

class Experts : public torch::nn::Module {
 public:
  virtual int64_t count() const = 0;
  /// x [P, d] sorted by expert, counts [E]: the first counts[0] rows belong to expert 0, and so on -> [P, d_out]. An
  /// expert with count 0 is not touched.
  virtual torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) = 0;
};

/// down(act(gate x) * up x), every expert a gated feed-forward layer.
class GatedExperts : public Experts {
 public:
  GatedExperts(LinearStack gate, LinearStack up, LinearStack down, Activation act);
  int64_t count() const override { return down->count(); }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;
  LinearStack gate{nullptr}, up{nullptr}, down{nullptr};

 protected:
  virtual torch::Tensor combine(const torch::Tensor& g, const torch::Tensor& u) { return act_(g) * u; }

 private:
  Activation act_;
};

/// gpt-oss: gate cut at `limit` from above, up to [-limit, limit]; (up + 1) * gate * sigmoid(alpha * gate).
class ClampedExperts : public GatedExperts {
 public:
  ClampedExperts(LinearStack gate, LinearStack up, LinearStack down, double alpha, double limit);

 protected:
  torch::Tensor combine(const torch::Tensor& g, const torch::Tensor& u) override;

 private:
  double alpha_, limit_;
};

}  // namespace moiety
