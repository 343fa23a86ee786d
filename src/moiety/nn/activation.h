#pragma once
// Pointwise activations by the names that config.json uses.
#include <torch/types.h>

#include <functional>
#include <string>

namespace moiety {

using Activation = torch::Tensor (*)(const torch::Tensor&);
/// silu/swish, gelu (exact), gelu_new/gelu_pytorch_tanh/gelu_fast (tanh), quick_gelu, relu, relu2, tanh, sigmoid.
/// Error: unknown name.
Activation activation(const std::string& name);

/// g[i] = what goes on of gate and up, act(g[i]) * u[i] say, over n numbers, on the calling thread.
using GateTimes = std::function<void(float* g, const float* u, int64_t n)>;
/// The kernel of an activation; null where there is none.
GateTimes gate_times(Activation act);

}  // namespace moiety
