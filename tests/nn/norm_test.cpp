#include "moiety/nn/norm.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

namespace moiety {
namespace {

struct Result {
  torch::Tensor y, dx, dw;
};

Result run(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& dy, double offset) {
  const auto from = x.clone().requires_grad_(true);
  RmsNorm norm(weight.clone().requires_grad_(true), 1e-5, offset);
  const auto y = norm.forward(from);
  y.backward(dy.to(y.scalar_type()));
  return {y.detach(), from.grad(), norm.weight.grad()};
}

float error(const torch::Tensor& got, const torch::Tensor& want) {
  return ((got.to(torch::kFloat64) - want).abs().max() / want.abs().max()).item<float>();
}

// In f64 the norm is a composite of torch's operations.
TEST(RmsNorm, KernelsEqualTheCompositeAndItsGradient) {
  torch::manual_seed(2);
  for (const double offset : {0.0, 1.0})
    for (const auto& shape : {std::vector<int64_t>{1, 1, 5}, {3, 40, 64}, {2, 7, 3, 100}}) {
      const auto x = torch::randn(shape), w = torch::randn({shape.back()}), dy = torch::randn(shape);
      const auto want = run(x.to(torch::kFloat64), w.to(torch::kFloat64), dy.to(torch::kFloat64), offset);
      const auto got = run(x, w, dy, offset);
      EXPECT_LT(error(got.y, want.y), 2e-6);
      EXPECT_LT(error(got.dx, want.dx), 1e-5);
      EXPECT_LT(error(got.dw, want.dw), 1e-5);
      const auto half = run(x.to(torch::kBFloat16), w, dy, offset);
      EXPECT_EQ(half.y.scalar_type(), torch::kBFloat16);
      EXPECT_EQ(half.dw.scalar_type(), torch::kFloat32);
      EXPECT_LT(error(half.y, want.y), 0.02);
      EXPECT_LT(error(half.dx, want.dx), 0.02);
      EXPECT_LT(error(half.dw, want.dw), 0.02);
    }
}

TEST(RmsNorm, IsTheSameWithAndWithoutAGraph) {
  torch::manual_seed(3);
  for (const auto type : {torch::kFloat32, torch::kBFloat16}) {
    RmsNorm norm(torch::randn({48}).requires_grad_(true), 1e-6);
    const auto x = torch::randn({2, 5, 48}).to(type);
    const auto with = norm.forward(x).detach();
    const torch::NoGradGuard frozen;
    EXPECT_TRUE(torch::equal(with, norm.forward(x)));
    EXPECT_TRUE(torch::equal(with, norm.forward(x.transpose(0, 1)).transpose(0, 1)));
  }
}

TEST(RmsNorm, AFrozenWeightHasNoGradient) {
  RmsNorm norm(torch::ones({8}), 1e-6);
  const auto x = torch::randn({4, 8}).requires_grad_(true);
  norm.forward(x).sum().backward();
  EXPECT_TRUE(x.grad().defined());
  EXPECT_FALSE(norm.weight.grad().defined());
}

}  // namespace
}  // namespace moiety
