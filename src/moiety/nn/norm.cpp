#include "moiety/nn/norm.h"

#include <torch/torch.h>

namespace moiety {

RmsNorm::RmsNorm(torch::Tensor w, double eps, double offset) : eps_(eps), offset_(offset) {
  weight = register_parameter("weight", w, w.requires_grad());
}

torch::Tensor RmsNorm::forward(const torch::Tensor& x) {
  const auto x32 = x.to(torch::kFloat32);
  const auto normed = x32 * torch::rsqrt(x32.square().mean(-1, /*keepdim=*/true) + eps_);
  if (offset_ != 0.0) return (normed * (weight.to(torch::kFloat32) + offset_)).to(x.scalar_type());
  // As the reference models do it: rounded to the input's dtype before the weight.
  return weight.to(x.scalar_type()) * normed.to(x.scalar_type());
}

LayerNorm::LayerNorm(torch::Tensor w, torch::Tensor b, double eps) : eps_(eps) {
  if (w.defined()) weight = register_parameter("weight", w, w.requires_grad());
  if (b.defined()) bias = register_parameter("bias", b, b.requires_grad());
}

torch::Tensor LayerNorm::forward(const torch::Tensor& x) {
  auto y = torch::layer_norm(x.to(torch::kFloat32), {x.size(-1)}, {}, {}, eps_);
  if (weight.defined()) y = y * weight.to(torch::kFloat32);
  if (bias.defined()) y = y + bias.to(torch::kFloat32);
  return y.to(x.scalar_type());
}

}  // namespace moiety
