#pragma once
// Expert sets behind one interface. A set is given the tokens of each expert side by side and returns their outputs in
// that order.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/moe/dispatch.h"
#include "moiety/nn/activation.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/pass.h"

namespace moiety {

class Experts : public torch::nn::Module {
 public:
  virtual int64_t count() const = 0;
  /// x [P, d] sorted by expert, counts [E]: the first counts[0] rows belong to expert 0, and so on -> [P, d_out]. An
  /// expert with count 0 is not touched.
  virtual torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) = 0;
  /// x [N, d] -> sum over pairs of gate * expert(x) [N, d_out]. Sets that can do it in one step override it.
  virtual torch::Tensor mix(const torch::Tensor& x, const Dispatch& dispatch) {
    return dispatch.reduce(forward(dispatch.gather(x), dispatch.counts), x.size(0));
  }
  /// The same as part of a running pass: what mixtures call. Sets that follow a sequence (offload/) override it.
  virtual torch::Tensor mix_in(const torch::Tensor& x, const Dispatch& dispatch, const Pass&) {
    return mix(x, dispatch);
  }
};

/// x [P, in] sorted by expert through the matrices of a stack -> [P, out]: one grouped product for a stacked tensor,
/// one product an expert for mapped matrices.
torch::Tensor apply_stack(LinearStack& stack, const torch::Tensor& x, const std::vector<int64_t>& counts);

/// down(act(gate x) * up x), every expert a gated feed-forward layer.
class GatedExperts : public Experts {
 public:
  GatedExperts(LinearStack gate, LinearStack up, LinearStack down, Activation act);
  int64_t count() const override { return down->count(); }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;
  torch::Tensor mix(const torch::Tensor& x, const Dispatch& dispatch) override;
  /// What `mix` adds up, where the matrices are separate: the output of every pair [P, d], without its gate, in f32 or
  /// x's dtype. An expert's rows do not depend on the other experts of the call.
  torch::Tensor outputs(const torch::Tensor& x, const Dispatch& dispatch);
  bool adapted() const;                    ///< something stands beside some of the matrices
  Activation act() const { return act_; }  ///< null where `combine` is something else
  /// combine() of f32 where no graph is built, as a kernel; null where there is none.
  const GateTimes& times() const { return times_; }
  LinearStack gate{nullptr}, up{nullptr}, down{nullptr};

 protected:
  GatedExperts(LinearStack gate, LinearStack up, LinearStack down, Activation act, GateTimes times);
  /// May write to g.
  virtual torch::Tensor combine(const torch::Tensor& g, const torch::Tensor& u) { return act_(g) * u; }

 private:
  // By packed matrices; undefined where some are not.
  torch::Tensor packed(const torch::Tensor& x, const Dispatch& d);

  Activation act_;
  GateTimes times_;
  bool fused_ = false;  // silu, no biases, one stacked tensor each
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

/// drop(out_act(w2 drop(act(w1 x + b1)) + b2)), plain two-layer experts; biases are optional, out_act null for none.
/// Dropout while the module trains (torch's train mode).
class MlpExperts : public Experts {
 public:
  MlpExperts(LinearStack w1, LinearStack w2, Activation act, Activation out_act = nullptr, double dropout = 0.0);
  int64_t count() const override { return w2->count(); }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;
  LinearStack w1{nullptr}, w2{nullptr};

 private:
  Activation act_, out_act_;
  double dropout_;
};

/// scale * B (A drop(x)), low-rank experts beside a frozen matrix: A [E, r, in], B [E, out, r] (LoRA, arXiv
/// 2106.09685).
class LoraExperts : public Experts {
 public:
  LoraExperts(LinearStack a, LinearStack b, double scale, double dropout = 0.0);
  int64_t count() const override { return b->count(); }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;
  LinearStack a{nullptr}, b{nullptr};

 private:
  double scale_, dropout_;
};

}  // namespace moiety
