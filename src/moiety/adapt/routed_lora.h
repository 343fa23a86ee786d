#pragma once
// Mixtures of LoRA experts beside one matrix: any Router of moe/ and a stack of low-rank experts.
#include <torch/types.h>

#include <memory>
#include <string>

#include "moiety/base/config.h"
#include "moiety/moe/router.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {

/// y = W x + scale * sum_e gate_e B_e A_e dropout(x); the router sees x without dropout. A [E, r, in], B [E, out, r].
class RoutedLora : public Beside {
 public:
  /// `site`: what the trace calls the matrix.
  RoutedLora(std::string site, std::shared_ptr<Router> router, torch::Tensor a, torch::Tensor b, double scale,
             double dropout = 0.0);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  /// With one expert the gate is always 1, and W + scale * B A is the same.
  torch::Tensor merged(const torch::Tensor& weight, int64_t place) const override;

  std::shared_ptr<Router> router;
  torch::Tensor a, b;
  torch::Tensor expert_scale;  ///< [E], besides `scale`; undefined: 1. A buffer
  void set_expert_scale(torch::Tensor scale) { expert_scale = register_buffer("expert_scale", std::move(scale)); }
  double scale() const { return scale_; }

 protected:
  std::string not_one_matrix() const override { return "its router gives every token experts of its own"; }

 private:
  std::string site_;
  double scale_, dropout_;
};

/// A and B of a target's experts, as LoRA starts them: A from U(-1/sqrt(in), 1/sqrt(in)), B zero.
struct LoraMatrices {
  torch::Tensor a, b;
};
LoraMatrices lora_experts(LinearSite& site, int64_t experts, int64_t rank);

/// |x|: dropout where a module trains, x itself elsewhere.
torch::Tensor dropped(const torch::Tensor& x, double p, bool training);

/// report() of a part beside a matrix: outputs that the trace keeps stay as they are now, whatever other parts add.
void report_beside(Pass& pass, const Site& site, const Routing& routing, int64_t experts, const torch::Tensor& x,
                   const torch::Tensor& y);

/// Mean over a layer's pairs of experts of ||B_i A_i - B_j A_j||_F, and that over the mean ||B_e A_e||_F (0 for one
/// expert, or none that adds anything). From [r, r] products alone.
struct ExpertDistance {
  double absolute = 0.0, relative = 0.0;
};
ExpertDistance expert_distance(const torch::Tensor& a, const torch::Tensor& b);

}  // namespace moiety
