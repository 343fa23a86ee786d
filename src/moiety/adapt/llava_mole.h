#pragma once
// LLaVA-MoLE: one router a feed-forward layer gives every token one LoRA expert, beside gate, up and down together
// (Chen et al. 2024, arXiv 2401.16160).
#include <torch/types.h>

#include <memory>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

struct LlavaMoleConfig {
  int64_t experts = 3, rank = 32;
  double alpha = 64.0, dropout = 0.05, coef = 0.01;
  bool dense = false;
  std::string gate_weighting = "none";

  void fields(Fields& f);
};

/// What the experts' outputs are multiplied by: p [..., E] the softmax over experts -> [..., E]. dense: p. Else, with H
/// the one-hot of the largest (the lowest index of equal ones), without a gradient: none H, prob H p, straight_through
/// H + (p - sg(p)), whose value is H and whose gradient is that of p.
torch::Tensor mole_gates(const torch::Tensor& p, bool dense, const std::string& gate_weighting);

/// p [L, B, T, E] of all layers, mask [B, T] (undefined: all real): for every sample the sum over e of mean p_e times
/// the share of tokens whose largest is e, over real tokens of all layers; the mean over samples. Error: a sample
/// without a real token.
torch::Tensor mole_balance_loss(const torch::Tensor& p, const torch::Tensor& mask);

/// The router of one layer, which gate and up share with down: its decision for a pass is found under the block.
class MoleRouter : public torch::nn::Module {
 public:
  MoleRouter(Linear projection, bool dense, std::string gate_weighting, double coef);
  /// x [N, d] -> gates [N, E]; keeps them for the layer's down.
  torch::Tensor route(const torch::Tensor& x, Pass& pass);
  /// What was decided for the layer that runs. Error when nothing was.
  torch::Tensor decided(Pass& pass) const;
  bool dense() const { return dense_; }
  Linear projection{nullptr};

 private:
  bool dense_;
  std::string weighting_;
  double coef_;
};

/// Beside gate and up (it routes), or beside down.
class MoleBeside : public Beside {
 public:
  /// a [E, r, in] and b [E, out, r] of every matrix; `routes`: it is the one that asks the router.
  MoleBeside(std::shared_ptr<MoleRouter> router, bool routes, std::vector<torch::Tensor> a,
             std::vector<torch::Tensor> b, double scale, double dropout = 0.0);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  bool set_active(int64_t k) override;  ///< an Error but for the number that there is

 protected:
  std::string not_one_matrix() const override { return "its router gives every token an expert of its own"; }

 private:
  std::shared_ptr<MoleRouter> router_;
  bool routes_;
  std::vector<torch::Tensor> a_, b_;
  double scale_, dropout_;
};

}  // namespace moiety
