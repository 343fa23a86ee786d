#include "moiety/train/head_loss.h"

#include <torch/torch.h>

#include <algorithm>
#include <limits>

#include "moiety/base/error.h"
#include "moiety/kernels/matmul.h"
#include "moiety/kernels/softmax.h"
#include "moiety/nn/dense.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/products.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

using torch::Tensor;

// Logits of about so many elements at a time: they stay near the core until their gradient is taken.
constexpr int64_t kElements = int64_t{4} << 20;
// The same where tasks compute them. The matrix is read once for every piece, which has to have rows enough for that.
constexpr int64_t kTaskElements = int64_t{8} << 20;

struct Wanted {
  Tensor hidden, weight;  // what is undefined is not wanted
};

// The sum of -log p of the targets by our own products and rows of softmax; fills gradients.
double loss_by_tasks(const Tensor& hidden, const Tensor& weight, const Tensor& targets, double scale,
                     const Wanted& gradients) {
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0), width = hidden.size(1);
  const auto f32 = hidden.options().dtype(torch::kFloat32).requires_grad(false);
  const bool wanted = gradients.hidden.defined() || gradients.weight.defined();
  const bool narrow = hidden.scalar_type() == torch::kBFloat16;
  int64_t piece = std::max<int64_t>(kMatmulRows, kTaskElements / vocabulary);
  piece = std::min(rows, piece / kMatmulRows * kMatmulRows);
  const auto scores = torch::empty({piece, vocabulary}, f32);
  const auto slopes = !wanted ? Tensor() : narrow ? torch::empty({piece, vocabulary}, hidden.options()) : scores;
  std::vector<double> losses(static_cast<size_t>(rows));
  const auto* target = targets.const_data_ptr<int64_t>();
  const Logits logits{vocabulary, static_cast<float>(scale), 0.f, nullptr};
  for (int64_t begin = 0; begin < rows; begin += piece) {
    const int64_t n = std::min(piece, rows - begin);
    const auto h = hidden.narrow(0, begin, n), z = scores.narrow(0, 0, n);
    const auto of_scores = output_blocks(n, {vocabulary});
    run_tasks(static_cast<int64_t>(of_scores.size()), [&](int64_t i) {
      const auto& b = of_scores[static_cast<size_t>(i)];
      multiply(block_of(z, b), {part_of(h, 0, b.rows)}, {part_of(weight, 0, b.columns), true});
    });
    parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        float* row = z.data_ptr<float>() + r * vocabulary;
        const int64_t at = target[begin + r];
        const float own = row[at] * static_cast<float>(scale);
        const auto [log_sum, factor] = softmax_row(logits, row, -std::numeric_limits<float>::infinity(), row);
        losses[static_cast<size_t>(begin + r)] = static_cast<double>(log_sum) - static_cast<double>(own);
        if (!wanted) continue;
        // p - [target], through the scale.
        const float share = factor * static_cast<float>(scale);
        const float there = (factor * row[at] - 1.f) * static_cast<float>(scale);
        if (narrow) {
          uint16_t* to = bits<at::BFloat16>(slopes) + r * vocabulary;
          scale_row(row, share, to, vocabulary);
          to[at] = c10::BFloat16(there).x;
        } else {
          scale_row(row, share, row, vocabulary);
          row[at] = there;
        }
      }
    });
    if (!wanted) continue;
    const auto d = slopes.narrow(0, 0, n);
    std::vector<OutputBlock> blocks;
    if (gradients.hidden.defined()) blocks = output_blocks(n, {width});
    const size_t of_hidden = blocks.size();
    if (gradients.weight.defined())
      for (const OutputBlock& b : output_blocks(vocabulary, {width})) blocks.push_back(b);
    run_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const auto& b = blocks[static_cast<size_t>(i)];
      if (static_cast<size_t>(i) < of_hidden)
        multiply(block_of(gradients.hidden.narrow(0, begin, n), b), {part_of(d, 0, b.rows)},
                 {part_of(weight, 1, b.columns)});
      else
        multiply(block_of(gradients.weight, b), {part_of(d, 1, b.rows), true}, {part_of(h, 1, b.columns)}, begin > 0);
    });
  }
  double sum = 0.0;
  for (const double l : losses) sum += l;
  return sum;
}

class HeadLoss : public torch::autograd::Function<HeadLoss> {
 public:
  // bias without elements: none.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                        const Tensor& bias, const Tensor& targets, double scale, double cap) {
    const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
    const bool needs_hidden = hidden.requires_grad(), needs_weight = weight.requires_grad(),
               needs_bias = bias.numel() > 0 && bias.requires_grad();
    Tensor dhidden, dweight, dbias;
    if (needs_hidden) dhidden = torch::empty_like(hidden);
    if (needs_weight) dweight = torch::zeros_like(weight);
    if (needs_bias) dbias = torch::zeros_like(bias);
    double sum = 0.0;
    if (cap == 0.0 && bias.numel() == 0 && rows > 0 && runs_dense(hidden, {weight, {}})) {
      sum = loss_by_tasks(hidden, weight, targets, scale, {dhidden, dweight});
      keep(context, dhidden, dweight, dbias);
      return torch::tensor(sum, torch::kFloat32);
    }
    const auto w = weight.to(hidden.scalar_type());
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
    keep(context, dhidden, dweight, dbias);
    return torch::tensor(sum, hidden.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32)
        .to(hidden.device());
  }

  static void keep(torch::autograd::AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                   const Tensor& bias) {
    context->saved_data["hidden"] = hidden;
    context->saved_data["weight"] = weight;
    context->saved_data["bias"] = bias;
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
  if (t.numel() > 0) {
    const auto [least, most] = t.aminmax();
    check(least.item<int64_t>() >= 0 && most.item<int64_t>() < head->out(),
          "targets lie between {} and {}, the last matrix has {} rows", least.item<int64_t>(), most.item<int64_t>(),
          head->out());
  }
  const auto weight = head->weight.defined() ? head->weight : head->dense(h.scalar_type());
  return HeadLoss::apply(h, weight,
                         head->bias.defined() ? head->bias : torch::empty({0}, h.options().requires_grad(false)), t,
                         scale, cap);
}

}  // namespace moiety
