#include "moiety/nn/norm.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/kernels/token.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

using torch::Tensor;

bool has_kernel(const Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == torch::kFloat32 || x.scalar_type() == torch::kBFloat16);
}

// Calls f with a number of the type of the elements of x.
template <class F>
void by_type(const Tensor& x, F f) {
  if (x.scalar_type() == torch::kFloat32)
    f(float{});
  else
    f(at::BFloat16{});
}

// The weight as the rows of x are multiplied by it, f32.
Tensor factors(const Tensor& x, const Tensor& weight, double offset) {
  return (offset == 0.0 ? weight.to(x.scalar_type()) : weight).to(torch::kFloat32).contiguous();
}

// x [..., d] contiguous.
Tensor normalized(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const int64_t n = x.size(-1);
  const auto w = factors(x, weight, offset);
  auto y = torch::empty_like(x);
  by_type(x, [&](auto one) {
    using T = decltype(one);
    const auto* from = bits<T>(x);
    auto* to = bits<T>(y);
    parallel_for(0, x.numel() / n, std::max<int64_t>(1, 32768 / n), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        rms_norm(from + r * n, w.const_data_ptr<float>(), static_cast<float>(offset), static_cast<float>(eps),
                 to + r * n, n);
    });
  });
  return y;
}

// One pass forward, one back, where operations of torch would make a dozen.
class Normalize : public torch::autograd::Function<Normalize> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& weight, double eps,
                        double offset) {
    context->save_for_backward({x, weight});
    context->saved_data["eps"] = eps;
    context->saved_data["offset"] = offset;
    return normalized(x, weight, eps, offset);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], dy = grads[0].contiguous();
    const double offset = context->saved_data["offset"].toDouble();
    const auto eps = static_cast<float>(context->saved_data["eps"].toDouble());
    const int64_t n = x.size(-1), rows = x.numel() / n;
    const auto w = factors(x, weight, offset);
    auto dx = torch::empty_like(x);
    // In a fixed number of parts, so that the sum does not depend on the number of threads.
    const int64_t parts = std::clamp<int64_t>(rows / 32, 1, 16);
    const bool learns = context->needs_input_grad(1);
    auto dw = torch::zeros({learns ? parts : 0, n}, torch::kFloat32);
    by_type(x, [&](auto one) {
      using T = decltype(one);
      const auto *from = bits<T>(x), *grad = bits<T>(dy);
      auto* to = bits<T>(dx);
      parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p)
          for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; ++r)
            rms_norm_backward(from + r * n, w.const_data_ptr<float>(), static_cast<float>(offset), eps, grad + r * n,
                              to + r * n, learns ? dw.data_ptr<float>() + p * n : nullptr, n);
      });
    });
    return {dx, learns ? dw.sum(0).to(weight.scalar_type()) : Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

RmsNorm::RmsNorm(torch::Tensor w, double eps, double offset) : eps_(eps), offset_(offset) {
  weight = register_parameter("weight", w, w.requires_grad());
}

torch::Tensor RmsNorm::forward(const torch::Tensor& x) {
  if (has_kernel(x) && weight.is_cpu() && weight.dim() == 1 && weight.size(0) == x.size(-1) && x.numel() > 0) {
    const auto rows = x.contiguous();
    return may_shorten({x, weight}) ? normalized(rows, weight, eps_, offset_)
                                    : Normalize::apply(rows, weight, eps_, offset_);
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
