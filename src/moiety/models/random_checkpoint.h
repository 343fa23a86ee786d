#pragma once
// Checkpoints with random weights, of any family and size: for benchmarks, and to try what a file costs before there is
// one.
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// A model of this config (config.json) that takes the memory of its largest tensor only: matrices bf16,
/// of mean 0 and deviation initializer_range; norms 1, biases 0, both f32. The same seed gives the same bits. Matrices
/// are windows of one table of random numbers. `folder`: where the tokenizer's files are. Error: see make_causal.
std::shared_ptr<const Checkpoint> random_checkpoint(nlohmann::json config, std::filesystem::path folder, uint64_t seed);

/// A config of the family with about `parameters` parameters: hidden size a multiple of 256, about a block for every 64
/// of it, heads of 64 with two to a key head. Keys of `fixed` are kept as they are. Error: the family needs more keys,
/// or no size comes within a quarter.
nlohmann::json config_of_size(const std::string& family, double parameters, const nlohmann::json& fixed);

/// Parameters of a model of this config; nothing is allocated.
int64_t parameters_of(const nlohmann::json& config);

}  // namespace moiety
