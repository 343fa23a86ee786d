#include "moiety/nn/norm.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include "moiety/kernels/token.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

bool plain_f32(const torch::Tensor& t) {
  return t.is_cpu() && t.scalar_type() == torch::kFloat32 && t.is_contiguous();
}

}  // namespace

RmsNorm::RmsNorm(torch::Tensor w, double eps, double offset) : eps_(eps), offset_(offset) {
  weight = register_parameter("weight", w, w.requires_grad());
}

torch::Tensor RmsNorm::forward(const torch::Tensor& x) {
  const int64_t n = x.size(-1);
  if (may_shorten({x, weight}) && plain_f32(x) && plain_f32(weight) && weight.dim() == 1 && n > 0) {
    auto y = torch::empty_like(x);
    const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
    float* to = y.data_ptr<float>();
    at::parallel_for(0, x.numel() / n, std::max<int64_t>(1, 32768 / n), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        rms_norm(from + r * n, w, static_cast<float>(offset_), static_cast<float>(eps_), to + r * n, n);
    });
    return y;
  }
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
