#pragma once
// LoRA (Hu et al. 2021, arXiv 2106.09685) beside matrices and beside those of experts, with rsLoRA's scale (arXiv
// 2312.03732) and DoRA's magnitudes (arXiv 2402.09353), each as PEFT computes it.
#include <torch/types.h>

#include <map>
#include <string>
#include <tuple>

#include "moiety/base/config.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

struct LoraConfig {
  int64_t rank = 8;
  double alpha = 8.0, dropout = 0.0, strength = 1.0;
  bool rslora = false, dora = false;
  std::string bias = "none", experts = "own", init = "uniform";
  std::map<std::string, int64_t> rank_pattern;
  std::map<std::string, double> alpha_pattern;

  void fields(Fields& f);
  /// rank_pattern and alpha_pattern by a path, as PEFT reads them: the pattern matches the whole path, or what follows
  /// a dot of it.
  int64_t rank_at(const std::string& path) const;
  double alpha_at(const std::string& path) const;
  /// alpha / rank, or alpha / sqrt(rank) with rslora, times strength.
  double scale_at(const std::string& path) const;
};

/// y = W x + scale * B (A dropout(x)); with a magnitude m [out], m / ||W + scale B A|| times that, norms of rows and
/// without gradient. A trained bias takes the place of the matrix's own.
class Lora : public Beside {
 public:
  /// a [r, in], b [out, r]; magnitude [out] and bias [out] or undefined; `matrix` is needed for either.
  Lora(torch::Tensor a, torch::Tensor b, double scale, double dropout = 0.0, LinearImpl* matrix = nullptr,
       torch::Tensor magnitude = {}, torch::Tensor bias = {});
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  torch::Tensor merged(const torch::Tensor& weight, int64_t place) const override;
  torch::Tensor unmerged(const torch::Tensor& weight, int64_t place) const override;
  torch::Tensor merged_bias(const torch::Tensor& own, int64_t place) const override;
  torch::Tensor a, b, magnitude, bias;
  double scale() const { return scale_; }

 private:
  torch::Tensor row_norms() const;  // of W + scale B A, [out]

  double scale_, dropout_;
  LinearImpl* matrix_;
  torch::Tensor norms_;  // what inference keeps, while A and B are these: memory and version
  std::tuple<const void*, const void*, int64_t> of_;
};

/// The row norms of W [out, in] that DoRA's magnitude starts from.
torch::Tensor dora_norm(const torch::Tensor& weight, const torch::Tensor& a, const torch::Tensor& b, double scale);

/// Low-rank matrices beside those of all experts: a [E or 1, r, in], b [E or 1, out, r]; one for all experts where the
/// first size is 1.
class LoraStack : public BesideStack {
 public:
  LoraStack(torch::Tensor a, torch::Tensor b, double scale);
  torch::Tensor apply(const torch::Tensor& x, const std::vector<int64_t>& counts, torch::Tensor y) override;
  torch::Tensor delta(int64_t expert) const override;
  torch::Tensor a, b;

 private:
  double scale_;
};

}  // namespace moiety
