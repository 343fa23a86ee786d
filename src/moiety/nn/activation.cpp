#include "moiety/nn/activation.h"

#include <torch/torch.h>

#include <map>
#include <utility>

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
  // Looked up once: this is asked in every layer of every token.
  static const std::pair<Activation, void (*)(float*, const float*, int64_t)> kernels[] = {
      {activation("silu"), silu_times},
      {activation("swish"), silu_times},
      {activation("gelu_pytorch_tanh"), gelu_tanh_times},
      {activation("gelu_new"), gelu_tanh_times},
      {activation("gelu_fast"), gelu_tanh_times}};
  for (const auto& [known, times] : kernels)
    if (act == known) return times;
  return nullptr;
}

}  // namespace moiety
