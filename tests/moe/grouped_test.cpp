#include "moiety/moe/grouped.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "moe_tools.h"
#include "moiety/base/error.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

const auto kDouble = torch::TensorOptions(torch::kFloat64);

std::vector<int64_t> some_counts(int64_t experts) {
  std::vector<int64_t> counts;
  for (int64_t e = 0; e < experts; ++e) counts.push_back(*rc::gen::inRange<int64_t>(0, 5));
  return counts;
}

RC_GTEST_PROP(GroupedLinear, EqualsOneProductAnExpert, ()) {
  const auto experts = *rc::gen::inRange<int64_t>(1, 6);
  const auto counts = some_counts(experts);
  const bool with_bias = *rc::gen::arbitrary<bool>();
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  torch::manual_seed(7);
  auto x = torch::randn({rows, 4}, kDouble).requires_grad_(),
       w = torch::randn({experts, 3, 4}, kDouble).requires_grad_();
  auto b = with_bias ? torch::randn({experts, 3}, kDouble).requires_grad_() : torch::Tensor();
  const auto y = grouped_linear(x, w, b, counts);
  std::vector<torch::Tensor> pieces = {torch::zeros({0, 3}, kDouble)};
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t n = counts[static_cast<size_t>(e)];
    auto piece = x.narrow(0, begin, n).mm(w[e].t());
    if (with_bias) piece = piece + b[e];
    pieces.push_back(piece);
    begin += n;
  }
  const auto want = torch::cat(pieces);
  RC_ASSERT(torch::allclose(y, want, 1e-12, 1e-12));
  const auto grad = torch::randn_like(y);
  std::vector<torch::Tensor> inputs = {x, w};
  if (with_bias) inputs.push_back(b);
  const auto got = torch::autograd::grad({y}, inputs, {grad}), right = torch::autograd::grad({want}, inputs, {grad});
  for (size_t i = 0; i < got.size(); ++i) RC_ASSERT(torch::allclose(got[i], right[i], 1e-12, 1e-12));
}

RC_GTEST_PROP(GroupedSwiglu, EqualsTheLayerInParts, ()) {
  const auto experts = *rc::gen::inRange<int64_t>(1, 6), tokens = *rc::gen::inRange<int64_t>(1, 7);
  const auto slots = *rc::gen::inRange<int64_t>(1, experts + 1);
  torch::manual_seed(*rc::gen::arbitrary<uint16_t>());
  Routing r;
  r.experts = std::get<1>(torch::rand({tokens, experts}).topk(slots));
  r.experts = r.experts.masked_fill(torch::rand({tokens, slots}) < 0.3, -1);
  auto gates = torch::rand({tokens, slots}, kDouble).requires_grad_();
  r.gates = gates;
  auto x = torch::randn({tokens, 4}, kDouble).requires_grad_();
  auto g = torch::randn({experts, 3, 4}, kDouble).requires_grad_(),
       u = torch::randn({experts, 3, 4}, kDouble).requires_grad_(),
       d = torch::randn({experts, 4, 3}, kDouble).requires_grad_();
  const auto dispatch = Dispatch::of(r, experts);
  const auto fused = grouped_swiglu(x, dispatch.tokens, dispatch.gates, dispatch.counts, g, u, d);
  const auto rows = dispatch.gather(x);
  const auto h =
      torch::silu(grouped_linear(rows, g, {}, dispatch.counts)) * grouped_linear(rows, u, {}, dispatch.counts);
  const auto parts = dispatch.reduce(grouped_linear(h, d, {}, dispatch.counts), tokens);
  RC_ASSERT(torch::allclose(fused, parts, 1e-12, 1e-12));
  const auto grad = torch::randn_like(fused);
  const std::vector<torch::Tensor> inputs = {x, gates, g, u, d};
  const auto got = torch::autograd::grad({fused}, inputs, {grad}, /*retain_graph=*/true),
             right = torch::autograd::grad({parts}, inputs, {grad});
  for (size_t i = 0; i < got.size(); ++i) RC_ASSERT(torch::allclose(got[i], right[i], 1e-11, 1e-12));
}

TEST(GroupedSwiglu, GradientsEqualFiniteDifferences) {
  torch::manual_seed(3);
  const auto tokens = torch::tensor({0, 2, 1, 2}, torch::kInt64);
  const std::vector<int64_t> counts = {2, 0, 2};
  auto x = torch::randn({3, 4}, kDouble).requires_grad_(), gates = torch::rand({4}, kDouble).requires_grad_();
  auto g = torch::randn({3, 2, 4}, kDouble).requires_grad_(), u = torch::randn({3, 2, 4}, kDouble).requires_grad_(),
       d = torch::randn({3, 4, 2}, kDouble).requires_grad_();
  const auto weights = torch::randn({3, 4}, kDouble);
  const auto f = [&] { return (grouped_swiglu(x, tokens, gates, counts, g, u, d) * weights).sum(); };
  for (const auto& t : {x, gates, g, u, d}) EXPECT_LT(gradient_error(f, t), 1e-7);
}

// Enough pairs for the path that cuts the work into tasks, against the same layer in f64, which takes the other.
class SwigluTasks : public testing::TestWithParam<std::tuple<std::pair<torch::Dtype, torch::Dtype>, int>> {};

TEST_P(SwigluTasks, EqualTheLayerInDouble) {
  const auto [dtypes, threads] = GetParam();
  const auto [dtype, weight_dtype] = dtypes;
  const int before = at::get_num_threads();
  at::set_num_threads(threads);
  torch::manual_seed(11);
  const int64_t experts = 9, tokens = 300, hidden = 24, width = 40;
  auto choice = std::get<1>(torch::rand({tokens, experts}).topk(3));
  choice = choice.masked_fill(choice == 4, -1);  // an expert without tokens
  choice = choice.masked_fill((choice == 2) & (torch::arange(tokens).unsqueeze(1) > 3), -1);
  choice[7].fill_(-1);  // a token without experts
  std::vector<torch::Tensor> low, high;
  for (const auto& shape : std::vector<std::vector<int64_t>>{{tokens, hidden},
                                                             {tokens, 3},
                                                             {experts, width, hidden},
                                                             {experts, width, hidden},
                                                             {experts, hidden, width}}) {
    const auto type = shape[1] == 3 ? torch::kFloat32 : shape.size() == 3 ? weight_dtype : dtype;
    low.push_back((torch::randn(shape) * 0.4).to(type).requires_grad_());
    high.push_back(low.back().detach().to(torch::kFloat64).requires_grad_());
  }
  const auto weights = torch::randn({tokens, hidden}).to(dtype);
  const auto run = [&](const std::vector<torch::Tensor>& in) {
    Routing r;
    r.experts = choice;
    r.gates = in[1];
    const auto d = Dispatch::of(r, experts);
    EXPECT_EQ(d.counts[4], 0);
    const auto y = grouped_swiglu(in[0], d.tokens, d.gates, d.counts, in[2], in[3], in[4]);
    const auto loss = (y * weights.to(y.scalar_type())).sum();
    auto all = torch::autograd::grad({loss}, in, {}, /*retain_graph=*/true);
    const auto again = torch::autograd::grad({loss}, in, {}, /*retain_graph=*/true);
    for (size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(torch::equal(all[i], again[i])) << i;
    // Frozen experts: the gradients of the rest stay.
    auto frozen = in;
    for (size_t i = 2; i < 5; ++i) frozen[i] = in[i].detach();
    const auto z = grouped_swiglu(in[0], d.tokens, d.gates, d.counts, frozen[2], frozen[3], frozen[4]);
    const auto some = torch::autograd::grad({(z * weights.to(z.scalar_type())).sum()}, {in[0], in[1]});
    EXPECT_TRUE(torch::equal(some[0], all[0]) && torch::equal(some[1], all[1]));
    all.push_back(y.detach());
    return all;
  };
  const auto got = run(low), want = run(high);
  const double tolerance = dtype == torch::kFloat32 ? 1e-5 : 3e-2;
  for (size_t i = 0; i < got.size(); ++i) {
    if (i < low.size()) EXPECT_EQ(got[i].scalar_type(), low[i].scalar_type()) << i;
    const double scale = want[i].abs().max().item<double>();
    EXPECT_LT((got[i].to(torch::kFloat64) - want[i]).abs().max().item<double>(), tolerance * scale) << i;
  }
  at::set_num_threads(before);
}

INSTANTIATE_TEST_SUITE_P(All, SwigluTasks,
                         testing::Combine(testing::Values(std::pair{torch::kFloat32, torch::kFloat32},
                                                          std::pair{torch::kBFloat16, torch::kBFloat16},
                                                          std::pair{torch::kBFloat16, torch::kFloat32}),
                                          testing::Values(1, 3)));

// Few tokens and large matrices, without a graph: every matrix is read once, in any split of the experts.
class SwigluRows : public testing::TestWithParam<std::tuple<torch::Dtype, torch::Dtype, int64_t>> {};

TEST_P(SwigluRows, EqualTheLayerInDoubleInAnySplit) {
  const torch::NoGradGuard frozen;
  const auto dtype = std::get<0>(GetParam()), weight_dtype = std::get<1>(GetParam());
  const int64_t tokens = std::get<2>(GetParam());
  torch::manual_seed(12);
  const int64_t experts = 5, hidden = 512, width = 768;
  Routing r;
  r.experts = std::get<1>(torch::rand({tokens, experts}).topk(2));
  r.experts = r.experts.masked_fill(r.experts == 3, -1);
  r.gates = torch::rand({tokens, 2});
  const auto x = torch::randn({tokens, hidden}).to(dtype);
  // More tokens take matrices in their own type.
  const auto stored = tokens > 16 ? dtype : weight_dtype;
  const auto weights = [&](std::vector<int64_t> shape) { return (torch::randn(shape) * 0.05).to(stored); };
  const auto gate = weights({experts, width, hidden}), up = weights({experts, width, hidden}),
             down = weights({experts, hidden, width});
  const auto d = Dispatch::of(r, experts);
  const auto y = grouped_swiglu(x, d.tokens, d.gates, d.counts, gate, up, down);
  EXPECT_EQ(y.scalar_type(), dtype);
  const auto want = grouped_swiglu(x.to(torch::kFloat64), d.tokens, d.gates.to(torch::kFloat64), d.counts,
                                   gate.to(torch::kFloat64), up.to(torch::kFloat64), down.to(torch::kFloat64));
  const double most = dtype == torch::kFloat32 ? 1e-6 : 1e-2;
  EXPECT_LT((y.to(torch::kFloat64) - want).abs().max().item<double>(), most * want.abs().max().item<double>());

  std::vector<SwigluMatrices> matrices;
  for (int64_t e = 0; e < experts; ++e) matrices.push_back({gate[e], up[e], down[e]});
  std::vector<torch::Tensor> outputs;
  int64_t begin = 0;
  for (size_t e = 0; e < d.counts.size(); ++e) {  // one by one
    std::vector<int64_t> one(d.counts.size(), 0);
    one[e] = d.counts[e];
    outputs.push_back(swiglu_outputs(x, d.tokens.narrow(0, begin, one[e]), d.gates, one, d.counts, matrices));
    begin += one[e];
  }
  EXPECT_TRUE(torch::equal(swiglu_sum(x, torch::cat(outputs), d.tokens, d.gates, d.counts), y));
}

INSTANTIATE_TEST_SUITE_P(All, SwigluRows,
                         testing::Combine(testing::Values(torch::kFloat32, torch::kBFloat16),
                                          testing::Values(torch::kFloat32, torch::kBFloat16),
                                          testing::Values(1, 2, 16, 17)));

TEST(RunTasks, RunsAllAndPassesErrorsOn) {
  std::vector<int> runs(100, 0);
  run_tasks(100, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
  EXPECT_EQ(std::count(runs.begin(), runs.end(), 1), 100);
  EXPECT_THROW(run_tasks(10, [&](int64_t i) { check(i != 3, "task {}", i); }), Error);
}

TEST(TopK, OrdersAsAStableSort) {
  torch::manual_seed(2);
  auto scores = torch::randint(0, 5, {60, 33}).to(torch::kFloat32);  // many ties
  scores[3][5] = std::numeric_limits<float>::quiet_NaN();
  scores[4].fill_(std::numeric_limits<float>::quiet_NaN());
  scores[5].fill_(-std::numeric_limits<float>::infinity());
  const auto want = std::get<1>(at::sort(scores, /*stable=*/true, -1, /*descending=*/true));
  for (const int64_t k : {1, 2, 16, 33})
    for (const auto& s : {scores, scores.t().contiguous().t()})
      EXPECT_TRUE(torch::equal(top_k(s, k).second, want.narrow(1, 0, k))) << k;
}

TEST(GroupedLinear, BadCountsAreErrors) {
  const auto x = torch::zeros({3, 2}), w = torch::zeros({2, 4, 2});
  EXPECT_THROW(grouped_linear(x, w, {}, {1, 1}), Error);
  EXPECT_THROW(grouped_linear(x, w, {}, {3}), Error);
  EXPECT_THROW(grouped_linear(torch::zeros({3, 5}), w, {}, {1, 2}), Error);
}

TEST(Mixture, OneExpertEqualsTheDenseLayer) {
  torch::manual_seed(5);
  auto experts = gated_experts(1, 6, 5);
  TopKRouterOptions options;
  options.top_k = 1;
  Mixture mixture(std::make_shared<TopKRouter>(Linear(6, 1), options), experts);
  FeedForward dense{Linear(experts->gate->weight[0].detach()), Linear(experts->up->weight[0].detach()),
                    Linear(experts->down->weight[0].detach()), activation("silu")};
  const auto x = torch::randn({2, 7, 6});
  Pass pass;
  torch::NoGradGuard frozen;
  EXPECT_TRUE(torch::equal(mixture.forward(x, pass), dense.apply(x, pass)));
}

TEST(Mixture, PermutingExpertsAndRouterRowsChangesNothing) {
  torch::manual_seed(6);
  auto experts = gated_experts(5, 6, 4);
  Linear rows(6, 5);
  TopKRouterOptions options;
  options.top_k = 2;
  const auto order = torch::tensor({3, 0, 4, 1, 2}, torch::kInt64);
  const auto permuted = [&](const torch::Tensor& t) { return t.detach().index_select(0, order); };
  Mixture before(std::make_shared<TopKRouter>(rows, options), experts);
  Mixture after(std::make_shared<TopKRouter>(Linear(permuted(rows->weight)), options),
                std::make_shared<GatedExperts>(LinearStack(permuted(experts->gate->weight)),
                                               LinearStack(permuted(experts->up->weight)),
                                               LinearStack(permuted(experts->down->weight)), activation("silu")));
  const auto x = torch::randn({2, 9, 6});
  Pass pass;
  torch::NoGradGuard frozen;
  EXPECT_LT(distance(before.forward(x, pass), after.forward(x, pass)), 1e-6);
}

TEST(Mixture, CapacityDropsWhatLimitCapacityDrops) {
  torch::manual_seed(8);
  torch::NoGradGuard frozen;
  auto experts = gated_experts(4, 6, 3);
  TopKRouterOptions options;
  options.top_k = 2;
  auto router = std::make_shared<TopKRouter>(Linear(6, 4), options);
  Mixture layer(router, experts);
  layer.capacity_factor = 0.5;
  const auto x = torch::randn({1, 12, 6});
  Pass pass;
  const Routing r = limit_capacity(router->route(x[0], pass.at("ffn"), pass), 4, expert_capacity(12, 2, 4, 0.5));
  EXPECT_TRUE((r.experts < 0).any().item<bool>());
  EXPECT_LT(distance(layer.forward(x, pass)[0], experts->mix(x[0], Dispatch::of(r, 4))), 1e-6);
}

TEST(Mixture, JitterActsInTrainingOnly) {
  torch::manual_seed(9);
  torch::NoGradGuard frozen;
  TopKRouterOptions options;
  options.top_k = 2;
  Mixture layer(std::make_shared<TopKRouter>(Linear(6, 4), options), gated_experts(4, 6, 3));
  const auto x = torch::randn({1, 12, 6});
  Pass quiet, loud;
  loud.training = true;
  const auto plain = layer.forward(x, quiet);
  layer.jitter = 0.2;
  EXPECT_TRUE(torch::equal(layer.forward(x, quiet), plain));
  EXPECT_GT(distance(layer.forward(x, loud), plain), 1e-4);
}

TEST(LimitCapacity, TokensClaimPlacesInOrder) {
  Routing r;
  r.experts = torch::tensor({{0, 1}, {0, 2}, {1, 0}, {0, -1}}, torch::kInt64);
  r.gates = torch::tensor({{.6f, .4f}, {.7f, .3f}, {.5f, .5f}, {.9f, 0.f}});
  const Routing two = limit_capacity(r, 3, 2);
  EXPECT_TRUE(torch::equal(two.experts, torch::tensor({{0, 1}, {0, 2}, {1, -1}, {-1, -1}}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(two.gates, torch::tensor({{.6f, .4f}, {.7f, .3f}, {.5f, 0.f}, {0.f, 0.f}})));
  EXPECT_TRUE(torch::equal(limit_capacity(r, 3, 4).experts, r.experts));
  EXPECT_TRUE((limit_capacity(r, 3, 0).experts == -1).all().item<bool>());
  EXPECT_THROW(limit_capacity(r, 3, -1), Error);
}

RC_GTEST_PROP(LimitCapacity, KeptSetsShrinkWithTheCapacity, ()) {
  torch::manual_seed(*rc::gen::arbitrary<uint16_t>());
  const auto experts = *rc::gen::inRange<int64_t>(1, 5), tokens = *rc::gen::inRange<int64_t>(1, 12);
  Routing r;
  r.experts = torch::randint(-1, experts, {tokens, 2}, torch::kInt64);
  r.gates = torch::rand({tokens, 2});
  auto before = torch::zeros({tokens, 2}, torch::kBool);
  for (int64_t c = 0; c <= 2 * tokens; ++c) {
    const Routing kept = limit_capacity(r, experts, c);
    const auto used = kept.experts >= 0;
    RC_ASSERT((before & ~used).any().item<bool>() == false);
    const auto load = torch::bincount(kept.experts.masked_select(used), {}, experts);
    RC_ASSERT(load.max().item<int64_t>() <= c);
    before = used;
  }
  RC_ASSERT(torch::equal(before, r.experts >= 0));
}

}  // namespace
}  // namespace moiety
