#pragma once
// A model with adapters, as the model alone that computes the same.
#include <memory>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// The checkpoint without its parts, every matrix with what stands beside it merged in; a tensor is computed when it is
/// asked for, in the format that the base stores it in (f32 for blocks). Parts at other sites than beside matrices
/// stay. Throws Error: there is nothing to merge, a GGUF file (convert it first: its rows have another order), and,
/// from get(), what cannot be merged with the reason, and numbers that are not finite, or not in the base's format,
/// with their place.
std::shared_ptr<const Checkpoint> merged_checkpoint(std::shared_ptr<const Checkpoint> adapted);

/// The other way: `adapted` is a model into which what stands beside its matrices was merged; the model before that, up
/// to the rounding of the merged weights. Throws Error as above, and where the matrices do not tell what they were:
/// DoRA, trained biases.
std::shared_ptr<const Checkpoint> unmerged_checkpoint(std::shared_ptr<const Checkpoint> adapted);

}  // namespace moiety
