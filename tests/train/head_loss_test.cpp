#include "moiety/train/head_loss.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/kernels/matmul.h"
#include "moiety/train/language_task.h"
#include "threads.h"

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

// As tasks, which take f32 and bf16: more rows than a piece, a scale, weights of both types.
TEST(HeadLoss, TasksAreNearTheLossInDouble) {
  torch::manual_seed(4);
  const auto kDouble = torch::kFloat64;
  for (const auto& [type, weight_type] : {std::pair{torch::kFloat32, torch::kFloat32},
                                          {torch::kBFloat16, torch::kFloat32},
                                          {torch::kBFloat16, torch::kBFloat16}}) {
    const auto h = torch::randn({1100, 40}).to(type), w = (torch::randn({9000, 40}) * 0.2).to(weight_type);
    const auto t = torch::randint(0, 9000, {1100});
    const auto want = plain(h.to(kDouble), w.to(kDouble), torch::zeros({9000}, kDouble), t, 0.5, 0.0);
    std::vector<Result> all;
    for (const int threads : {1, 3}) {
      const test::Threads set(threads);
      auto hidden = h.clone().requires_grad_(), weight = w.clone().requires_grad_();
      const auto loss = head_loss(hidden, Linear(weight), t, 0.5);
      (loss * 0.25).backward();
      EXPECT_EQ(hidden.grad().scalar_type(), type);
      EXPECT_EQ(weight.grad().scalar_type(), weight_type);
      const double bound = type == torch::kFloat32 ? 1e-5 : 2e-2;
      EXPECT_NEAR(loss.item<double>(), want.loss.item<double>(), 0.1 * bound * want.loss.item<double>());
      EXPECT_LT(apart(hidden.grad().to(kDouble), want.hidden), bound * want.hidden.abs().max().item<double>());
      EXPECT_LT(apart(weight.grad().to(kDouble), want.weight), bound * want.weight.abs().max().item<double>());
      all.push_back({loss.detach(), hidden.grad(), weight.grad(), {}});
    }
    if (!matmul_is_fast()) continue;  // torch's products depend on the number of threads
    EXPECT_TRUE(torch::equal(all[0].loss, all[1].loss));
    EXPECT_TRUE(torch::equal(all[0].hidden, all[1].hidden));
    EXPECT_TRUE(torch::equal(all[0].weight, all[1].weight));
    // Frozen weights, as beside adapters.
    auto hidden = h.clone().requires_grad_();
    (head_loss(hidden, Linear(w), t, 0.5) * 0.25).backward();
    EXPECT_TRUE(torch::equal(hidden.grad(), all[0].hidden));
    const torch::NoGradGuard frozen;
    EXPECT_TRUE(torch::equal(head_loss(h, Linear(w), t, 0.5), all[0].loss));
  }
}

TEST(HeadLoss, TargetsOutsideTheVocabularyAreErrors) {
  const Linear head(torch::randn({7, 5}));
  for (const int64_t bad : {7, -1}) {
    const auto t = torch::full({20}, bad);
    EXPECT_THROW(head_loss(torch::randn({20, 5}), head, t), Error);
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
