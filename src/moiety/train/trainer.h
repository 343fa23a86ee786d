#pragma once
// The training loop.
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/nn/scheduled.h"
#include "moiety/train/config.h"
#include "moiety/train/data.h"
#include "moiety/train/language_task.h"
#include "moiety/train/optimizer.h"
#include "moiety/train/ranks.h"
#include "moiety/train/router_load.h"
#include "moiety/train/run_folder.h"
#include "moiety/train/run_log.h"
#include "moiety/train/task.h"

namespace moiety {

struct TrainOptions {
  torch::Device device = torch::kCPU;
  /// The processes of the run, who share the micro-batches of every step; null: one. The first writes all files.
  Ranks* ranks = nullptr;
  enum Resume {
    automatic,  ///< go on when the folder has a checkpoint
    required,   ///< Error when it has none
    restart,    ///< remove what is there and begin anew
  } resume = automatic;
  /// Called with the model when it has been built, before its parameters are looked at: to replace or add modules.
  std::function<void(torch::nn::Module&)> prepare;
  /// Asked after every step; true saves a checkpoint and ends the run.
  std::function<bool()> stop;
  /// Called after every step with its number, of how many, the loss of the step and the tokens (or images) of it.
  std::function<void(int64_t step, int64_t steps, double loss, int64_t tokens)> on_step;
};

/// What a run would be.
struct TrainPlan {
  int64_t parameters = 0, trained = 0;
  int64_t steps = 0, tokens_per_step = 0, documents = 0;
  std::string unit;  ///< what `tokens_per_step` counts: "token", "image"
  std::optional<int64_t> rows_of_an_epoch;
  /// Bytes of weights, gradients, optimizer and moving average; and about what activations take, from the config.
  int64_t weights_bytes = 0, gradient_bytes = 0, optimizer_bytes = 0, ema_bytes = 0, activation_bytes = 0;
  std::vector<Slot> slots;  ///< names, shapes, rates
};

struct TrainResult {
  int64_t step = 0, steps = 0;
  double loss = 0;  ///< of the last record of the log
  std::optional<EvaluationResult> evaluation;
  std::optional<EvaluationResult> before;  ///< the first step, where the run asks for it
  double best = 0;                         ///< lowest held-out loss, with `best_step`
  int64_t best_step = 0;                   ///< 0: none
  int64_t tokens = 0;                      ///< learned in all sittings; of an image task: images
  std::string unit;                        ///< what `tokens` counts
  double seconds = 0;                      ///< of all sittings
  std::string ended;                       ///< "complete", "stopped", "early stop", "already complete"
  std::filesystem::path model;
};

/// Looks at config and data without training or writing anything.
TrainPlan plan_training(const TrainConfig& config);

class Trainer {
 public:
  /// Opens model and data, and the folder's last checkpoint if it goes on from one. Throws Error.
  Trainer(TrainConfig config, TrainOptions options = {});
  ~Trainer();

  /// Trains to the end. After a restart, a stop or a crash at any moment the records of the log, timing aside, and the
  /// weights are those of a run that never stopped, given the same threads and machine.
  TrainResult run();

  int64_t step() const { return step_; }  ///< finished steps
  int64_t steps() const { return steps_; }
  std::string unit() const { return task_->unit(); }  ///< what the run counts: "token", "image"
  torch::nn::Module& module() { return task_->model(); }
  CausalModel& model();  ///< of a language task; Error for others
  const TrainConfig& config() const { return config_; }

 private:
  struct Window;  // sums since the last record of the log

  bool leader() const { return !options_.ranks || options_.ranks->rank() == 0; }
  int64_t processes() const { return options_.ranks ? options_.ranks->size() : 1; }
  void spread_experts();
  bool stop_asked();
  void restore(int64_t step);
  void train_step(bool record);
  void hold_zeros();
  nlohmann::json log_record();
  bool evaluate_now();
  void save();
  void report(const std::string& ended);
  template <class Body>
  void with_average(Body body);

  TrainConfig config_;
  TrainOptions options_;
  std::unique_ptr<RunFolder> folder_;
  std::unique_ptr<TrainTask> task_;
  std::unique_ptr<Optimizer> optimizer_;
  std::vector<torch::Tensor> average_;  // of slots, when on
  // Where slots stay zero, bool of the parameter's shape; undefined: nowhere. Empty: nothing is held.
  std::vector<torch::Tensor> zeros_;
  // When experts are spread: the processes that hold all of them together, those with the same share as this one (null:
  // no others), and the parameters of which this process holds a share.
  std::unique_ptr<Ranks> own_group_, peers_;
  Ranks* group_ = nullptr;
  std::vector<torch::Tensor> shares_;
  std::vector<Scheduled*> scheduled_;
  std::unique_ptr<RunLog> log_;
  std::unique_ptr<RouterLoad> routing_;  // of the step that is recorded
  std::unique_ptr<Window> window_;
  int64_t step_ = 0, steps_ = 0;
  int64_t tokens_ = 0;
  int64_t skipped_ = 0;  // steps in a row whose gradients were not finite
  double seconds_ = 0, grad_norm_ = 0, step_loss_ = 0;
  int64_t step_tokens_ = 0;
  double best_ = 0, last_loss_ = 0;
  int64_t best_step_ = 0, bad_evaluations_ = 0;
  std::optional<EvaluationResult> last_evaluation_, first_evaluation_;
  std::string ended_;
};

}  // namespace moiety
