#pragma once
// Layer-adaptive magnitude pruning by rate-distortion curves: how far the output moves when each layer is pruned alone,
// and the choice of one point of every curve with the least sum (Xu et al., ICCV 2023, arXiv 2308.10438); and the
// allocations that it is compared with: uniform, uniform+, global, LAMP, ERK.
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "moiety/base/config.h"

namespace moiety {

struct RdPruningConfig {
  double sparsity = 0.5;   ///< share of all prunable weights that is zero in the end
  int64_t grid = 100;      ///< steps of a curve
  bool worst_case = true;  ///< the largest distortion of a sample; else the mean
  int64_t iterations = 1;  ///< each prunes the same share of what is left
  double floor = 0.0;      ///< share of every layer that stays
  void fields(Fields& f);
  std::string problem() const;
};

/// Share of all weights that is zero after round 1 ... `rounds`, from `before` to `sparsity`: each prunes the same
/// share of what is left.
double rd_round_target(double before, double sparsity, int64_t round, int64_t rounds);
/// floor(j n / grid), in integers.
int64_t rd_pruned(int64_t j, int64_t n, int64_t grid);
/// What survives when `pruned` weights in all are zero: bool, of weight's shape. `mask` (undefined: all ones): 0 where
/// a weight went before, which stays so; the rest are the smallest |w| among survivors, ties at the lower index. Error:
/// fewer than went before, or more than there are.
torch::Tensor rd_mask(const torch::Tensor& weight, const torch::Tensor& mask, int64_t pruned);

/// A weight that may be pruned, in place.
struct PrunableLayer {
  std::string name;
  torch::Tensor weight;  ///< f32 or bf16, of any shape; shares memory with the model
  int64_t stage = 0;     ///< the first that reads it
};
/// A network as stages that run one after another, so that what lies before a layer runs once.
struct StagedModel {
  std::vector<std::function<torch::Tensor(const torch::Tensor&)>> stages;
  std::vector<PrunableLayer> layers;
};
/// Linear layers with biases and ReLU between them; weights [out, in], biases [out].
StagedModel relu_mlp(std::vector<torch::Tensor> weights, const std::vector<torch::Tensor>& biases);

struct RdCurves {
  torch::Tensor distortion;           ///< [L, grid + 1] f64; what came out as no number is infinite
  torch::Tensor pruned;               ///< [L, grid + 1] int64
  std::vector<torch::Tensor> output;  ///< of the model as it is, a batch each: [N, ...]
};
/// Prunes every layer alone at every j / grid, and says how far the output moved: the mean over a sample's entries of
/// the square, its largest or mean over samples. Weights are as before afterwards, bit for bit, also after an Error.
/// batches: inputs of the first stage, samples along the first dimension. Error: no layers, no samples, grid below 1,
/// an output of the model that is not finite. `progress`: points done, of all.
RdCurves rd_curves(const StagedModel& model, const std::vector<torch::Tensor>& batches, int64_t grid, bool worst_case,
                   const std::function<void(int64_t, int64_t)>& progress = {});
/// The same of all layers together, pruned to these masks; restored afterwards.
double rd_joint_distortion(const StagedModel& model, const std::vector<torch::Tensor>& batches, const RdCurves& curves,
                           const std::vector<torch::Tensor>& masks, bool worst_case);

struct RdAllocation {
  std::vector<int64_t> index, pruned;  ///< [L]
  double distortion = 0.0;             ///< sum over layers
  int64_t budget = 0;                  ///< R: weights that may survive
};
struct RdProblem {
  std::vector<std::string> names;    ///< for errors; may be empty
  std::vector<int64_t> num_weights;  ///< [L]
  torch::Tensor distortion;          ///< [L, grid + 1]
  std::vector<int64_t> min_index;    ///< [L], empty: 0
  std::vector<int64_t> max_index;    ///< [L], empty: grid
};
/// R = floor((1 - target) sum n + 1e-6).
int64_t rd_budget(const std::vector<int64_t>& num_weights, double target);
/// The least sum of distortions with at most R survivors, exactly, in time L R grid and 2 L R bytes; of equals that
/// with the fewest survivors, then the smallest index. `unit` above 1: survivors count in units, rounded up, and the
/// budget rounded down. Error: a target outside [0, 1), no choice that fits (naming layers).
RdAllocation rd_allocate(const RdProblem& problem, double target, int64_t unit = 1);
/// max(1, ceil(R / 2^16)): what large models use.
int64_t rd_unit(int64_t budget);
/// Smallest j that prunes at least as many weights as are gone already.
int64_t rd_min_index(int64_t zeros, int64_t n, int64_t grid);

/// Share of every layer's non-zero weights to prune, `amount` of all non-zero weights together: uniform, global, lamp,
/// erk or uniform+. Zeros of the weights are those pruned before. A layer of more than two dimensions makes a net a
/// convolutional one. Error: another name, an amount outside [0, 1].
std::vector<double> pruning_baseline(const std::string& name, const std::vector<torch::Tensor>& weights, double amount);
/// Weights in all that are zero once the share p of a layer's non-zeros is pruned: round(p nonzeros) more.
int64_t pruned_by_share(const torch::Tensor& weight, double share);

}  // namespace moiety
