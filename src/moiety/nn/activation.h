#pragma once
// Pointwise activations by the names that config.json uses.
#include <torch/types.h>

#include <string>

namespace moiety {

using Activation = torch::Tensor (*)(const torch::Tensor&);
/// silu/swish, gelu (exact), gelu_new/gelu_pytorch_tanh/gelu_fast (tanh), quick_gelu, relu, relu2, tanh, sigmoid.
/// Error: unknown name.
Activation activation(const std::string& name);

/// g[i] = act(g[i]) * u[i] over n numbers, on the calling thread.
using GateTimes = void (*)(float* g, const float* u, int64_t n);
/// The kernel of an activation; null where there is none.
GateTimes gate_times(Activation act);

}  // namespace moiety
