#pragma once
// Normalization over the last dimension, computed in f32 whatever the input is.
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <memory>

namespace moiety {

/// A norm site: x [..., d] -> [..., d], in x's dtype. Norm systems derive from it.
class Norm : public torch::nn::Module {
 public:
  virtual torch::Tensor forward(const torch::Tensor& x) = 0;
};

/// y = x / sqrt(mean(x^2) + eps) * (offset + w) (Zhang & Sennrich 2019, arXiv 1910.07467; offset 1 in Gemma).
class RmsNorm : public Norm {
 public:
  RmsNorm(torch::Tensor weight, double eps, double offset = 0.0);
  torch::Tensor forward(const torch::Tensor& x) override;
  torch::Tensor scale() const { return weight.to(torch::kFloat32) + offset_; }  ///< [d]: offset + w
  double eps() const { return eps_; }
  double offset() const { return offset_; }
  torch::Tensor weight;  ///< [d]

 private:
  double eps_, offset_;
};

/// y = (x - mean) / sqrt(var + eps) * w + b; w [d] or [heads, d], w and b may be undefined (Ba et al. 2016, arXiv
/// 1607.06450).
class LayerNorm : public Norm {
 public:
  LayerNorm(torch::Tensor weight, torch::Tensor bias, double eps);
  torch::Tensor forward(const torch::Tensor& x) override;
  torch::Tensor weight, bias;

 private:
  double eps_;
};

}  // namespace moiety
