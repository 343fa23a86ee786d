#include "moiety/moe/mixture.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

constexpr int64_t kTokens = 13, kHidden = 6, kWidth = 5;

std::shared_ptr<GatedExperts> random_experts(int64_t count) {
  return std::make_shared<GatedExperts>(LinearStack(count, kHidden, kWidth), LinearStack(count, kHidden, kWidth),
                                        LinearStack(count, kWidth, kHidden), activation("silu"));
}

// The layer written as the definition says: every token, every chosen expert, one after the other.
torch::Tensor naive(GatedExperts& e, const torch::Tensor& x, const Routing& r) {
  auto y = torch::zeros_like(x);
  for (int64_t n = 0; n < x.size(0); ++n)
    for (int64_t k = 0; k < r.experts.size(1); ++k) {
      const int64_t i = r.experts[n][k].item<int64_t>();
      if (i < 0) continue;
      const auto row = x.slice(0, n, n + 1);
      const auto h = torch::silu(at::linear(row, e.gate->weight[i])) * at::linear(row, e.up->weight[i]);
      y[n] += r.gates[n][k] * at::linear(h, e.down->weight[i])[0];
    }
  return y;
}

Routing random_routing(int64_t experts, int64_t k) {
  Routing r;
  r.experts = std::get<1>(torch::rand({kTokens, experts}).sort(1)).narrow(1, 0, k).contiguous();
  r.gates = torch::rand({kTokens, k});
  return r;
}

TEST(TopK, LowestIndexWinsTies) {
  const auto [values, indices] = top_k(torch::tensor({{1.0, 3.0, 3.0, 0.0, 3.0}}), 2);
  EXPECT_TRUE(torch::equal(indices, torch::tensor({{1, 2}}, torch::kInt64)));
  EXPECT_THROW(top_k(torch::zeros({2, 3}), 4), Error);
}

TEST(Dispatch, EqualsTheNaiveLoop) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  auto experts = random_experts(7);
  const auto x = torch::randn({kTokens, kHidden});
  const Routing r = random_routing(7, 3);
  const auto d = Dispatch::of(r, 7);
  const auto y = d.reduce(experts->forward(d.gather(x), d.counts), kTokens);
  EXPECT_LT((y - naive(*experts, x, r)).abs().max().item<double>(), 1e-5);
}

TEST(Dispatch, UnusedSlotsCostNothing) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  auto experts = random_experts(4);
  const auto x = torch::randn({kTokens, kHidden});
  Routing r = random_routing(4, 2);
  r.experts.index_put_({torch::tensor({0, 5}), torch::tensor({1, 0})}, -1);
  r.experts[7].fill_(-1);
  const auto d = Dispatch::of(r, 4);
  EXPECT_EQ(d.tokens.numel(), 2 * kTokens - 4);
  const auto y = d.reduce(experts->forward(d.gather(x), d.counts), kTokens);
  EXPECT_LT((y - naive(*experts, x, r)).abs().max().item<double>(), 1e-5);
  EXPECT_EQ(y[7].abs().max().item<double>(), 0.0);
}

TEST(Dispatch, AliasedExpertsAreJoinedAndTheirGatesSummed) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  auto experts = random_experts(2);
  const auto x = torch::randn({kTokens, kHidden});
  const Routing r = random_routing(4, 3);
  const auto map = torch::tensor({0, 1, 1, 0}, torch::kInt64);
  const auto d = Dispatch::of(r, 2, map);
  Routing plain = r;
  plain.experts = map.index({r.experts});
  const auto y = d.reduce(experts->forward(d.gather(x), d.counts), kTokens);
  EXPECT_LT((y - naive(*experts, x, plain)).abs().max().item<double>(), 1e-5);
  EXPECT_LE(d.tokens.numel(), 2 * kTokens);
}

TEST(Mixture, OneExpertIsTheDenseLayer) {
  torch::manual_seed(4);
  torch::NoGradGuard frozen;
  auto experts = random_experts(1);
  Mixture mixture(std::make_shared<TopKRouter>(Linear(kHidden, 1), TopKRouterOptions{.top_k = 1}), experts);
  FeedForward dense(Linear(experts->gate->weight[0]), Linear(experts->up->weight[0]), Linear(experts->down->weight[0]),
                    activation("silu"));
  const auto x = torch::randn({2, 5, kHidden});
  Pass pass;
  EXPECT_TRUE(torch::equal(mixture.forward(x, pass), dense.forward(x, pass)));
}

TEST(Mixture, GradientsMatchFiniteDifferences) {
  torch::manual_seed(5);
  auto experts = random_experts(4);
  auto router = std::make_shared<TopKRouter>(Linear(kHidden, 4), TopKRouterOptions{.top_k = 2, .normalize = true});
  Mixture mixture(router, experts);
  auto x = torch::randn({1, 3, kHidden}).requires_grad_(true);
  const auto loss = [&] {
    Pass pass;
    return mixture.forward(x, pass).square().sum();
  };
  loss().backward();
  for (auto& t : {x, router->projection->weight, experts->gate->weight, experts->down->weight}) {
    ASSERT_TRUE(t.grad().defined());
    const auto direction = torch::randn_like(t);
    const double step = 1e-3, analytic = (t.grad() * direction).sum().item<double>();
    torch::NoGradGuard frozen;
    const auto kept = t.detach().clone();
    t.detach().copy_(kept + step * direction);
    const double up = loss().item<double>();
    t.detach().copy_(kept - step * direction);
    const double down = loss().item<double>();
    t.detach().copy_(kept);
    // f32 and a central difference: a percent of the slope, plus its rounding.
    EXPECT_NEAR((up - down) / (2 * step), analytic, 0.02 * std::abs(analytic) + 0.02);
  }
}

struct Force : Edit {
  void choice(const Site&, const Pass&, Routing& r) override {
    r.experts.fill_(2);
    r.gates.fill_(0.5);
  }
};

TEST(Mixture, EditsChangeTheChoiceAndTheTraceShowsIt) {
  torch::manual_seed(6);
  torch::NoGradGuard frozen;
  auto experts = random_experts(3);
  Mixture mixture(std::make_shared<TopKRouter>(Linear(kHidden, 3), TopKRouterOptions{.top_k = 1}), experts);
  const auto x = torch::randn({1, 4, kHidden});
  Trace trace;
  trace.keep_inputs = true;
  Pass pass;
  pass.block = 9;
  pass.trace = &trace;
  pass.edits = {std::make_shared<Force>()};
  const auto y = mixture.forward(x, pass);
  Pass plain;
  FeedForward dense(Linear(experts->gate->weight[2]), Linear(experts->up->weight[2]), Linear(experts->down->weight[2]),
                    activation("silu"));
  EXPECT_LT((y - 0.5 * dense.forward(x, plain)).abs().max().item<double>(), 1e-6);
  ASSERT_EQ(trace.records.size(), 1u);
  EXPECT_EQ(trace.records[0].site.block, 9);
  EXPECT_EQ(trace.records[0].routing.experts.min().item<int64_t>(), 2);
  EXPECT_TRUE(torch::equal(trace.records[0].input, x[0]));
}

}  // namespace
}  // namespace moiety
