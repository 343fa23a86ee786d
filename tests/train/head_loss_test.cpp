#include "moiety/train/head_loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/train/language_task.h"

namespace moiety {
namespace {

struct Result {
  torch::Tensor loss, hidden, weight, bias;
};

// By all logits, and by the one step.
Result plain(const torch::Tensor& h, const torch::Tensor& w, const torch::Tensor& b, const torch::Tensor& t,
             double scale, double cap) {
  auto hidden = h.clone().requires_grad_(), weight = w.clone().requires_grad_(), bias = b.clone().requires_grad_();
  auto z = (torch::matmul(hidden, weight.t()) + bias) * scale;
  if (cap > 0.0) z = torch::tanh(z / cap) * cap;
  const auto loss = token_loss(z, t);
  (loss * 0.25).backward();
  return {loss, hidden.grad(), weight.grad(), bias.grad()};
}

Result at_once(const torch::Tensor& h, const torch::Tensor& w, const torch::Tensor& b, const torch::Tensor& t,
               double scale, double cap) {
  auto hidden = h.clone().requires_grad_(), weight = w.clone().requires_grad_(), bias = b.clone().requires_grad_();
  const auto loss = head_loss(hidden, Linear(weight, bias), t, scale, cap);
  (loss * 0.25).backward();
  return {loss, hidden.grad(), weight.grad(), bias.grad()};
}

double apart(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(HeadLoss, IsTheLossOverAllLogits) {
  torch::manual_seed(1);
  // More rows than fit a piece.
  const auto h = torch::randn({3, 400, 6}, torch::kFloat64), w = torch::randn({9000, 6}, torch::kFloat64),
             b = torch::randn({9000}, torch::kFloat64);
  auto t = torch::randint(0, 9000, {3, 400});
  t[1].narrow(0, 100, 200).fill_(-100);
  for (const auto& [scale, cap] : {std::pair{1.0, 0.0}, {0.5, 0.0}, {1.0, 3.0}, {2.0, 1.5}}) {
    const auto want = plain(h, w, b, t, scale, cap), got = at_once(h, w, b, t, scale, cap);
    EXPECT_NEAR(got.loss.item<double>(), want.loss.item<double>(), 1e-8 * want.loss.item<double>());
    EXPECT_LT(apart(got.hidden, want.hidden), 1e-10);
    EXPECT_LT(apart(got.weight, want.weight), 1e-10);
    EXPECT_LT(apart(got.bias, want.bias), 1e-10);
  }
}

TEST(HeadLoss, RowsWithoutATargetHaveNoGradientAndNoneIsNoError) {
  torch::manual_seed(2);
  auto h = torch::randn({4, 5}).requires_grad_();
  const Linear head(torch::randn({7, 5}));
  auto t = torch::full({4}, -100, torch::kInt64);
  EXPECT_EQ(head_loss(h, head, t).item<double>(), 0.0);
  t[2] = 3;
  head_loss(h, head, t).backward();
  EXPECT_GT(h.grad()[2].abs().max().item<double>(), 0.0);
  EXPECT_EQ(h.grad()[1].abs().max().item<double>(), 0.0);
}

TEST(HeadLoss, InHalfPrecisionItIsNear) {
  torch::manual_seed(3);
  const auto h = torch::randn({40, 32}), w = torch::randn({50, 32}) * 0.2;
  const auto t = torch::randint(0, 50, {40});
  const auto want = plain(h, w, torch::zeros({50}), t, 1.0, 0.0);
  auto half = h.to(torch::kBFloat16).requires_grad_();
  const auto loss = head_loss(half, Linear(w), t);
  (loss * 0.25).backward();
  EXPECT_NEAR(loss.item<double>(), want.loss.item<double>(), 0.01 * want.loss.item<double>());
  EXPECT_LT(apart(half.grad().to(torch::kFloat32), want.hidden), 0.02 * want.hidden.abs().max().item<double>());
}

}  // namespace
}  // namespace moiety
