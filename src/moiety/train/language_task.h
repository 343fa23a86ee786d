#pragma once
// The task of a run that names none: text, of which every token is predicted from those before it.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moiety/compress/mc_smoe.h"
#include "moiety/train/open_run.h"
#include "moiety/train/task.h"

namespace moiety {

class LanguageTask : public TrainTask {
 public:
  /// Opens the model; throws Error.
  LanguageTask(const TrainConfig& config, const TaskContext& context);
  std::string unit() const override { return "token"; }
  CausalModel& model() override { return *run_.model; }
  void open_data() override;
  RowSource& rows() override { return *data_.rows; }
  bool has_held_out() const override { return !held_out_.empty(); }
  torch::Tensor loss(const MicroBatch& batch, Pass& pass) override;
  EvaluationResult evaluate(torch::Device device, Ranks* ranks) override;
  void write(const std::filesystem::path& folder, const std::string& dtype) const override;
  int64_t row_units() const override { return config_.data.length; }
  int64_t activation_bytes() const override;

 private:
  TrainConfig config_;
  OpenRun run_;
  std::shared_ptr<CausalModel> teacher_;  // null: none
  RecoveryConfig recovery_;
  TrainingData data_;
  std::vector<std::pair<std::string, HeldOut>> held_out_;  // by source
};

/// What a pass has to know of its rows.
void set_rows(Pass& pass, const MicroBatch& batch);
/// How a run turns samples into tokens.
EncodeOptions encode_options(const TrainConfig& config);
/// The loss of one micro-batch: the sum of -log p over its learned targets. logits [B, T, V] f32.
torch::Tensor token_loss(const torch::Tensor& logits, const torch::Tensor& targets);

/// Held-out loss; no gradients, no state of the model or of random streams changes. Processes share the batches.
/// `edits` and `trace` go into every forward pass.
EvaluationResult evaluate(CausalModel& model, const HeldOut& data, torch::Device device, Ranks* ranks = nullptr,
                          const Edits& edits = {}, Trace* trace = nullptr);

}  // namespace moiety
