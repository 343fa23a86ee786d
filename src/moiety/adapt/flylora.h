#pragma once
// FlyLoRA: a frozen sparse random A projects and routes at once, only B learns, and a token uses the k ranks with the
// largest projections (Zou et al., NeurIPS 2025).
#include <torch/types.h>

#include <vector>

#include "moiety/adapt/rank_choice.h"
#include "moiety/base/config.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

struct FlyLoraConfig {
  int64_t rank = 32, top_k = 8, seed = 23;
  double alpha = 64.0, dropout = 0.0, bias_rate = 1e-3, strength = 1.0;
  std::string select = "signed";
  bool grad_through_a = true, update_in_eval = false;

  void fields(Fields& f);
  std::string problem() const;
};

/// Non-zero numbers of each row of A: in div (rank div k). Error when that is 0.
int64_t fly_nonzeros(int64_t in, int64_t rank, int64_t top_k);
/// A [r, in]: row i keeps the positions perm[i][0 ... p - 1] of normal[i] / r, p = fly_nonzeros. perm [r, in] int64,
/// normal [r, in] from N(0, 1).
torch::Tensor fly_projection(const torch::Tensor& perm, const torch::Tensor& normal, int64_t top_k);
/// The same drawn from a seed and the matrix's path alone, whatever else is drawn and in which order.
torch::Tensor fly_projection(int64_t rank, int64_t in, int64_t top_k, int64_t seed, const std::string& path);

/// The k ranks of a [N, r] with the largest a + bias ("signed") or |a| + bias ("magnitude"), largest first: [N, k].
torch::Tensor fly_choose(const torch::Tensor& a, const torch::Tensor& bias, int64_t top_k, const std::string& select);

/// y = W x + scale * B (m * A v), v = dropout(x), m the mask of the chosen ranks.
class FlyLora : public Beside {
 public:
  /// a [r, in] and bias [r] are buffers; b [out, r].
  FlyLora(std::string site, torch::Tensor a, torch::Tensor b, torch::Tensor bias, const FlyLoraConfig& config);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  torch::Tensor merged(const torch::Tensor& weight, int64_t place) const override;  ///< where every rank is active
  bool set_active(int64_t k) override;                                              ///< ranks
  const torch::Tensor& bias() const { return bias_.buffer; }

 protected:
  std::string not_one_matrix() const override { return "every token uses ranks of its own"; }

 private:
  double scale() const { return config_.strength * config_.alpha / static_cast<double>(a_.size(0)); }

  std::string site_;
  FlyLoraConfig config_;
  torch::Tensor a_, b_;
  MovingBias bias_;
};

/// Adapters as one. average: means of B and bias, of adapters with equal A. stack: what it adds is the mean of what
/// each adds. Error: unequal shapes, or, with average, another A.
struct FlyAdapter {
  torch::Tensor a, b, bias;  ///< [r, in], [out, r], [r]
};
FlyAdapter fly_average(const std::vector<FlyAdapter>& adapters);
/// x [N, in] -> what an adapter, or a stack of them, adds [N, out].
torch::Tensor fly_delta(const torch::Tensor& x, const FlyAdapter& adapter, int64_t top_k, double scale,
                        const std::string& select);
torch::Tensor fly_stack(const torch::Tensor& x, const std::vector<FlyAdapter>& adapters, int64_t top_k, double scale,
                        const std::string& select);

}  // namespace moiety
