#pragma once
// SMoRA: every rank of one LoRA is an expert, and a router gives each token k of them; a bias on the scores keeps ranks
// evenly used (Zhao et al. 2025, arXiv 2501.15103).
#include <torch/types.h>

#include "moiety/adapt/rank_choice.h"
#include "moiety/base/config.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

struct SmoraConfig {
  int64_t rank = 64, active = 8, block = 1;
  double alpha = 16.0, dropout = 0.0, bias_rate = 1e-5;
  bool bias_in_gate = true;

  void fields(Fields& f);
  std::string problem() const;
};

/// scores = sigmoid(logits), logits [N, r / m] of blocks of m ranks, each repeated m times in a row; the k largest of
/// scores + bias [r] are taken (the lowest index of equal ones), largest first; their gates are these sums (or, with
/// bias_in_gate false, the scores alone) over their total, times k. A total nearer to 0 than 1e-9 counts as 1e-9.
struct RankChoice {
  torch::Tensor indices;  ///< [N, k] int64
  torch::Tensor gates;    ///< [N, k]
};
RankChoice smora_choose(const torch::Tensor& logits, const torch::Tensor& bias, int64_t active, bool bias_in_gate);

/// y = W x + alpha / k * sum of gate_i (A_i v) B_i over the chosen ranks, v = dropout(x), which the router sees too.
class Smora : public Beside {
 public:
  /// router [r / m, in], a [r, in], b [out, r], bias [r]: a buffer that moves by bias_rate after every training pass.
  Smora(std::string site, Linear router, torch::Tensor a, torch::Tensor b, torch::Tensor bias,
        const SmoraConfig& config);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  bool set_active(int64_t k) override;  ///< ranks; a multiple of the block
  const torch::Tensor& bias() const { return bias_.buffer; }

 protected:
  std::string not_one_matrix() const override { return "its router gives every token ranks of its own"; }

 private:
  std::string site_;
  SmoraConfig config_;
  Linear router_{nullptr};
  torch::Tensor a_, b_;
  MovingBias bias_;
};

/// E LoRAs of rank m, a [E, m, in], b [E, out, m], with gates [..., E], and the one LoRA of rank E m that does the same
/// with every gate m times in a row: what is added to W x, without the scale.
struct SmoraBlocks {
  torch::Tensor by_experts, by_ranks;  ///< [..., out]
  torch::Tensor a, b;                  ///< [E m, in], [out, E m]
};
SmoraBlocks smora_blocks(const torch::Tensor& x, const torch::Tensor& a, const torch::Tensor& b,
                         const torch::Tensor& gates);

}  // namespace moiety
