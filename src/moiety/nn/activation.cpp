#include "moiety/nn/activation.h"

#include <torch/torch.h>

#include <map>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"

namespace moiety {

Activation activation(const std::string& name) {
  static const std::map<std::string, Activation> table = {
      {"silu", [](const torch::Tensor& x) { return torch::silu(x); }},
      {"swish", [](const torch::Tensor& x) { return torch::silu(x); }},
      {"gelu", [](const torch::Tensor& x) { return torch::gelu(x); }},
      {"gelu_python", [](const torch::Tensor& x) { return torch::gelu(x); }},
      {"gelu_new", [](const torch::Tensor& x) { return torch::gelu(x, "tanh"); }},
      {"gelu_fast", [](const torch::Tensor& x) { return torch::gelu(x, "tanh"); }},
      {"gelu_pytorch_tanh", [](const torch::Tensor& x) { return torch::gelu(x, "tanh"); }},
      {"quick_gelu", [](const torch::Tensor& x) { return x * torch::sigmoid(1.702 * x); }},
      {"relu", [](const torch::Tensor& x) { return torch::relu(x); }},
      {"relu2", [](const torch::Tensor& x) { return torch::relu(x).square(); }},
      {"tanh", [](const torch::Tensor& x) { return torch::tanh(x); }},
      {"sigmoid", [](const torch::Tensor& x) { return torch::sigmoid(x); }},
  };
  const auto it = table.find(name);
  if (it != table.end()) return it->second;
  std::string names;
  for (const auto& [known, unused] : table) names += (names.empty() ? "" : ", ") + known;
  fail("unknown activation '{}'; known are {}", name, names);
}

GateTimes gate_times(Activation act) {
  for (const char* name : {"silu", "swish"})
    if (act == activation(name)) return silu_times;
  for (const char* name : {"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
    if (act == activation(name)) return gelu_tanh_times;
  return nullptr;
}

}  // namespace moiety
