#include "moiety/adapt/low_rank.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "adapt_tools.h"
#include "moiety/base/error.h"
#include "moiety/kernels/matmul.h"
#include "threads.h"

namespace moiety {
namespace {

using torch::Tensor;

// Adds every rank on its own.
Tensor by_ranks(const Tensor& y, const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& gates, double scale) {
  auto out = y.clone();
  const int64_t each = gates.defined() ? a.size(0) / gates.size(1) : 1;
  for (int64_t r = 0; r < a.size(0); ++r) {
    auto u = torch::matmul(v, a[r]);
    if (gates.defined()) u = u * gates.select(1, r / each).view(u.sizes());
    out = out + scale * u.unsqueeze(-1) * b.select(1, r);
  }
  return out;
}

RC_GTEST_PROP(LowRank, IsTheSumOverRanks, ()) {
  const auto size = [](int most) { return static_cast<int64_t>(*rc::gen::inRange(1, most + 1)); };
  const int64_t rows = size(5), time = size(3), in = size(9), out = size(9), experts = size(4), each = size(3);
  torch::manual_seed(*rc::gen::inRange(0, 1000));
  const torch::NoGradGuard frozen;
  const auto y = f64({rows, time, out}, false), v = f64({rows, time, in}, false), a = f64({experts * each, in}, false),
             b = f64({out, experts * each}, false), gates = f64({rows * time, experts}, false);
  for (const Tensor& g : {Tensor(), gates, gates.repeat_interleave(each, 1)})
    RC_ASSERT(distance(add_low_rank(y.clone(), v, a, b, g, 0.7), by_ranks(y, v, a, b, g, 0.7)) < 1e-12);
}

class LowRankGradients : public testing::TestWithParam<int64_t> {};

// No gates, one an expert, one a rank.
TEST_P(LowRankGradients, EqualCentralDifferences) {
  torch::manual_seed(1);
  const auto w = f64({5, 4}), v = f64({2, 3, 4}), a = f64({6, 4}), b = f64({5, 6}), up = f64({2, 3, 5}, false);
  const auto gates = GetParam() == 0 ? Tensor() : f64({6, GetParam()});
  const auto f = [&] { return (add_low_rank(torch::matmul(v, w.t()), v, a, b, gates, 1.3) * up).sum(); };
  for (const Tensor& t : {w, v, a, b, gates})
    if (t.defined()) {
      EXPECT_LT(gradient_error(f, t), 1e-7);
    }
}

INSTANTIATE_TEST_SUITE_P(Gates, LowRankGradients, testing::Values(0, 3, 6));

// f32 and bf16 run as tasks, f64 by torch.
TEST(LowRank, TasksEqualTorchInDouble) {
  for (const auto& [type, weight_type] : {std::pair{torch::kFloat32, torch::kFloat32},
                                          {torch::kBFloat16, torch::kFloat32},
                                          {torch::kBFloat16, torch::kBFloat16}})
    for (const int64_t experts : {0, 4, 12})  // no gates, one an expert, one a rank
      for (const auto& [in, out] : {std::pair<int64_t, int64_t>{70, 33}, {17, 300}}) {
        torch::manual_seed(7);
        std::vector<Tensor> low = {torch::randn({3, 70, in}).to(type), (torch::randn({12, in}) * 0.2).to(weight_type),
                                   torch::randn({out, 12}).to(weight_type)};
        if (experts > 0) low.push_back(torch::rand({210, experts}));
        std::vector<Tensor> high;
        for (Tensor& t : low) {
          high.push_back(t.to(torch::kFloat64).requires_grad_());
          t.requires_grad_();
        }
        const auto base = torch::randn({3, 70, out}).to(type), up = torch::randn({3, 70, out}).to(type);
        const auto run = [&](const std::vector<Tensor>& m) {
          const auto y = add_low_rank(base.to(m[0].scalar_type(), false, true), m[0], m[1], m[2],
                                      m.size() > 3 ? m[3] : Tensor(), 0.7);
          auto all = torch::autograd::grad({(y * up.to(y.scalar_type())).sum()}, m);
          all.push_back(y.detach());
          return all;
        };
        const auto want = run(high);
        std::vector<Tensor> first;
        for (const int threads : {1, 3}) {
          const test::Threads set(threads);
          const auto got = run(low);
          for (size_t i = 0; i < got.size(); ++i) {
            if (i < low.size()) EXPECT_EQ(got[i].scalar_type(), low[i].scalar_type()) << i;
            const double bound = (type == torch::kFloat32 ? 1e-5 : 3e-2) * want[i].abs().max().item<double>();
            EXPECT_LT((got[i].to(torch::kFloat64) - want[i]).abs().max().item<double>(), bound) << i;
            if (!first.empty() && matmul_is_fast()) EXPECT_TRUE(torch::equal(first[i], got[i])) << i;
          }
          first = got;
        }
      }
}

TEST(LowRank, AGateOfZeroKeepsGradientsAtZero) {
  torch::manual_seed(2);
  const auto v = f64({4, 3}), a = f64({6, 3}), b = f64({5, 6});
  auto gates = torch::rand({4, 3}, torch::kFloat64);
  gates.select(1, 1).zero_();
  add_low_rank(torch::zeros({4, 5}, torch::kFloat64), v, a, b, gates, 1.0).square().sum().backward();
  EXPECT_EQ(a.grad().slice(0, 2, 4).abs().max().item<double>(), 0.0);
  EXPECT_EQ(b.grad().slice(1, 2, 4).abs().max().item<double>(), 0.0);
  const auto low_v = torch::randn({40, 3}), low_a = torch::randn({6, 3}).requires_grad_(),
             low_b = torch::randn({5, 6}).requires_grad_();
  add_low_rank(torch::zeros({40, 5}), low_v, low_a, low_b, gates.repeat({10, 1}).to(torch::kFloat32), 1.0)
      .square()
      .sum()
      .backward();
  EXPECT_EQ(low_a.grad().slice(0, 2, 4).abs().max().item<double>(), 0.0);
  EXPECT_EQ(low_b.grad().slice(1, 2, 4).abs().max().item<double>(), 0.0);
  EXPECT_GT(a.grad().slice(0, 0, 2).abs().min().item<double>(), 0.0);
}

TEST(LowRank, LeavesAParameterAsItIs) {
  const auto y = f64({4, 5}), kept = y.detach().clone();
  add_low_rank(y, f64({4, 3}), f64({2, 3}), f64({5, 2}), {}, 1.0).sum().backward();
  EXPECT_TRUE(torch::equal(y.detach(), kept));
  EXPECT_TRUE(torch::equal(y.grad(), torch::ones_like(y)));
}

TEST(LowRank, OnePartAfterAnotherHasTheGradientsOfBoth) {
  torch::manual_seed(3);
  const auto w = f64({5, 4}), v = f64({3, 4}), a = f64({2, 4}), b = f64({5, 2}), c = f64({3, 4}), d = f64({5, 3});
  const auto f = [&] {
    return add_low_rank(add_low_rank(torch::matmul(v, w.t()), v, a, b, {}, 2.0), v, c, d, {}, 0.5).square().sum();
  };
  for (const Tensor& t : {w, v, a, b, c, d}) EXPECT_LT(gradient_error(f, t), 1e-6);
}

TEST(LowRank, KeepsTheTypeOfTheOutput) {
  torch::manual_seed(4);
  const torch::NoGradGuard frozen;
  const auto x = torch::randn({6, 8}), a = torch::randn({4, 8}), b = torch::randn({5, 4}), gates = torch::rand({6, 4});
  const auto y = torch::zeros({6, 5});
  const auto half = add_low_rank(y.to(torch::kBFloat16), x.to(torch::kBFloat16), a, b, gates, 1.0);
  EXPECT_EQ(half.scalar_type(), torch::kBFloat16);
  // bf16 keeps 8 bits; sums of 8 and 4 products.
  EXPECT_LT(distance(half.to(torch::kFloat32), add_low_rank(y.clone(), x, a, b, gates, 1.0)), 0.2);
}

TEST(LowRank, SizesThatDoNotFitAreErrors) {
  const auto y = [] { return torch::zeros({4, 5}); };
  EXPECT_THROW(add_low_rank(y(), torch::zeros({4, 3}), torch::zeros({2, 4}), torch::zeros({5, 2}), {}, 1.0), Error);
  EXPECT_THROW(add_low_rank(y(), torch::zeros({4, 3}), torch::zeros({2, 3}), torch::zeros({5, 3}), {}, 1.0), Error);
  EXPECT_THROW(
      add_low_rank(y(), torch::zeros({4, 3}), torch::zeros({4, 3}), torch::zeros({5, 4}), torch::zeros({4, 3}), 1.0),
      Error);
  EXPECT_THROW(
      add_low_rank(y(), torch::zeros({4, 3}), torch::zeros({4, 3}), torch::zeros({5, 4}), torch::zeros({3, 4}), 1.0),
      Error);
}

// `few` of 8 experts: with 40 ranks each the products are grouped, with one each they are not.
Routing routing_of(int64_t rows, int64_t few) {
  Routing r;
  r.experts = torch::stack([&] {
    std::vector<Tensor> out;
    for (int64_t n = 0; n < rows; ++n) out.push_back(torch::randperm(8).slice(0, 0, few));
    return out;
  }());
  r.experts[0][0] = -1;
  r.gates = f64({rows, few});
  return r;
}

class Routed : public testing::TestWithParam<std::tuple<int64_t, bool>> {};

TEST_P(Routed, EqualsTheChosenExpertsOneByOne) {
  const auto [each, scaled] = GetParam();
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  const auto a = torch::randn({8, each, 6}), b = torch::randn({8, 5, each}), x = torch::randn({7, 6}),
             y = torch::randn({7, 5});
  const auto scale = scaled ? torch::rand({8}) : Tensor();
  auto r = routing_of(7, 2);
  r.gates = r.gates.to(torch::kFloat32);
  auto want = y.clone();
  for (int64_t n = 0; n < 7; ++n)
    for (int64_t k = 0; k < 2; ++k)
      if (const auto e = r.experts[n][k].item<int64_t>(); e >= 0)
        want[n] += 0.5 * r.gates[n][k] * (scaled ? scale[e] : torch::ones({})) * b[e].mv(a[e].mv(x[n]));
  // Sums of 40 products of f32.
  EXPECT_LT(distance(add_routed(y.clone(), x, a, b, r, 0.5, scale), want), 1e-3);
}

TEST_P(Routed, GradientsEqualCentralDifferences) {
  const auto [each, scaled] = GetParam();
  torch::manual_seed(6);
  const auto a = f64({8, each, 2}), b = f64({8, 2, each}), x = f64({3, 2});
  const auto scale = scaled ? torch::rand({8}, torch::kFloat64) : Tensor();
  const auto r = routing_of(3, 2);
  const auto f = [&] {
    return add_routed(torch::zeros({3, 2}, torch::kFloat64), x, a, b, r, 0.5, scale).square().sum() * 1e-2;
  };
  for (const Tensor& t : {x, a, b, r.gates}) EXPECT_LT(gradient_error(f, t), 1e-6);
  EXPECT_EQ(r.gates.grad()[0][0].item<double>(), 0.0);
}

// 8 experts of 40 ranks are grouped, of 3 are not.
INSTANTIATE_TEST_SUITE_P(Both, Routed, testing::Combine(testing::Values(3, 40), testing::Bool()));

TEST(LowRank, GatesOfATwinAreAdded) {
  Routing r;
  r.experts = torch::tensor({{1, 1, 0}, {2, -1, -1}}, torch::kInt64);
  r.gates = torch::tensor({{0.25, 0.5, 1.0}, {2.0, 7.0, 9.0}});
  EXPECT_TRUE(torch::equal(gate_table(r, 3), torch::tensor({{1.0, 0.75, 0.0}, {0.0, 0.0, 2.0}})));
}

TEST(LowRank, JoinedExpertsStandSideBySide) {
  torch::manual_seed(7);
  const auto a = torch::randn({3, 2, 4}), b = torch::randn({3, 5, 2});
  EXPECT_TRUE(torch::equal(joined_a(a).slice(0, 2, 4), a[1]));
  EXPECT_TRUE(torch::equal(joined_b(b).slice(1, 4, 6), b[2]));
}

}  // namespace
}  // namespace moiety
