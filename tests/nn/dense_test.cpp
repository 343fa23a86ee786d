// Products with whole float matrices as tasks, against torch's in f64.
#include "moiety/nn/dense.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/kernels/matmul.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/weights.h"
#include "threads.h"

namespace moiety {
namespace {

using torch::Tensor;

struct Case {
  torch::Dtype input, weight;
  int64_t matrices;
  bool bias;
};

class DenseProducts : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!matmul_is_fast()) GTEST_SKIP() << "this machine has no fast kernels of products";
  }
};

// x, W..., b...
std::vector<Tensor> inputs_of(const Case& c, int64_t rows) {
  torch::manual_seed(3);
  std::vector<Tensor> in = {torch::randn({2, rows / 2, 70}).to(c.input)};
  for (int64_t m = 0; m < c.matrices; ++m) in.push_back((torch::randn({131 + 90 * m, 70}) * 0.1).to(c.weight));
  if (c.bias)
    for (int64_t m = 0; m < c.matrices; ++m) in.push_back(torch::randn({131 + 90 * m}).to(c.weight));
  for (Tensor& t : in) t.requires_grad_();
  return in;
}

std::vector<Tensor> run(const Case& c, const std::vector<Tensor>& in, bool ours) {
  std::vector<DenseMatrix> matrices;
  for (int64_t m = 0; m < c.matrices; ++m) {
    const auto i = static_cast<size_t>(1 + m);
    matrices.push_back({in[i], c.bias ? in[i + static_cast<size_t>(c.matrices)] : Tensor()});
    if (ours) EXPECT_TRUE(runs_dense(in[0], matrices.back()));
  }
  std::vector<Tensor> out;
  if (ours)
    out = dense_products(in[0], matrices);
  else
    for (const DenseMatrix& m : matrices) out.push_back(at::linear(in[0], m.weight, m.bias));
  auto loss = torch::zeros({}, torch::kFloat64);
  for (const Tensor& y : out) {
    torch::manual_seed(5);
    loss = loss + (y.to(torch::kFloat64) * torch::randn(y.sizes(), torch::kFloat64)).sum();
  }
  const auto grads = torch::autograd::grad({loss}, in);
  out.insert(out.end(), grads.begin(), grads.end());
  return out;
}

TEST_P(DenseProducts, EqualTorchInDouble) {
  const Case c = GetParam();
  const auto in = inputs_of(c, 220);
  std::vector<Tensor> wide;
  for (const Tensor& t : in) wide.push_back(t.detach().to(torch::kFloat64).requires_grad_());
  const auto want = run(c, wide, false);
  std::vector<Tensor> first;
  for (const int threads : {1, 2, 5}) {
    const test::Threads set(threads);
    const auto got = run(c, in, true);
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const auto type =
          i < static_cast<size_t>(c.matrices) ? c.input : in[i - static_cast<size_t>(c.matrices)].scalar_type();
      ASSERT_EQ(got[i].scalar_type(), type) << i;
      ASSERT_EQ(got[i].sizes(), want[i].sizes()) << i;
      // bf16: every operand has lost up to 2^-9 of itself, sums lose as much once more for each matrix.
      const double bound = c.input == torch::kFloat32 ? 1e-5 : 2e-2;
      EXPECT_LT((got[i].to(torch::kFloat64) - want[i]).abs().max().item<double>(),
                bound * want[i].abs().max().item<double>())
          << i;
      if (!first.empty()) EXPECT_TRUE(torch::equal(got[i], first[i])) << i << ", " << threads << " threads";
    }
    first = got;
  }
}

INSTANTIATE_TEST_SUITE_P(All, DenseProducts,
                         testing::Values(Case{torch::kFloat32, torch::kFloat32, 1, false},
                                         Case{torch::kFloat32, torch::kFloat32, 3, true},
                                         Case{torch::kBFloat16, torch::kBFloat16, 2, true},
                                         Case{torch::kBFloat16, torch::kFloat32, 1, true},
                                         Case{torch::kBFloat16, torch::kFloat32, 3, false}));

// Outputs that nobody used, and inputs that want no gradient.
TEST_F(DenseProducts, GiveTheGradientsThatAreWanted) {
  const Case c{torch::kFloat32, torch::kFloat32, 2, true};
  auto in = inputs_of(c, 64);
  const auto all = [&] {
    const std::vector<DenseMatrix> m = {{in[1], in[3]}, {in[2], in[4]}};
    return dense_products(in[0], m);
  };
  const auto whole = torch::autograd::grad({all()[1].sum()}, {in[0], in[2], in[4]});
  EXPECT_TRUE(torch::equal(whole[2], torch::full({in[2].size(0)}, 64.f)));
  const auto none = torch::autograd::grad({all()[1].sum()}, {in[1], in[3]}, {}, {}, false, /*allow_unused=*/true);
  EXPECT_FALSE(none[0].defined() || none[1].defined());
  in[1] = in[1].detach();
  in[3] = in[3].detach();
  const auto some = torch::autograd::grad({all()[1].sum()}, {in[0], in[2], in[4]});
  for (size_t i = 0; i < some.size(); ++i) EXPECT_TRUE(torch::equal(some[i], whole[i])) << i;
  in[0] = in[0].detach();
  EXPECT_TRUE(torch::equal(torch::autograd::grad({all()[1].sum()}, {in[4]})[0], whole[2]));
}

TEST_F(DenseProducts, TakeOnlyWhatTheyCan) {
  const auto x = torch::randn({20, 6}), w = torch::randn({5, 6});
  EXPECT_TRUE(runs_dense(x, {w, {}}));
  EXPECT_TRUE(runs_dense(x.to(torch::kBFloat16), {w, {}}));
  EXPECT_FALSE(runs_dense(x, {w.to(torch::kBFloat16), {}}));
  EXPECT_FALSE(runs_dense(x.to(torch::kFloat64), {w.to(torch::kFloat64), {}}));
  EXPECT_FALSE(runs_dense(x, {torch::randn({6, 5}).t(), {}}));
  EXPECT_FALSE(runs_dense(x.narrow(0, 0, 2), {w, {}}));  // torch reads the matrix as fast
  EXPECT_FALSE(runs_dense(x, {w, torch::zeros({5}, torch::kFloat64)}));
}

// A view whose rows lie apart, and one that has to be copied.
TEST_F(DenseProducts, ReadViews) {
  const auto wide = torch::randn({40, 30}), w = torch::randn({7, 30}).narrow(1, 4, 12);
  const std::vector<DenseMatrix> m = {{w, {}}};
  for (const Tensor& x : {wide.narrow(1, 3, 12), wide.t().narrow(1, 0, 12)})
    EXPECT_LT((dense_products(x, m)[0] - at::linear(x, w)).abs().max().item<double>(), 1e-5);
}

TEST(TileRanges, CoverEverythingOnce) {
  for (const int64_t total : {1, 13, 14, 15, 100, 1024})
    for (const int64_t parts : {1, 2, 3, 8, 200}) {
      int64_t next = 0;
      for (const auto& [first, last] : tile_ranges(total, parts)) {
        EXPECT_EQ(first, next);
        EXPECT_GT(last, first);
        EXPECT_EQ(first % 14, 0);
        next = last;
      }
      EXPECT_EQ(next, total) << parts;
    }
}

}  // namespace
}  // namespace moiety
