#pragma once
// Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a piece of a model keeps only its input and runs again
// in the backward pass.
#include <torch/types.h>

#include <functional>

#include "moiety/nn/pass.h"

namespace moiety {

/// body(x, pass) without its activations. Gradients reach x, the parameters that `body` uses, tensors of Pass::state
/// that it reads or writes, and what it adds to Pass::losses, as if it had run plainly. The second run sees the pass as
/// it was before the first, draws the same random numbers, is marked by Pass::recomputing and leaves no trace. `body`
/// must own what it captures and may not use a cache (Error).
torch::Tensor recompute(const torch::Tensor& x, Pass& pass,
                        std::function<torch::Tensor(const torch::Tensor&, Pass&)> body);

}  // namespace moiety
