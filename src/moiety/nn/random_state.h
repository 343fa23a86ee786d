#pragma once
// The state of torch's own generator of a device, from which weights, dropout and noise are drawn.
#include <torch/types.h>

namespace moiety {

/// A copy of it: a byte tensor.
torch::Tensor random_state(torch::Device device);
void set_random_state(torch::Device device, const torch::Tensor& state);

}  // namespace moiety
