#pragma once
// What tells whether a file about a model's routing (paths, calibrated weights) belongs to the model at hand.
#include <string>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// SHA-256 over the f32 values of all router matrices, from the first block to the last: the same for a checkpoint of
/// the Hub, its GGUF file, and files in which only the experts have changed. Error: the model has no expert layers.
std::string router_hash(const Checkpoint& checkpoint);

}  // namespace moiety
