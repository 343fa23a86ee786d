// The kernel of the scan against the recurrence written out, in f64.
#include "moiety/nn/selective_scan.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include <vector>

#include "moe/moe_tools.h"
#include "moiety/base/error.h"
#include "threads.h"

namespace moiety {
namespace {

using torch::Tensor;

struct Inputs {
  std::vector<Tensor> leaves;  // u, dt, a, b, c, state
  Tensor what;
};

Inputs inputs_of(int64_t batch, int64_t tokens, int64_t channels, int64_t states, bool marked) {
  Inputs in;
  in.leaves = {torch::randn({batch, tokens, channels}),      torch::rand({batch, tokens, channels}) * 0.5,
               -torch::rand({states, channels}) * 4.0 - 0.1, torch::randn({batch, tokens, states}),
               torch::randn({batch, tokens, states}),        torch::randn({batch, states, channels})};
  if (marked) in.what = torch::randint(0, 3, {batch, tokens}, torch::kUInt8);
  return in;
}

// Outputs and the gradients of everything, of weighted sums of both outputs.
using Scan = decltype(&selective_scan);
std::vector<Tensor> run(Scan scan, const Inputs& in, torch::ScalarType type) {
  std::vector<Tensor> leaves;
  for (const Tensor& t : in.leaves) leaves.push_back(t.detach().to(type).clone().requires_grad_());
  const auto [y, last] = scan(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], leaves[5], in.what);
  const auto weight = [&](const Tensor& t) {
    return torch::arange(t.numel(), t.options().requires_grad(false)).view(t.sizes()).cos();
  };
  auto out = torch::autograd::grad({(y * weight(y)).sum() + (last * weight(last)).sum()}, leaves);
  out.push_back(y.detach());
  out.push_back(last.detach());
  return out;
}

RC_GTEST_PROP(SelectiveScan, KernelIsTheRecurrence, ()) {
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1 << 20));
  // Lanes, groups and chunks that are not full.
  const auto in =
      inputs_of(*rc::gen::inRange<int64_t>(1, 3), *rc::gen::inRange<int64_t>(1, 70), *rc::gen::inRange<int64_t>(1, 90),
                *rc::gen::inRange<int64_t>(1, 6), *rc::gen::arbitrary<bool>());
  const auto got = run(selective_scan, in, torch::kFloat32), want = run(selective_scan_composite, in, torch::kFloat64);
  // Sums of up to 70 tokens times 90 channels, of numbers around 1.
  for (size_t i = 0; i < got.size(); ++i)
    RC_ASSERT(distance(got[i].to(torch::kFloat64), want[i]) < 2e-5 * (1.0 + want[i].abs().max().item<double>()));
}

TEST(SelectiveScan, GradientsOfTheRecurrenceEqualCentralDifferences) {
  torch::manual_seed(1);
  const auto in = inputs_of(2, 5, 3, 2, true);
  std::vector<Tensor> leaves;
  for (const Tensor& t : in.leaves) leaves.push_back(t.to(torch::kFloat64).requires_grad_());
  const auto f = [&] {
    const auto [y, last] = selective_scan(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], leaves[5], in.what);
    return y.square().sum() + last.sum();
  };
  for (const Tensor& t : leaves) EXPECT_LT(gradient_error(f, t), 1e-6);
}

TEST(SelectiveScan, SameBitsForAnyNumberOfThreads) {
  torch::manual_seed(2);
  const auto in = inputs_of(3, 40, 200, 16, true);
  std::vector<Tensor> one;
  {
    const test::Threads threads(1);
    one = run(selective_scan, in, torch::kFloat32);
  }
  const test::Threads threads(3);
  const auto many = run(selective_scan, in, torch::kFloat32);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(torch::equal(one[i], many[i])) << i;
}

TEST(SelectiveScan, GoesOnWhereItStopped) {
  torch::manual_seed(3);
  const torch::NoGradGuard frozen;
  const auto in = inputs_of(2, 50, 20, 4, true);
  const auto& l = in.leaves;
  const auto [whole, end] = selective_scan(l[0], l[1], l[2], l[3], l[4], l[5], in.what);
  auto state = l[5];
  for (int64_t t = 0; t < 50; t += 7) {
    const int64_t n = std::min<int64_t>(7, 50 - t);
    const auto at = [&](const Tensor& x) { return x.narrow(1, t, n); };
    const auto [y, next] = selective_scan(at(l[0]), at(l[1]), l[2], at(l[3]), at(l[4]), state, at(in.what));
    EXPECT_TRUE(torch::equal(y, whole.narrow(1, t, n)));
    state = next;
  }
  EXPECT_TRUE(torch::equal(state, end));
}

TEST(SelectiveScan, BadShapesAreErrors) {
  const auto in = inputs_of(2, 3, 4, 2, false);
  const auto& l = in.leaves;
  EXPECT_THROW(selective_scan(l[0], l[1].narrow(1, 0, 2), l[2], l[3], l[4], {}, {}), Error);
  EXPECT_THROW(selective_scan(l[0], l[1], l[2].t(), l[3], l[4], {}, {}), Error);
  EXPECT_THROW(selective_scan(l[0], l[1], l[2], l[3].narrow(2, 0, 1), l[4], {}, {}), Error);
  EXPECT_THROW(selective_scan(l[0], l[1], l[2], l[3], l[4], l[5].narrow(0, 0, 1), {}), Error);
  EXPECT_THROW(selective_scan(l[0], l[1], l[2], l[3], l[4], {}, torch::zeros({2, 3})), Error);
  EXPECT_THROW(
      selective_scan(l[0], l[1], torch::zeros({300, 4}), torch::zeros({2, 3, 300}), torch::zeros({2, 3, 300}), {}, {}),
      Error);
}

}  // namespace
}  // namespace moiety
