#pragma once
// Takes single experts out of a checkpoint by zeroing their down projections: they are still chosen, their gates are
// spent, and nothing comes of it (Su et al. 2025, arXiv 2507.23279). What a report of super experts says, for
// transforms that have to spare them.
#include <torch/types.h>

#include <compare>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// Expert of a layer; -1: the shared one.
struct ExpertAt {
  int64_t layer = 0, expert = 0;
  auto operator<=>(const ExpertAt&) const = default;
};

/// "1,68;2,92": layer and expert. Error: something else, the same expert twice.
std::vector<ExpertAt> parse_experts(const std::string& text);

/// down [E, h, d] with the matrices of these experts zeroed. Error: an expert that is not there.
torch::Tensor without_experts(const torch::Tensor& down, const std::vector<int64_t>& experts);

/// The checkpoint with the down projections (and their biases) of these experts zeroed, in any layout and format;
/// nothing else changes. Error naming layer or expert, and which there are.
std::shared_ptr<const Checkpoint> prune_experts(std::shared_ptr<const Checkpoint> base,
                                                const std::vector<ExpertAt>& experts);

/// A name for the model that a config describes: a hash of what fixes its shapes and parts, 64 hexadecimal digits.
std::string config_hash(const nlohmann::json& config);
/// The super experts of a report of `moiety analyze super-experts`. Error: no such report, or one made for a model with
/// another config.
std::vector<ExpertAt> reported_experts(const std::string& file, const nlohmann::json& config);

}  // namespace moiety
