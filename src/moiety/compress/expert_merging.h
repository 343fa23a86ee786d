#pragma once
// Expert Merging and Expert Merging++: a base plus its experts' task vectors, with a coefficient for each tensor (or
// for each of its chunks) and expert that is learned from a few unlabelled samples (Zhang et al. 2025, arXiv
// 2509.25712).
#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moiety/base/config.h"

namespace moiety {

struct ExpertMergingConfig {
  double init = 0.1;         ///< coefficient that all begin at
  double temperature = 1.0;  ///< of teacher's and student's logits
  double reg_weight = 5.0;
  double hidden_weight = 1.0;
  std::vector<int64_t> hidden_layers;  ///< entries of the hidden-state list: 0 embeddings, L the last, after its norm
  std::vector<double> beta;            ///< of each task's losses; empty: 1
  int64_t samples = 5;                 ///< of each task; 0: all
  int64_t epochs = 1;
  int64_t accumulation = 8;
  double lr = 0.5;
  double weight_decay = 1e-5;
  double clip = 1.0;
  bool plus_plus = false;  ///< then once more with chunks by importance
  double budget = 1.0;     ///< coefficients an expert, times the number of merged tensors
  double kappa = 1.0;
  std::vector<std::string> exclude = {"vision_model.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"};
  int64_t seed = 0;
  void fields(Fields& f);
  std::string problem() const;
};

/// Elements of a chunk of a tensor of n: ceil(n / chunks). Fewer than `chunks` pieces may arise; what is too many acts
/// on nothing. Error: chunks outside 1 ... n.
int64_t chunk_elements(int64_t n, int64_t chunks);
/// logit(init) [K, chunks], what coefficients begin at; init [K] in (0, 1), else Error.
torch::Tensor initial_coefficients(const torch::Tensor& init, int64_t chunks);

/// base + sum_k sigmoid(raw[k, s]) tasks[k] with s the chunk that an element lies in, row by row; raw [K, m]. Its
/// gradient reaches raw alone. Error: no expert, shapes that differ, m above the number of elements.
torch::Tensor merge_experts(const torch::Tensor& base, const std::vector<torch::Tensor>& tasks,
                            const torch::Tensor& raw);
/// The same with one coefficient alpha [K] an expert, as it is.
torch::Tensor merge_experts_fixed(const torch::Tensor& base, const std::vector<torch::Tensor>& tasks,
                                  const torch::Tensor& alpha);
/// What merge_experts' backward pass gives raw, from the gradient of the merged tensor: K dot products.
torch::Tensor coefficient_gradient(const torch::Tensor& merged_gradient, const std::vector<torch::Tensor>& tasks,
                                   const torch::Tensor& raw);

/// One sample of one task, its expert as teacher.
struct MergeSample {
  torch::Tensor teacher_logits, student_logits;  ///< [B, S, V]
  std::vector<torch::Tensor> teacher_hidden,
      student_hidden;  ///< L + 1 of [B, S, h]; those not asked for may be undefined
};
struct MergeLoss {
  torch::Tensor total, logits, hidden, reg;  ///< scalars; logits and hidden with beta and weight in them
};
/// sum |sigmoid(raw) - init| K / P over all P coefficients of raw ([K, m] of each tensor that learns); init [K]. What
/// is as close as rounding has no slope.
torch::Tensor merge_regulariser(const std::vector<torch::Tensor>& raw, const torch::Tensor& init);
/// beta (L_z + L_h) + L_r. L_z: T^2 times the mean over tokens of the cross entropy of the student under the teacher.
/// L_h: hidden_weight times the mean over hidden_layers of the mean square. L_r: reg_weight times merge_regulariser.
/// Error: a layer that is not there, negative weights.
MergeLoss expert_merging_loss(const MergeSample& sample, const std::vector<torch::Tensor>& raw,
                              const torch::Tensor& init, const ExpertMergingConfig& config, double beta);

/// I [L]: sum_k |alpha| sum |task|, over its sum. alpha [K, L] (of a chunked tensor: the mean), sizes [K, L] the sums
/// of |task|; f64. Error: nothing differs from the base.
std::vector<double> layer_importance(const torch::Tensor& alpha, const torch::Tensor& sizes);
/// m [L] = floor(budget_ratio L I^kappa / sum I^kappa), at most `elements`. Error: a negative budget or kappa.
std::vector<int64_t> allocate_chunks(const std::vector<double>& importance, const std::vector<int64_t>& elements,
                                     double budget_ratio, double kappa);

}  // namespace moiety
