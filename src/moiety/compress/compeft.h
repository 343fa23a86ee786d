#pragma once
// ComPEFT: what a fine-tuned expert adds to its base, as the signs of its largest entries and one scale (Yadav et al.
// 2023, arXiv 2311.13171). The vector is flat over all tensors together: names ascending as bytes, each row by row.
#include <torch/types.h>

#include <map>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/io/golomb.h"
#include "moiety/io/task_vector.h"

namespace moiety {

struct CompeftConfig {
  double density = 0.2;  ///< share of the entries that is kept; 1: the vector stays as it is
  double alpha = 1.0;    ///< of the scale: alpha times the standard deviation of the whole vector
  std::string quantizer =
      "sign";  ///< sign; prune: kept values as they are; stc: the mean size of what is kept as scale
  void fields(Fields& f);
  std::string problem() const;
};

/// One density and alpha, and the loss that they give on a text.
struct CompeftTrial {
  double density = 0, alpha = 0, loss = 0;
};
/// The paper's grids: percent 5, 10, 20, 30, 50 and alpha 0.5, 1, 2, 3, 4, 5, 6, 8, 10.
inline const std::vector<double> kCompeftDensities = {0.05, 0.1, 0.2, 0.3, 0.5};
inline const std::vector<double> kCompeftAlphas = {0.5, 1, 2, 3, 4, 5, 6, 8, 10};
/// Every alpha at every density: `compress` is called once a density and gives the loss of an alpha. The best first (of
/// equal losses the smaller density, then the smaller alpha), the others in order. A loss that is no number loses.
/// Error: a grid without entries, no loss that is a number.
std::vector<CompeftTrial> tune_compeft(
    const std::vector<double>& densities, const std::vector<double>& alphas,
    const std::function<std::function<double(double alpha)>(double density)>& compress);

/// floor(d k / 100) + 1 of d entries (ties at the threshold all stay and come on top), in integers, k = 100 density
/// rounded to 6 decimals; d at density 1.
int64_t compeft_kept(int64_t d, double density);
/// The standard deviation of all entries (over d - 1), in f64, in an order that no number of threads changes. Error:
/// less than two entries.
double compeft_deviation(const torch::Tensor& tau);
/// The `rank`-th largest size of an entry, rank from 1: exact, by counting bit patterns, without a copy.
float compeft_threshold(const torch::Tensor& tau, int64_t rank);

/// A compressed vector in memory.
struct CompressedVector {
  std::string form = "golomb";  ///< golomb: signs times scale; prune: kept values; dense: all
  int64_t d = 0;
  TernaryMasks signs;  ///< what is kept, with its signs; none for dense
  float scale = 0.0f;
  torch::Tensor values;  ///< prune [kept], dense [d], f32

  /// The vector, or entries [begin, end) of it, f32.
  torch::Tensor expand() const { return expand(0, d); }
  torch::Tensor expand(int64_t begin, int64_t end) const;
};
/// tau [d] f32 on the CPU. Error: a setting out of range, entries that are not finite (naming the first).
CompressedVector compeft_compress(const torch::Tensor& tau, const CompeftConfig& config);

/// Tensors of an expert by name.
using ExpertTensors = std::map<std::string, torch::Tensor>;
/// What the expert adds to theta_init: 0 for `lora`, 1 for `ia3`, `base` for `full`; flat, f32. Error: another kind,
/// names or shapes that differ (the first five), NaN or Inf (tensor and index).
torch::Tensor task_vector(const ExpertTensors& expert, const std::string& kind, const ExpertTensors& base = {});
/// Where tensors of these names and shapes lie in the flat vector.
std::vector<TaskVectorEntry> task_vector_entries(const ExpertTensors& tensors);
/// theta_init + tau by name, in the base's types (f32 without one). Error: tau of another length.
ExpertTensors apply_task_vector(const torch::Tensor& tau, const std::vector<TaskVectorEntry>& entries,
                                const std::string& kind, const ExpertTensors& base = {});

struct TaskMergeConfig {
  std::string method = "task-arithmetic";  ///< or ties
  std::string merge_func = "dis-mean";     ///< ties: dis-mean, dis-sum or dis-max of the entries that agree
  void fields(Fields& f);
};
/// What TIES elects over all entries together: sum of sign(sum over experts); its sign stands where an entry's sum is
/// 0.
int64_t ties_balance(const torch::Tensor& taus);
/// taus [N, d] or a part of all entries, with the sign (-1, 0, 1) of the balance over all -> merged [d]. Error: an
/// unknown method or function.
torch::Tensor merge_task_vectors(const torch::Tensor& taus, const TaskMergeConfig& config, int64_t balance);
/// The same of whole vectors.
torch::Tensor merge_task_vectors(const torch::Tensor& taus, const TaskMergeConfig& config);

/// To a file and back.
int64_t save_task_vector(const std::filesystem::path& path, const CompressedVector& vector, TaskVectorHeader header,
                         const std::vector<TensorView>& others = {});
CompressedVector load_task_vector(const TaskVectorFile& file);

}  // namespace moiety
