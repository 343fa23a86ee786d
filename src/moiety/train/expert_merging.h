#pragma once
// Expert Merging over whole models: coefficients learned on a few samples of each expert's task, against the experts'
// own logits and hidden states (Zhang et al. 2025, arXiv 2509.25712).
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/compress/expert_merging.h"
#include "moiety/io/checkpoint.h"

namespace moiety {

/// Token ids of the samples of one task, two or more each.
using MergeTask = std::vector<std::vector<int64_t>>;

struct ExpertMergingResult {
  std::shared_ptr<const Checkpoint> model;
  std::vector<std::string> names;              ///< tensors that are merged
  std::map<std::string, torch::Tensor> alpha;  ///< [K, m] of each; [K, 1] where it is fixed
  std::vector<double> losses;                  ///< mean of each epoch
  std::vector<double> importance;              ///< plus_plus, in the order of names
  std::vector<int64_t> chunks;
  nlohmann::json json() const;
};
/// Task k is that of expert k. The model is of the base's shape and types, each tensor computed when it is asked for.
/// `progress`: samples seen, of all. Throws Error: no expert, tasks without samples, tensors or shapes that differ
/// (naming one), all of them excluded, blocks, families that store several matrices in one, a hidden state that is not
/// there.
ExpertMergingResult learn_expert_merging(std::shared_ptr<const Checkpoint> base,
                                         const std::vector<std::shared_ptr<const Checkpoint>>& experts,
                                         const std::vector<MergeTask>& tasks, const ExpertMergingConfig& config,
                                         const std::function<void(int64_t, int64_t)>& progress = {});

/// The factor of the peak rate at optimizer step `step`: cosine with warm restarts after 50, 100, 200, ... steps, down
/// to 0.1.
double warm_restart_factor(int64_t step);
/// (task, sample) of one epoch: as many of each task as the longest has, in turn, then shuffled by seed and epoch.
std::vector<std::pair<size_t, size_t>> merge_order(const std::vector<MergeTask>& tasks, int64_t seed, int64_t epoch);

}  // namespace moiety
