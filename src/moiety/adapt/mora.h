#pragma once
// MoRA (MoRAM): rank-1 experts that choose themselves by their own activations, a block of them for every task of a
// stream; earlier blocks are frozen (Lu et al. 2025, arXiv 2506.21035).
#include <torch/types.h>

#include <vector>

#include "moiety/base/config.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

struct MoraConfig {
  int64_t rank = 16, old_ranks = 0, top_k = 16;
  double temperature = 0.01, threshold = 0.2, scaling = 1.0, dropout = 0.0, eps = 1e-12;

  void fields(Fields& f);
};

/// Activations z [..., R] of all ranks. scores n = z / max(|z|, eps) over the ranks of a token, signed; weights: the
/// softmax of n / temperature over the kappa = min(max(top_k, 2), R) largest n (the lowest index of equal ones), 0
/// elsewhere; outside of training those with n below a threshold above 0 are 0, too, and nothing is renormalized.
struct MoraChoice {
  torch::Tensor scores, weights;  ///< [..., R]
};
MoraChoice mora_choose(const torch::Tensor& z, int64_t top_k, double temperature, double threshold, bool training,
                       double eps = 1e-12);

/// y = W x + sum_i w_i z_i c_i B_i, z = A dropout(x) over old and new ranks, c = 1 of old ones and `scaling` of new
/// ones.
class Mora : public Beside {
 public:
  /// old_a [Ro, in] and old_b [out, Ro] are buffers, undefined before the first task has ended; a [r, in], b [out, r]
  /// learn.
  Mora(std::string site, torch::Tensor old_a, torch::Tensor old_b, torch::Tensor a, torch::Tensor b,
       const MoraConfig& config);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  bool set_active(int64_t k) override;  ///< ranks, of those of all tasks

 protected:
  std::string not_one_matrix() const override { return "which of its ranks are active depends on the token"; }

 private:
  std::string site_;
  MoraConfig config_;
  torch::Tensor old_a_, old_b_, a_, b_;
};

/// The end of a task: the new block behind the old ones. "fold": B times scaling, so that the function stays; "raw": B
/// as it is, as the authors' language code does.
struct MoraBlocks {
  torch::Tensor a, b;  ///< [Ro + r, in], [out, Ro + r]
};
MoraBlocks mora_consolidate(const torch::Tensor& old_a, const torch::Tensor& old_b, const torch::Tensor& a,
                            const torch::Tensor& b, double scaling, const std::string& mode = "fold");

/// Of a stream of T tasks: acc [T, T], row t after task t, column j the accuracy on task j.
struct StreamMetrics {
  double transfer = 0.0;  ///< mean over tasks j >= 2 of the mean of acc[t][j] over t < j
  double average = 0.0;   ///< mean of all
  double last = 0.0;      ///< mean of the last row
  double bwt = 0.0;       ///< mean over j of min(acc[T][j] - acc[j][j], 0)
  std::vector<double> transfer_per_task;
};
StreamMetrics stream_metrics(const torch::Tensor& acc);

}  // namespace moiety
