#pragma once
// What tests of mixture layers share.
#include <torch/torch.h>

#include <functional>

#include "moiety/moe/experts.h"
#include "moiety/moe/mixture.h"

namespace moiety {

/// Largest difference between the gradient of `f` at `t` (f64) and central differences.
inline double gradient_error(const std::function<torch::Tensor()>& f, torch::Tensor t, double step = 1e-6) {
  t.mutable_grad() = torch::Tensor();
  f().backward();
  const auto analytic = t.grad().defined() ? t.grad().clone() : torch::zeros_like(t);
  torch::NoGradGuard frozen;
  auto flat = t.view({-1});
  double worst = 0.0;
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const double kept = flat[i].item<double>();
    flat[i] = kept + step;
    const double up = f().item<double>();
    flat[i] = kept - step;
    const double down = f().item<double>();
    flat[i] = kept;
    worst = std::max(worst, std::abs((up - down) / (2.0 * step) - analytic.view({-1})[i].item<double>()));
  }
  return worst;
}

inline double distance(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

inline std::shared_ptr<GatedExperts> gated_experts(int64_t count, int64_t hidden, int64_t width) {
  return std::make_shared<GatedExperts>(LinearStack(count, hidden, width), LinearStack(count, hidden, width),
                                        LinearStack(count, width, hidden), activation("silu"));
}

inline torch::Tensor loss_of(const Pass& pass, const std::string& name) {
  auto sum = torch::zeros({});
  for (const auto& [n, value] : pass.losses)
    if (n == name) sum = sum + value;
  return sum;
}

}  // namespace moiety
