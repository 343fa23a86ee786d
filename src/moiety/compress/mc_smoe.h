#pragma once
// M-SMoE: experts whose router logits resemble each other are aligned and averaged by use into the most used ones of
// the whole network. MC-SMoE: what is left becomes low rank + row-sparse, its rows pruned while it is trained after a
// teacher (Li et al., ICLR 2024, arXiv 2310.01334). Use and similarity come from usage_of and cosine_affinity
// (expert_statistics.h).
#include <torch/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/compress/expert_weights.h"

namespace moiety {

/// What merging experts is asked to do.
struct MSmoeConfig {
  int64_t groups = 8;
  std::vector<int64_t> layers;
  bool align = true;
  bool include_down = true;
  int64_t capacity = 0;
  double eps = 1e-7;
  void fields(Fields& f) {
    f("groups", groups, "experts that a merged layer keeps on average").min(1);
    f("layers", layers, "layers whose experts are merged; empty: all with experts").min(0);
    f("align", align, "bring the neurons of a layer's experts into the order of expert 0 first");
    f("include_down", include_down, "the alignment looks at the down projection, too");
    f("capacity", capacity, "most experts of a group, its leader among them; 0: no limit").min(0);
    f("eps", eps, "added to the use that a group's average is divided by").min(0.0);
  }
};

/// The experts with their neurons in the order of `reference`'s, and the order of each (with_neurons): identity for the
/// reference.
struct AlignedExperts {
  std::vector<ExpertWeights> experts;
  torch::Tensor order;  ///< [E, d] int64
};
AlignedExperts align_experts(const std::vector<ExpertWeights>& experts, int64_t reference = 0,
                             bool include_down = true);

struct ExpertGroups {
  torch::Tensor labels;    ///< [L, E] int64: the group of each expert, leaders in order of use
  torch::Tensor groups;    ///< [L] int64
  torch::Tensor dominant;  ///< [L, E] bool: leaders
};
/// usage [L, E], similarity [L, E, E] of the layers with experts; `merged`: those of them whose experts are merged, by
/// position; the others keep a group an expert. How many groups a merged layer gets is decided over all layers: as many
/// as it has experts whose use is above that of the (groups * merged)-th, its most used one in any case. Error: groups
/// outside 1 ... E, a layer that is not there, no layer, a threshold of 1, capacity too small for all experts.
ExpertGroups group_experts(const torch::Tensor& usage, const torch::Tensor& similarity, int64_t groups,
                           const std::vector<int64_t>& merged, int64_t capacity = 0);

/// The mean of some experts weighted by use, sum u W / (sum u + eps); 0 where none was used. Reads the members of
/// `experts` only; usage [E].
ExpertWeights merge_group(const std::vector<ExpertWeights>& experts, const std::vector<int64_t>& members,
                          const torch::Tensor& usage, double eps = 1e-7);
/// Those of all groups, by label: labels [E].
std::vector<ExpertWeights> merge_groups(const std::vector<ExpertWeights>& experts, const torch::Tensor& labels,
                                        const torch::Tensor& usage, double eps = 1e-7);

// --- low rank + row-sparse

/// W [out, in] = left right + sparse: left [out, r] = U sqrt(S), right [r, in] = sqrt(S) V^T of the r largest singular
/// values in f32, sparse the rest. y = left (right x) + sparse x.
struct LowRankSparse {
  torch::Tensor left, right, sparse;
};
/// Error: a rank below 1, or not below the smaller side of the matrix.
LowRankSparse split_low_rank(const torch::Tensor& weight, int64_t rank, const std::string& name = "the matrix");

/// The rows of a matrix that are not zero, and where they stand.
struct RowSparse {
  torch::Tensor rows;   ///< [n, in]
  torch::Tensor index;  ///< [n] int64, ascending
  int64_t out = 0;
};
RowSparse compact_rows(const torch::Tensor& sparse);
torch::Tensor dense_rows(const RowSparse& compact);  ///< [out, in]
/// x [..., in] -> [..., out], with gradients to x and to the rows.
torch::Tensor multiply(const RowSparse& compact, const torch::Tensor& x);

struct RowPruningConfig {
  int64_t total_steps = 0;  ///< of a part: the run's
  double beta1 = 0.85, beta2 = 1.0;
  int64_t delta_t = 1;
  double initial_threshold = 1.0, final_threshold = 0.1;
  int64_t warmup_steps = 50, initial_warmup = 1, final_warmup = 4;
  void fields(Fields& f) {
    f("total_steps", total_steps, "optimizer steps in all").min(1).required();
    rule(f);
  }
  /// All but the number of steps.
  void rule(Fields& f) {
    f("beta1", beta1, "how slowly the importance of an entry forgets").min(0.0).max(1.0);
    f("beta2", beta2, "1: no term for uncertainty; nothing else is known");
    f("delta_t", delta_t, "rows are masked every so many steps while the share falls").min(1);
    f("initial_threshold", initial_threshold, "share of entries left at the start").min(0.0).max(1.0);
    f("final_threshold", final_threshold, "share of entries left at the end, above 0").min(0.0).max(1.0);
    f("warmup_steps", warmup_steps, "unit of the two that follow").min(0);
    f("initial_warmup", initial_warmup, "so many times warmup_steps nothing is masked").min(0);
    f("final_warmup", final_warmup, "so many times warmup_steps the share is the final one").min(0);
  }
  std::string problem() const;  ///< what does not fit together, "" where all does
};
/// The share of entries left after step t = 0, 1, ...: falls by a cubic between the two warm-ups.
double remaining_share(const RowPruningConfig& config, int64_t t);

/// Zeroes the rows of least importance over all matrices together, step by step; a row that is zeroed may grow again.
/// Importance is a moving average of |entry * gradient| that lags by one step; a row has the mean of its entries'.
class RowPruning {
 public:
  /// The matrices [out, in] are changed in place. `held`: where state() is kept, two tensors a matrix as they are then;
  /// empty: own ones of zeros. Error: settings that do not fit together, no matrices.
  RowPruning(std::vector<torch::Tensor> matrices, RowPruningConfig config, int64_t step = 0,
             const std::vector<torch::Tensor>& held = {});

  struct Step {
    double remaining = 1.0;        ///< the share of entries that may stay
    double mask_threshold = -1.0;  ///< rows of less importance were zeroed; -1: nothing was to be
  };
  /// After the optimizer's step, before gradients are zeroed: with the gradients of this step.
  Step after_step(const std::vector<torch::Tensor>& gradients);
  Step after_step();  ///< with the matrices' own

  int64_t step() const { return step_; }
  /// Two tensors a matrix: the average, and what joins it at the next step; for a run that goes on.
  std::vector<torch::Tensor> state() const;
  void restore(int64_t step, const std::vector<torch::Tensor>& state);

 private:
  double mask(double remaining);

  std::vector<torch::Tensor> matrices_, average_, latest_;
  RowPruningConfig config_;
  int64_t step_ = 0;
};

// --- recovery

struct RecoveryConfig {
  double temperature = 2.0, task = 1.0, distillation = 0.2;
  void fields(Fields& f) {
    f("temperature", temperature, "teacher's and student's logits are divided by it").min(1e-6);
    f("task", task, "weight of the cross-entropy").min(0.0);
    f("distillation", distillation, "weight of the divergence from the teacher").min(0.0);
  }
};
/// KL(softmax(teacher / temperature) || softmax(student / temperature)), the sum over the positions with a label
/// divided by B: logits [B, T, V], labels [B, T] int64 for the same positions, -100 where there is none. The teacher
/// gets no gradient. Error: another vocabulary, no label.
torch::Tensor teacher_divergence(const torch::Tensor& student, const torch::Tensor& teacher,
                                 const torch::Tensor& labels, double temperature);
/// task * CE + distillation * teacher_divergence(...): CE is the mean over labels. Error: another vocabulary.
torch::Tensor recovery_loss(const torch::Tensor& student, const torch::Tensor& teacher, const torch::Tensor& labels,
                            const RecoveryConfig& config = {});

}  // namespace moiety
