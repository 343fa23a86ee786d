// Matrices over every store: values, gradients, and what `exact` promises. And norms.
#include "moiety/nn/linear.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/nn/arithmetic.h"
#include "moiety/nn/norm.h"
#include "moiety/nn/packed.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kIn = 512, kOut = 24;

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

/// Random weights [rows, cols] in a format.
TensorView stored(Format format, int64_t rows, int64_t cols, uint64_t seed = 7) {
  torch::manual_seed(seed);
  const auto w = torch::randn({rows, cols}) * 0.05;
  const int64_t bytes = row_bytes(format, cols);
  auto data = std::make_shared<std::vector<std::byte>>(rows * bytes);
  if (info(format).can_quantize) {
    for (int64_t r = 0; r < rows; ++r)
      quantize_row(format, w.const_data_ptr<float>() + r * cols, data->data() + r * bytes, cols);
  }
  TensorView view;
  view.name = "w";
  view.format = format;
  view.shape = {rows, cols};
  view.data = *data;
  view.owner = data;
  return view;
}

class BlockFormats : public testing::TestWithParam<Format> {};

TEST_P(BlockFormats, BlocksWrittenOnDemandEqualStoredOnes) {
  const auto view = stored(GetParam(), kOut, kIn);
  std::weak_ptr<const void> last;
  const auto make = [&] {
    auto copy = std::make_shared<std::vector<std::byte>>(view.data.begin(), view.data.end());
    last = copy;
    return TensorView{view, *copy, copy};
  };
  Linear plain(view), packed(view, make), exact(view, make);
  exact->exact = true;
  EXPECT_TRUE(packed->quantized());
  EXPECT_EQ(packed->mapped()->shape, view.shape);
  const auto x = torch::randn({3, kIn}), learned = torch::randn({3, kIn}).requires_grad_(true);
  const auto ids = torch::tensor({3, 0, 3});
  {
    const torch::NoGradGuard frozen;
    EXPECT_TRUE(torch::equal(packed(x), plain(x)));
    // Packed rows hold all that is needed; elsewhere the blocks themselves are what computes.
    EXPECT_EQ(last.expired(), packed->packs());
    plain->exact = true;
    EXPECT_TRUE(torch::equal(exact(x), plain(x)));
    EXPECT_FALSE(last.expired());
  }
  packed(learned).sum().backward();
  const auto grad = learned.grad().clone();
  learned.mutable_grad().reset();
  plain(learned).sum().backward();
  EXPECT_TRUE(torch::equal(grad, learned.grad()));
  EXPECT_TRUE(torch::equal(packed->dense(torch::kFloat32), plain->dense(torch::kFloat32)));
  EXPECT_TRUE(torch::equal(packed->rows(ids, torch::kFloat32), plain->rows(ids, torch::kFloat32)));
}

TEST_P(BlockFormats, ManyRowsEqualTheDecodedMatrix) {
  torch::NoGradGuard frozen;
  const auto view = stored(GetParam(), kOut, kIn);
  const auto w = dequantize(view);
  ASSERT_GT(w.abs().max().item<double>(), 0.0);
  const auto bias = torch::randn({kOut}), x = torch::randn({3, 7, kIn});
  Linear linear(view, bias);
  EXPECT_TRUE(linear->quantized());
  linear->exact = true;
  const auto expected = at::linear(x.to(torch::kFloat64), w.to(torch::kFloat64), bias.to(torch::kFloat64));
  // 512 products of f32: sums of size 1 differ in their last places.
  EXPECT_LT(distance(linear(x), expected), 1e-5);
  EXPECT_TRUE(torch::equal(linear->dense(torch::kFloat32), w));
  EXPECT_EQ(linear(x.to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
}

TEST_P(BlockFormats, RoundedRowsDoNotDependOnTheirNumber) {
  torch::NoGradGuard frozen;
  Linear linear(stored(GetParam(), kOut, kIn));
  const auto x = torch::randn({21, kIn});
  std::vector<Tensor> single;
  for (int64_t t = 0; t < 21; ++t) single.push_back(linear(x.narrow(0, t, 1)));
  const WithBlockArithmetic rounded(BlockArithmetic::rounded);
  EXPECT_LT(distance(linear(x), torch::cat(single)), 1e-5);
}

TEST_P(BlockFormats, ManyRowsAreRoundedWherePackedProductsRun) {
  torch::NoGradGuard frozen;
  Linear linear(stored(GetParam(), kOut, kIn));
  const auto x = torch::randn({21, kIn});
  const bool packed = linear->packed_for(x) != nullptr;
  EXPECT_EQ(packed, can_pack(GetParam()));
  const auto y = linear(x);
  linear->exact = true;
  EXPECT_EQ(linear->packed_for(x), nullptr);
  EXPECT_EQ(torch::equal(y, linear(x)), !packed);
}

TEST(LinearStack, KindsOfPackedMatricesFollowWhatChanges) {
  if (!can_pack(Format::Q8_0)) GTEST_SKIP() << "this machine has no products of packed rows";
  std::vector<Linear> matrices{Linear(stored(Format::Q8_0, kOut, kIn)), Linear(stored(Format::Q4_K, kOut, kIn))};
  LinearStack stack(matrices);
  for (int i = 0; i < 2; ++i) {
    const auto kinds = stack->packed_kinds();
    ASSERT_TRUE(kinds);
    EXPECT_EQ(*kinds, (std::vector<ActivationKind>{ActivationKind::Blocks32, ActivationKind::Blocks256}));
  }
  matrices[1]->stream();
  EXPECT_FALSE(stack->packed_kinds());

  EXPECT_FALSE(LinearStack(2, kIn, kOut)->packed_kinds());
  EXPECT_FALSE(LinearStack(std::vector<Linear>{Linear(stored(Format::F32, kOut, kIn))})->packed_kinds());
  EXPECT_FALSE(
      LinearStack(std::vector<Linear>{Linear(stored(Format::Q8_0, kOut, kIn), torch::zeros({kOut}))})->packed_kinds());
  // Who multiplies by the matrices of a stack adds its bias.
  EXPECT_TRUE(LinearStack(std::vector<Linear>{Linear(stored(Format::Q8_0, kOut, kIn))}, torch::zeros({1, kOut}))
                  ->packed_kinds());
}

TEST_P(BlockFormats, SeveralMatricesOnOneInputEqualEachAlone) {
  torch::NoGradGuard frozen;
  const auto bias = torch::randn({kOut});
  Linear blocks(stored(GetParam(), kOut, kIn)), biased(stored(GetParam(), kOut, kIn), bias),
      other(stored(Format::Q8_0, 48, kIn)), floats(kIn, 20), mapped(stored(Format::F32, 30, kIn)),
      halves(stored(Format::BF16, 40, kIn));
  for (const auto& shape : std::vector<std::vector<int64_t>>{{1, kIn}, {2, 13, kIn}, {0, kIn}}) {
    for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
      const auto x = torch::randn(shape).to(dtype);
      for (const auto& group : std::vector<std::vector<Linear>>{
               {blocks, biased, other}, {blocks, floats}, {mapped, halves}, {mapped, floats}}) {
        const auto all =
            group.size() == 3 ? multiply_all({group[0], group[1], group[2]}, x) : multiply_all({group[0], group[1]}, x);
        for (size_t i = 0; i < group.size(); ++i) {
          Linear one = group[i];
          const auto y = one(x);
          EXPECT_EQ(all[i].scalar_type(), dtype);
          EXPECT_TRUE(torch::equal(all[i], y)) << info(GetParam()).name << " " << i;
        }
      }
    }
  }
}

TEST_P(BlockFormats, FewRowsRoundTheirActivationsUnlessExact) {
  torch::NoGradGuard frozen;
  const auto view = stored(GetParam(), kOut, kIn);
  const auto x = torch::randn({1, 5, kIn});
  const auto expected = at::linear(x, dequantize(view));
  Linear linear(view);
  const auto rounded = linear(x);
  // An 8-bit step is max|x| / 127: about 0.7 % of a value of size 1, over 512 products of size 0.05: below 2 % of the
  // output's size, and never nothing.
  const double scale = expected.std().item<double>();
  EXPECT_LT(distance(rounded, expected), 0.05 * scale);
  EXPECT_GT(distance(rounded, expected), 1e-5 * scale);
  linear->exact = true;
  EXPECT_LT(distance(linear(x), expected), 1e-5);
}

TEST_P(BlockFormats, GradientsReachTheInputAndTheBias) {
  const auto view = stored(GetParam(), kOut, kIn);
  const auto w = dequantize(view).to(torch::kFloat64);
  auto x = torch::randn({2, 3, kIn}).requires_grad_(true), bias = torch::randn({kOut}).requires_grad_(true);
  Linear linear(view, bias);
  const auto weight = torch::randn({2, 3, kOut});
  const auto loss = [&] { return (linear(x).square() * weight).sum(); };
  loss().backward();
  // By definition.
  const auto y = at::linear(x.detach().to(torch::kFloat64), w, bias.detach().to(torch::kFloat64));
  const auto g = 2.0 * y * weight;
  EXPECT_LT(distance(x.grad(), at::matmul(g, w)), 1e-5 * g.abs().max().item<double>());
  EXPECT_LT(distance(bias.grad(), g.sum({0, 1})), 1e-5 * g.abs().max().item<double>());
  // By differences: the loss is quadratic, so that central differences are exact up to rounding. The graph's forward is
  // the exact one, so no grad mode would change the function.
  const auto direction = torch::randn_like(x);
  const double step = 0.05, analytic = (x.grad() * direction).sum().item<double>();
  const auto at_step = [&](double h) {
    const auto moved = (x.detach() + h * direction).requires_grad_(true);
    return (linear(moved).to(torch::kFloat64).square() * weight).sum().item<double>();
  };
  EXPECT_NEAR((at_step(step) - at_step(-step)) / (2 * step) / analytic, 1.0, 1e-3);
}

TEST_P(BlockFormats, RowsAreThoseOfTheMatrix) {
  torch::NoGradGuard frozen;
  const auto view = stored(GetParam(), kOut, kIn);
  Linear linear(view);
  const auto ids = torch::tensor({{3, 0}, {23, 3}}, torch::kInt64);
  EXPECT_TRUE(torch::equal(linear->rows(ids, torch::kFloat32), dequantize(view).index({ids})));
  EXPECT_THROW(linear->rows(torch::tensor({kOut}), torch::kFloat32), Error);
  EXPECT_THROW(linear->rows(torch::tensor({int64_t{-1}}), torch::kFloat32), Error);
}

std::vector<Format> block_formats() {
  std::vector<Format> list;
  for (const FormatInfo& f : formats())
    if (is_block(f.format)) {
      EXPECT_TRUE(f.can_quantize) << f.name;
      list.push_back(f.format);
    }
  return list;
}
INSTANTIATE_TEST_SUITE_P(Linear, BlockFormats, testing::ValuesIn(block_formats()),
                         [](const auto& p) { return std::string(moiety::info(p.param).name); });

TEST(Linear, FewRowsOfALargeMatrixAreDotProducts) {
  // As many rows as that, one more, and rows beside others: against f64, and bit for bit alone.
  const torch::NoGradGuard frozen;
  torch::manual_seed(3);
  for (const auto weights : {torch::kFloat32, torch::kBFloat16, torch::kFloat16})
    for (const auto type : {torch::kFloat32, torch::kBFloat16})
      for (const bool with_bias : {false, true}) {
        const auto w = (torch::randn({520, 512}) * 0.05).to(weights);
        const auto b = with_bias ? torch::randn({520}).to(weights) : torch::Tensor();
        Linear linear(w, b);
        LinearStack stack(torch::stack({w * 2, w}), with_bias ? torch::stack({b * 2, b}) : b);
        const auto x = torch::randn({9, 512}).to(type);
        auto want = at::matmul(x.to(torch::kFloat64), w.to(torch::kFloat64).t());
        if (with_bias) want += b.to(torch::kFloat64);
        const auto one = linear(x.narrow(0, 3, 1));
        for (const int64_t rows : {1, 4, 8, 9}) {
          const auto y = linear(x.narrow(0, 0, rows));
          EXPECT_EQ(y.scalar_type(), type);
          EXPECT_LT(distance(y, want.narrow(0, 0, rows)), type == torch::kFloat32 && rows < 9 ? 1e-5 : 3e-2) << rows;
          if (rows == 4 || rows == 8) EXPECT_TRUE(torch::equal(y.narrow(0, 3, 1), one)) << rows;
          if (rows < 9) EXPECT_TRUE(torch::equal(stack->forward(1, x.narrow(0, 0, rows)), y)) << rows;
        }
        const PlainRows rows = linear->plain_rows();
        EXPECT_EQ(rows.data, static_cast<const std::byte*>(w.const_data_ptr()));
        EXPECT_EQ(Linear(w.t())->plain_rows().data, nullptr);
      }
}

TEST(Linear, FloatsAreALinearLayer) {
  torch::manual_seed(1);
  auto w = torch::randn({5, 4}).requires_grad_(true), b = torch::randn({5}).requires_grad_(true);
  Linear linear(w, b);
  EXPECT_FALSE(linear->quantized());
  const auto x = torch::randn({2, 3, 4});
  const auto y = linear(x);
  EXPECT_LT(distance(y.detach(), (x.unsqueeze(-2) * w.detach()).sum(-1) + b.detach()), 1e-6);
  y.sum().backward();
  EXPECT_LT(distance(w.grad(), x.sum({0, 1}).expand({5, 4})), 1e-5);
  EXPECT_LT(distance(b.grad(), torch::full({5}, 6.0)), 1e-6);
  EXPECT_THROW(linear(torch::randn({2, 5})), Error);
}

TEST(Linear, FreshMatricesHaveTheUsualRange) {
  torch::manual_seed(2);
  Linear linear(400, 300, true);
  EXPECT_LE(linear->weight.abs().max().item<double>(), 0.05);
  EXPECT_GT(linear->weight.abs().max().item<double>(), 0.049);
  EXPECT_EQ(linear->parameters().size(), 2u);
  EXPECT_TRUE(linear->weight.requires_grad());
}

TEST(LinearStack, EveryMatrixIsItsOwnLinear) {
  torch::manual_seed(3);
  auto w = torch::randn({3, 5, 4}).requires_grad_(true), b = torch::randn({3, 5}).requires_grad_(true);
  LinearStack stack(w, b);
  const auto x = torch::randn({6, 4});
  for (int64_t e = 0; e < 3; ++e) {
    EXPECT_LT(distance(stack->forward(e, x).detach(), at::linear(x, w[e], b[e]).detach()), 1e-6);
    EXPECT_TRUE(torch::equal(stack->dense(e, torch::kFloat32), w[e]));
  }
  stack->forward(1, x).sum().backward();
  EXPECT_LT(distance(w.grad()[1], x.sum(0).expand({5, 4})), 1e-5);
  EXPECT_EQ(w.grad()[0].abs().max().item<double>() + w.grad()[2].abs().max().item<double>(), 0.0);
  EXPECT_LT(distance(b.grad(), torch::tensor({0.0, 6.0, 0.0}).unsqueeze(1).expand({3, 5})), 1e-5);
  EXPECT_THROW(stack->forward(3, x), Error);
  EXPECT_THROW(stack->forward(-1, x), Error);
}

TEST(LinearStack, SeparateMatricesMayDifferInFormat) {
  torch::NoGradGuard frozen;
  std::vector<Linear> list;
  std::vector<Tensor> dense;
  for (Format f : {Format::Q8_0, Format::Q4_K, Format::Q4_0}) {
    const auto view = stored(f, kOut, kIn, 10 + static_cast<uint64_t>(f));
    list.emplace_back(view);
    list.back()->exact = true;
    dense.push_back(dequantize(view));
  }
  const auto bias = torch::randn({3, kOut}), x = torch::randn({2, kIn});
  LinearStack stack(list, bias);
  EXPECT_EQ(stack->count(), 3);
  for (int64_t e = 0; e < 3; ++e) {
    EXPECT_LT(distance(stack->forward(e, x), at::linear(x, dense[e], bias[e])), 1e-5);
    EXPECT_TRUE(torch::equal(stack->dense(e, torch::kFloat32), dense[e]));
  }
  list.emplace_back(stored(Format::Q8_0, kOut, 256));
  EXPECT_THROW(LinearStack{list}, Error);
}

// Gradient of sum(weight * f(x)) in the direction of random vectors, by central differences of f64 sums. f computes in
// f32: rounding of 1e-7 over a step of 1e-2 leaves 1e-4.
void expect_gradient(const std::function<Tensor()>& f, Tensor t) {
  const auto weight = torch::randn_like(f());
  t.mutable_grad().reset();
  (f() * weight).sum().backward();
  const auto direction = torch::randn_like(t);
  const double analytic = (t.grad() * direction).sum().item<double>(), step = 1e-2;
  torch::NoGradGuard frozen;
  const auto kept = t.detach().clone();
  const auto at = [&](double h) {
    t.detach().copy_(kept + h * direction);
    const double value = (f().to(torch::kFloat64) * weight).sum().item<double>();
    t.detach().copy_(kept);
    return value;
  };
  EXPECT_NEAR((at(step) - at(-step)) / (2 * step), analytic, 5e-3 * std::max(1.0, std::abs(analytic)));
}

TEST(RmsNorm, FollowsItsDefinition) {
  torch::manual_seed(4);
  for (double offset : {0.0, 1.0}) {
    auto w = torch::randn({10}).requires_grad_(true), x = (torch::randn({3, 10}) * 4).requires_grad_(true);
    RmsNorm norm(w, 1e-3, offset);
    const auto y = norm.forward(x).detach();
    for (int64_t i = 0; i < 3; ++i) {
      double square = 0.0;
      for (int64_t j = 0; j < 10; ++j) square += std::pow(x[i][j].item<double>(), 2);
      for (int64_t j = 0; j < 10; ++j)
        EXPECT_NEAR(y[i][j].item<double>(),
                    x[i][j].item<double>() / std::sqrt(square / 10 + 1e-3) * (offset + w[j].item<double>()), 1e-5);
    }
    expect_gradient([&] { return norm.forward(x); }, x);
    expect_gradient([&] { return norm.forward(x); }, w);
  }
}

TEST(LayerNorm, FollowsItsDefinition) {
  torch::manual_seed(5);
  auto w = torch::randn({2, 5}).requires_grad_(true), b = torch::randn({2, 5}).requires_grad_(true);
  auto x = (torch::randn({3, 2, 5}) * 3 + 1).requires_grad_(true);
  const auto plain = LayerNorm({}, {}, 1e-2).forward(x).detach();
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t h = 0; h < 2; ++h) {
      double mean = 0.0, square = 0.0;
      for (int64_t j = 0; j < 5; ++j) mean += x[i][h][j].item<double>() / 5;
      for (int64_t j = 0; j < 5; ++j) square += std::pow(x[i][h][j].item<double>() - mean, 2) / 5;
      for (int64_t j = 0; j < 5; ++j)
        EXPECT_NEAR(plain[i][h][j].item<double>(), (x[i][h][j].item<double>() - mean) / std::sqrt(square + 1e-2), 1e-5);
    }
  LayerNorm norm(w, b, 1e-2);
  EXPECT_LT(distance(norm.forward(x).detach(), plain * w.detach() + b.detach()), 1e-6);
  for (auto& t : {x, w, b}) expect_gradient([&] { return norm.forward(x); }, t);
}

TEST(Norms, ComputeInF32WhateverTheInput) {
  // Squares of 3e4 overflow f16 and lose all digits in bf16.
  const auto x = torch::full({1, 64}, 3e4, torch::kFloat16);
  RmsNorm rms(torch::ones({64}), 1e-6);
  const auto y = rms.forward(x);
  EXPECT_EQ(y.scalar_type(), torch::kFloat16);
  EXPECT_LT(distance(y.to(torch::kFloat32), torch::ones({1, 64})), 1e-3);
  const auto z = LayerNorm({}, {}, 1e-6).forward(torch::cat({x, -x}, 1));
  EXPECT_EQ(z.scalar_type(), torch::kFloat16);
  EXPECT_LT(distance(z.to(torch::kFloat32).abs(), torch::ones({1, 128})), 1e-3);
}

}  // namespace
}  // namespace moiety
