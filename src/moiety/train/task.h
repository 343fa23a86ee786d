#pragma once
// What a run learns: a model, the rows that it learns from, its loss and its measure. The trainer owns the rest: steps,
// gradients, the clock, checkpoints, logs, processes. A run names its task (`task: image-classification`); methods of
// kind "task" register what makes it.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "moiety/nn/pass.h"
#include "moiety/train/config.h"
#include "moiety/train/data.h"
#include "moiety/train/ranks.h"

namespace moiety {

struct EvaluationResult {
  double loss = 0;  ///< mean of -log p over what is scored, natural logarithm
  double bits_per_byte = 0;
  int64_t tokens = 0;                       ///< that are scored; of an image task: images
  std::optional<double> accuracy;           ///< of an image task: share of images whose label is the likeliest one
  std::map<std::string, double> by_source;  ///< the loss of every source, where they are scored apart
};
/// As logs, checkpoints and `--json` show it.
nlohmann::json to_json(const EvaluationResult& result);
EvaluationResult evaluation_from_json(const nlohmann::json& json);

/// How a task opens its model.
struct TaskContext {
  torch::Device device = torch::kCPU;
  std::filesystem::path scratch;  ///< a folder that stays for the run
  bool weights = true;            ///< false: random ones always (to look at shapes)
};

class TrainTask {
 public:
  virtual ~TrainTask() = default;
  /// What rows are counted in: "token", "image".
  virtual std::string unit() const = 0;
  virtual torch::nn::Module& model() = 0;
  /// Opens the data; called once, when the model's modules are those that train. Throws Error.
  virtual void open_data() = 0;
  virtual RowSource& rows() = 0;
  virtual bool has_held_out() const = 0;
  /// The loss of one micro-batch: the sum over its learned targets; auxiliary losses stay in `pass`.
  virtual torch::Tensor loss(const MicroBatch& batch, Pass& pass) = 0;
  /// On the held-out data; no gradients, no state of the model or of random streams changes. Processes share the work.
  virtual EvaluationResult evaluate(torch::Device device, Ranks* ranks) = 0;
  /// The model as its checkpoint, with all that belongs beside the weights.
  virtual void write(const std::filesystem::path& folder, const std::string& dtype) const = 0;
  /// Units of one row, and about the bytes that activations of one micro-batch take.
  virtual int64_t row_units() const = 0;
  virtual int64_t activation_bytes() const = 0;
};

using MakeTrainTask = std::function<std::unique_ptr<TrainTask>(const TrainConfig&, const TaskContext&)>;

/// Makes the task that the run names. Throws Error naming the nearest one.
std::unique_ptr<TrainTask> open_task(const TrainConfig& config, const TaskContext& context);

/// Calls `score` for every batch of `data` on this process, in evaluation mode, without gradients, and with torch's
/// random state as it was afterwards. It returns the sums that are wanted; they are added up over batches and
/// processes. All processes score equally often, some once more for nothing (`counts` false).
std::vector<double> score_batches(torch::nn::Module& model, const HeldOut& data, torch::Device device, Ranks* ranks,
                                  const std::function<std::vector<double>(const MicroBatch&, bool counts)>& score);

}  // namespace moiety
