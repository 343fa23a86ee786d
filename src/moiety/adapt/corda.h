#pragma once
// CorDA: LoRA from a decomposition of the weight under the second moment of its inputs; the directions that knowledge
// lives in stay frozen, or those of a task learn (Yang et al., NeurIPS 2024, arXiv 2406.05223).
#include <torch/types.h>

#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/nn/beside.h"

namespace moiety {

/// C = mean over samples of X~^T X~, X~ = X / |max X| with the largest signed entry of the sample; f32, on the CPU.
class CordaCovariance {
 public:
  explicit CordaCovariance(std::string site = "the matrix") : site_(std::move(site)) {}
  /// One sample: x [L, in], padding left out. Error: a number that is not finite, a largest entry of nearly 0.
  void add(const torch::Tensor& x);
  int64_t samples() const { return samples_; }
  torch::Tensor value() const;  ///< [in, in]; Error without samples
  void restore(torch::Tensor sum, int64_t samples, torch::Tensor sizes = {});
  const torch::Tensor& sum() const { return sum_; }
  /// The sum over samples of the mean of |X| over tokens, what ASVD scales by: [in].
  const torch::Tensor& mean_sizes() const { return sizes_; }

 private:
  std::string site_;
  torch::Tensor sum_, sizes_;
  int64_t samples_ = 0;
};

/// Stands beside a matrix and watches its inputs; changes nothing.
class CordaWatch : public Beside {
 public:
  explicit CordaWatch(std::string site, std::vector<std::string> paths = {})
      : covariance(std::move(site)), paths(std::move(paths)) {}
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  CordaCovariance covariance;
  std::vector<std::string> paths;  ///< of the matrices
};

/// C + lambda mean(diag C) I and its inverse, lambda 0.01 and doubled while ||C C^-1 - I|| is 0.05 or more. Error: a
/// lambda beyond 1e3, numbers that are not finite.
struct Damped {
  torch::Tensor matrix, inverse;  ///< f64
  double lambda = 0.01;
};
Damped damped(const torch::Tensor& covariance, const std::string& site = "the matrix");

/// W C = U S V^T, W = U S (V^T C^-1): the first `rank` components (ipm) or the last (kpm; of those whose S is above
/// 1e-6 of the largest) become A = sqrt(S / s) V^T C^-1, B = U sqrt(S / s), s = alpha / rank; residual = W - s B A.
struct CordaAdapter {
  torch::Tensor s;         ///< [q], all
  torch::Tensor a, b;      ///< [r, in], [out, r]
  torch::Tensor residual;  ///< [out, in]
  int64_t skipped = 0;     ///< components at the end that are as good as zero and were left out (kpm)
};
CordaAdapter corda_decompose(const torch::Tensor& weight, const Damped& damped, const std::string& method, int64_t rank,
                             double alpha, const std::string& site = "the matrix");
/// In f32 over f64. Error: a rank beyond what there is, another method.
CordaAdapter corda_decompose(const torch::Tensor& weight, const torch::Tensor& covariance, const std::string& method,
                             int64_t rank, double alpha, const std::string& site = "the matrix");

/// W without its `drop` smallest components: kind corda (`by` the covariance [in, in]), asvd (`by` mean sizes of inputs
/// [in], to the power alpha, plus 1e-6), svd (`by` undefined).
torch::Tensor corda_compress(const torch::Tensor& weight, const std::string& kind, const torch::Tensor& by,
                             int64_t drop, double alpha = 0.5);

/// The trained adapter as a LoRA of rank 2 r over the base as it was: A = [A1; -A0], B = [B1, B0]; its alpha is twice.
struct LoraPair {
  torch::Tensor a, b;
};
LoraPair corda_to_lora(const LoraPair& before, const LoraPair& after);

}  // namespace moiety
