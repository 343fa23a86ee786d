#include "moiety/train/head_loss.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

// Logits of about so many elements at a time: they stay near the core until their gradient is taken.
constexpr int64_t kElements = int64_t{4} << 20;

class HeadLoss : public torch::autograd::Function<HeadLoss> {
 public:
  // bias without elements: none.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                        const Tensor& bias, const Tensor& targets, double scale, double cap) {
    const auto w = weight.to(hidden.scalar_type());
    const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
    const bool needs_hidden = hidden.requires_grad(), needs_weight = weight.requires_grad(),
               needs_bias = bias.numel() > 0 && bias.requires_grad();
    Tensor dhidden, dweight, dbias;
    if (needs_hidden) dhidden = torch::empty_like(hidden);
    if (needs_weight) dweight = torch::zeros_like(weight);
    if (needs_bias) dbias = torch::zeros_like(bias);
    double sum = 0.0;
    const int64_t piece = std::max<int64_t>(16, kElements / vocabulary);
    for (int64_t begin = 0; begin < rows; begin += piece) {
      const int64_t n = std::min(piece, rows - begin);
      const auto h = hidden.narrow(0, begin, n), t = targets.narrow(0, begin, n).unsqueeze(1);
      auto z = at::matmul(h, w.t());
      if (z.scalar_type() == torch::kBFloat16 || z.scalar_type() == torch::kHalf) z = z.to(torch::kFloat32);
      if (bias.numel() > 0) z.add_(bias);
      if (scale != 1.0) z.mul_(scale);
      Tensor slope;
      if (cap > 0.0) {
        const auto bent = at::tanh(z / cap);
        if (needs_hidden || needs_weight || needs_bias) slope = 1.0 - bent.square();
        z = bent * cap;
      }
      // z becomes log p, then the gradient p - [target].
      const auto log_sum = z.logsumexp(1, /*keepdim=*/true);
      sum += (log_sum - z.gather(1, t)).sum(torch::kFloat64).item<double>();
      if (!needs_hidden && !needs_weight && !needs_bias) continue;
      z.sub_(log_sum).exp_();
      z.scatter_add_(1, t, torch::full_like(t, -1.0, z.options()));
      if (slope.defined()) z.mul_(slope);
      if (scale != 1.0) z.mul_(scale);
      if (needs_bias) dbias.add_(z.sum(0));
      const auto d = z.to(hidden.scalar_type());
      if (needs_hidden) dhidden.narrow(0, begin, n).copy_(at::matmul(d, w));
      if (needs_weight) {
        if (weight.scalar_type() == d.scalar_type())
          dweight.addmm_(d.t(), h);
        else
          dweight.add_(at::matmul(d.t(), h));
      }
    }
    context->saved_data["hidden"] = dhidden;
    context->saved_data["weight"] = dweight;
    context->saved_data["bias"] = dbias;
    return torch::tensor(sum, hidden.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32)
        .to(hidden.device());
  }

  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto times = [&](const char* name) {
      const auto& held = context->saved_data[name];
      if (!held.isTensor() || !held.toTensor().defined()) return Tensor();
      const auto t = held.toTensor();
      return t * grads[0].to(t.scalar_type());
    };
    return {times("hidden"), times("weight"), times("bias"), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor head_loss(const Tensor& hidden, Linear head, const Tensor& targets, double scale, double cap) {
  check(head->attached().empty(), "a part stands beside the last matrix, which the loss does not know of");
  const auto flat = hidden.reshape({-1, hidden.size(-1)});
  const auto all = targets.reshape({-1});
  check(flat.size(0) == all.size(0), "{} rows need as many targets, not {}", flat.size(0), all.size(0));
  const auto rows = (all != -100).nonzero().squeeze(1);
  const bool some = rows.size(0) < all.size(0);
  const auto h = (some ? flat.index_select(0, rows) : flat).contiguous();
  const auto t = some ? all.index_select(0, rows) : all;
  const auto weight = head->weight.defined() ? head->weight : head->dense(h.scalar_type());
  return HeadLoss::apply(h, weight,
                         head->bias.defined() ? head->bias : torch::empty({0}, h.options().requires_grad(false)), t,
                         scale, cap);
}

}  // namespace moiety
