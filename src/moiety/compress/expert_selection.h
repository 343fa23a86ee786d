#pragma once
// Which experts stay: by a score, in every layer alike or where they matter most; and what is never taken out.
#include <torch/types.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "moiety/compress/calibration.h"
#include "moiety/compress/expert_layers.h"
#include "moiety/compress/prune_experts.h"

namespace moiety {

/// How many experts stay.
struct KeepRule {
  double keep = 0.5;    ///< from 1: experts of a layer; below: their share, rounded, at least one
  bool across = false;  ///< that share of all experts of the model: layers that matter more keep more
  /// Experts of a layer of `experts`, as many of each of its `groups`: shares are rounded to that. Error: not above 0,
  /// no whole number from 1, more than there are, a number that the groups cannot share.
  int64_t of_layer(int64_t block, int64_t experts, int64_t groups = 1) const;
};

/// Experts that stay in any case, by index of ExpertLayers::layers().
using ProtectedExperts = std::vector<std::set<int64_t>>;
/// By layer; shared experts (-1) are never taken out and left out here. Error: a layer or an expert that does not
/// exist.
ProtectedExperts protected_experts(const ExpertLayers& layers, const std::vector<ExpertAt>& experts);

/// How much each expert of each layer is worth [experts] f64: `frequency` (share of the choices), `importance` (gates
/// over tokens), `reap` (mean of gate times size of the output); those of rows that share an expert are added. Error:
/// another name, a calibration of other layers.
std::vector<torch::Tensor> expert_scores(const ExpertLayers& layers, const Calibration& calibration,
                                         const std::string& by);
/// Drawn from a stream of the seed.
std::vector<torch::Tensor> random_scores(const ExpertLayers& layers, uint64_t seed);

/// By layer the experts that stay, ascending: the best by score, ties to the lower index, protected ones first. With
/// `across` a score counts as a share of its layer's sum, and a layer keeps at least as many experts as a token takes.
/// Where a model routes in groups, the best of every group. Error: scores that do not fit, NaN, more protected experts
/// than places, `across` and groups.
std::vector<std::vector<int64_t>> select_experts(const ExpertLayers& layers, const std::vector<torch::Tensor>& scores,
                                                 const KeepRule& rule, const ProtectedExperts& keep = {});

/// What with_experts needs to keep these alone; layers that keep all are left as they are.
std::vector<NewExperts> keep_experts(const ExpertLayers& layers, const std::vector<std::vector<int64_t>>& kept);

}  // namespace moiety
