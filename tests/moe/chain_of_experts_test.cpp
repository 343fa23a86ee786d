#include "moiety/moe/chain_of_experts.h"

#include <gtest/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

constexpr int64_t kHidden = 6, kWidth = 4;

ChainOfExpertsConfig small(int64_t rounds, bool inner, bool outer) {
  ChainOfExpertsConfig c;
  c.rounds = rounds;
  c.experts = 5;
  c.top_k = 2;
  c.shared = 1;
  c.inner_residual = inner;
  c.outer_residual = outer;
  return c;
}

struct Pieces {
  std::shared_ptr<RmsNorm> norm = std::make_shared<RmsNorm>(torch::rand({kHidden}) + 0.5, 1e-6);
  std::shared_ptr<GatedExperts> experts = gated_experts(5, kHidden, kWidth);
  std::shared_ptr<FeedForward> shared = std::make_shared<FeedForward>(Linear(kHidden, kWidth), Linear(kHidden, kWidth),
                                                                      Linear(kWidth, kHidden), activation("silu"));
  std::vector<Linear> rows = {Linear(kHidden, 5), Linear(kHidden, 5)};

  ChainOfExperts chain(const ChainOfExpertsConfig& c, std::vector<size_t> which) {
    std::vector<std::shared_ptr<Router>> routers;
    for (const size_t i : which) routers.push_back(chain_router(rows[i], c));
    return ChainOfExperts(norm, routers, experts, shared, c);
  }
};

TEST(ChainOfExperts, OneRoundWithAnOuterResidualIsAnOrdinaryBlock) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  Pieces p;
  const auto config = small(1, false, true);
  auto chain = p.chain(config, {0});
  Mixture ordinary(chain_router(p.rows[0], config), p.experts, p.shared);
  const auto x = torch::randn({2, 5, kHidden});
  Pass a, b;
  EXPECT_LT(distance(chain.forward(x, a), x + ordinary.forward(p.norm->forward(x), b)), 1e-6);
}

TEST(ChainOfExperts, OneRouterForAllRoundsEqualsEqualRouters) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  Pieces p;
  auto shared = small(2, true, false);
  shared.per_round_router = false;
  auto one = p.chain(shared, {0});
  auto two = p.chain(small(2, true, false), {0, 0});
  const auto x = torch::randn({1, 5, kHidden});
  Pass a, b;
  EXPECT_TRUE(torch::equal(one.forward(x, a), two.forward(x, b)));
}

TEST(ChainOfExperts, SilentExpertsLeaveTheNormedInput) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  Pieces p;
  p.experts->down->weight.zero_();
  p.shared->down->weight.zero_();
  const auto x = torch::randn({1, 5, kHidden});
  Pass a, b;
  EXPECT_LT(distance(p.chain(small(2, true, false), {0, 1}).forward(x, a), p.norm->forward(x)), 1e-6);
  EXPECT_LT(distance(p.chain(small(2, true, true), {0, 1}).forward(x, b), p.norm->forward(x) + x), 1e-6);
}

TEST(ChainOfExperts, EveryRoundsRouterLearnsAndIsReportedApart) {
  torch::manual_seed(4);
  Pieces p;
  auto chain = p.chain(small(2, true, false), {0, 1});
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  pass.training = true;
  const auto y = chain.forward(torch::randn({2, 5, kHidden}), pass);
  y.square().sum().backward({}, true);
  for (const Linear& rows : p.rows) EXPECT_GT(rows->weight.grad().abs().max().item<double>(), 1e-6);
  ASSERT_EQ(trace.records.size(), 2u);
  EXPECT_EQ(trace.records[0].site.round, 0);
  EXPECT_EQ(trace.records[1].site.round, 1);
  EXPECT_EQ(pass.losses.size(), 2u);
  EXPECT_EQ(pass.round, 0);
}

TEST(ChainOfExperts, LaterRoundsSeeWhatEarlierOnesDid) {
  torch::manual_seed(5);
  torch::NoGradGuard frozen;
  Pieces p;
  auto chain = p.chain(small(2, true, false), {0, 1});
  const auto x = torch::randn({1, 9, kHidden});
  const auto second_logits = [&] {
    Trace trace;
    Pass pass;
    pass.trace = &trace;
    chain.forward(x, pass);
    return trace.records[1].routing.logits;
  };
  const auto before = second_logits();
  p.rows[0]->weight.add_(torch::randn_like(p.rows[0]->weight));
  EXPECT_GT(distance(before, second_logits()), 1e-4);
}

TEST(ChainOfExperts, ScalingFactorAndNormalizationExclude) {
  torch::manual_seed(6);
  auto config = small(1, true, false);
  config.routed_scaling_factor = 3.0;
  const auto x = torch::randn({4, kHidden});
  Linear rows(kHidden, 5);
  Pass pass;
  const Routing raw = chain_router(rows, config)->route(x, pass.at("ffn"), pass);
  EXPECT_LT(distance(raw.gates, 3.0 * raw.scores.gather(1, raw.experts)), 1e-6);
  config.norm_topk_prob = true;
  EXPECT_LT(distance(chain_router(rows, config)->route(x, pass.at("ffn"), pass).gates.sum(-1), torch::ones({4})), 1e-6);
  config.top_k = 1;  // one expert a token keeps its raw gate, scaled
  const Routing one = chain_router(rows, config)->route(x, pass.at("ffn"), pass);
  EXPECT_LT(distance(one.gates, 3.0 * one.scores.gather(1, one.experts)), 1e-6);
}

TEST(ChainOfExperts, GroupsLimitTheChoice) {
  auto config = small(1, true, false);
  config.experts = 6;
  config.groups = 3;
  config.top_groups = 1;
  config.top_k = 2;
  Linear rows(torch::tensor({{0.9f}, {-1.f}, {1.f}, {-2.f}, {0.8f}, {0.7f}}));
  Pass pass;
  // The best expert is 2, so that the choice is among 2 and 3, although 0 has more than 3.
  const Routing r = chain_router(rows, config)->route(torch::ones({1, 1}), pass.at("ffn"), pass);
  EXPECT_TRUE(r.experts.equal(torch::tensor({{2, 3}})));
  EXPECT_LT(distance(r.gates, r.scores.gather(1, r.experts)), 1e-6);
  const auto problem = [&](int64_t groups, int64_t top_groups, int64_t top_k) {
    config.groups = groups;
    config.top_groups = top_groups;
    config.top_k = top_k;
    return config.problem();
  };
  EXPECT_EQ(problem(3, 1, 2), "");
  EXPECT_NE(problem(4, 1, 1).find("divisible"), std::string::npos);
  EXPECT_NE(problem(3, 4, 1).find("1 to 3"), std::string::npos);
  EXPECT_NE(problem(3, 1, 3).find("hold 2 experts"), std::string::npos);
  EXPECT_NE(problem(0, 1, 1).find("no `groups`"), std::string::npos);
}

TEST(ChainOfExperts, WrongNumbersOfRoutersAreErrors) {
  Pieces p;
  EXPECT_THROW(p.chain(small(2, true, false), {0}), Error);
  EXPECT_THROW(p.chain(small(1, true, false), {0, 1}), Error);
  EXPECT_THROW(parse<ChainOfExpertsConfig>({{"rounds", 0}}, "run.yaml"), Error);
  EXPECT_THROW(parse<ChainOfExpertsConfig>({{"experts", 3}}, "run.yaml"), Error);
}

}  // namespace
}  // namespace moiety
