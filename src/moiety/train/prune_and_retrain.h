#pragma once
// Pruning and training in turn: every round measures anew, prunes the same share of what is left, and trains with the
// zeros held (RD-pruning's loop, Xu et al., ICCV 2023, arXiv 2308.10438; any of its baselines' allocations as well).
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/compress/rd_pruning_model.h"
#include "moiety/train/trainer.h"

namespace moiety {

struct RetrainingOptions {
  TrainOptions train;    ///< of every round's run; its `resume` is not looked at
  int64_t entries = 0;   ///< as in stages_of
  nlohmann::json input;  ///< what else decides, to be told from another call in the same folder
  /// What curves are measured on, and distortion; unset: nothing is measured.
  std::function<std::vector<torch::Tensor>(const PrunableModel&)> batches;
  std::function<void(int64_t round, int64_t done, int64_t all)> on_point;
  std::function<void(int64_t round, const Trainer&)> on_run, after_run;
};

struct RetrainedRound {
  double target = 0.0;     ///< share of weights that is zero
  nlohmann::json pruning;  ///< PruningReport
  TrainResult training;
};
struct RetrainingResult {
  std::vector<RetrainedRound> rounds;
  bool complete = false;  ///< else it was stopped, and goes on when called again
  std::filesystem::path model;
};

/// `config.iterations` rounds from `model` to `config.sparsity`. `run` says how each round trains; its model is the
/// pruned one, its seed one more each round. Everything stands in run.output.folder, a folder a round; a call that was
/// stopped or killed goes on behind what is there. Error: as prune_layers and Trainer; a folder of another call.
RetrainingResult prune_and_retrain(const std::string& model, const std::string& method, const RdPruningConfig& config,
                                   const TrainConfig& run, const RetrainingOptions& options = {});

}  // namespace moiety
