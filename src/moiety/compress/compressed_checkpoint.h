#pragma once
// A checkpoint of a mixture that is to be tuned with Compressed Experts (arXiv 2503.00634): the vectors, all ones, and
// the authors' config keys.
#include <cstdint>
#include <memory>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// `base` with `use_ce`, `n_ce` and a tensor `layers.L.mlp.ces` [E, 3, max(d, f)] of ones for every mixture; `n_ce` -1:
/// half of the experts of a token. Error: no mixture, no main expert left, such vectors or a part in that place
/// already, a GGUF file.
std::shared_ptr<const Checkpoint> with_compressed_experts(std::shared_ptr<const Checkpoint> base, int64_t n_ce);

}  // namespace moiety
