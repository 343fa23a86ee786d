#include "moiety/compress/uncurl.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

#include "expert_tools.h"
#include "message_of.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

using torch::Tensor;

TEST(Uncurl, KeepsOneOfSoManyExperts) {
  EXPECT_EQ(uncurl_clusters(32, 4.0), 8);
  EXPECT_EQ(uncurl_clusters(10, 4.0), 3);  // 2.5
  EXPECT_EQ(uncurl_clusters(3, 8.0), 1);
  EXPECT_EQ(uncurl_clusters(7, 1.0), 7);
  EXPECT_NE(message_of([] { uncurl_clusters(8, 0.5); }).find("0.5"), std::string::npos);
}

/// Experts of one block resemble each other fully, others not at all.
Tensor blocks(const std::vector<int64_t>& block) {
  const auto b = torch::tensor(block);
  return b.unsqueeze(0).eq(b.unsqueeze(1)).to(torch::kFloat64);
}

RC_GTEST_PROP(SpectralClusters, FindBlocks, ()) {
  const int64_t experts = *rc::gen::inRange(2, 12), most = *rc::gen::inRange(1, static_cast<int>(experts) + 1);
  std::vector<int64_t> block;
  for (int64_t e = 0; e < experts; ++e) block.push_back(*rc::gen::inRange<int64_t>(0, most));
  // The same numbers by first appearance.
  std::vector<int64_t> number(static_cast<size_t>(most), -1), want;
  int64_t next = 0;
  for (const int64_t b : block) {
    auto& n = number[static_cast<size_t>(b)];
    if (n < 0) n = next++;
    want.push_back(n);
  }
  torch::manual_seed(*rc::gen::inRange(0, 1000));
  RC_ASSERT(list_of(spectral_clusters(blocks(block), torch::rand({experts}), next)) == want);
}

TEST(SpectralClusters, FindUnequalBlocksInNoise) {
  auto a = torch::full({6, 6}, 0.05, torch::kFloat64);
  for (const auto& [i, j] : std::vector<std::pair<int64_t, int64_t>>{{1, 2}, {3, 4}, {4, 5}, {3, 5}}) {
    a[i][j] = 0.9;
    a[j][i] = 0.9;
  }
  a.diagonal().fill_(1.0);
  const auto labels = list_of(spectral_clusters(a, torch::ones({6}), 3));
  EXPECT_EQ(labels, (std::vector<int64_t>{0, 1, 1, 2, 2, 2}));
}

TEST(SpectralClusters, AllOrOneAreWhatTheySay) {
  torch::manual_seed(1);
  const auto affinity = cosine_affinity(logit_gram(torch::randn({40, 6})));
  const auto usage = torch::rand({6});
  EXPECT_EQ(list_of(spectral_clusters(affinity, usage, 6)), (std::vector<int64_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(list_of(spectral_clusters(affinity, usage, 1)), (std::vector<int64_t>(6, 0)));
}

TEST(SpectralClusters, FollowPermutedExperts) {
  torch::manual_seed(2);
  const auto logits = torch::randn({60, 9});
  const auto usage = torch::softmax(torch::randn({9}), 0);
  const auto order = torch::tensor(random_order(9, 1));
  const auto labels = spectral_clusters(cosine_affinity(logit_gram(logits)), usage, 4);
  const auto moved =
      spectral_clusters(cosine_affinity(logit_gram(logits.index_select(1, order))), usage.index_select(0, order), 4);
  const auto l = labels.index_select(0, order);
  EXPECT_TRUE(torch::equal(l.unsqueeze(0).eq(l.unsqueeze(1)), moved.unsqueeze(0).eq(moved.unsqueeze(1))));
  // Numbered by the first expert of each.
  EXPECT_EQ(moved[0].item<int64_t>(), 0);
}

TEST(SpectralClusters, BadInputIsAnError) {
  const auto a = torch::eye(3), u = torch::ones({3});
  EXPECT_NE(message_of([&] { spectral_clusters(a, u, 0); }).find("1 to 3 are possible"), std::string::npos);
  EXPECT_THROW(spectral_clusters(a, u, 4), Error);
  EXPECT_NE(message_of([&] { spectral_clusters(torch::rand({3, 2}), u, 2); }).find("no square"), std::string::npos);
  EXPECT_NE(message_of([&] {
              spectral_clusters(a + torch::rand({3, 3}), u, 2);
            }).find("not symmetric"),
            std::string::npos);
  EXPECT_NE(message_of([&] { spectral_clusters(a, torch::ones({2}), 2); }).find("2 uses for 3 experts"),
            std::string::npos);
  EXPECT_NE(message_of([&] { spectral_clusters(a * NAN, u, 2); }).find("finite"), std::string::npos);
}

TEST(UncurlMerge, EveryExpertAloneIsItself) {
  torch::manual_seed(3);
  const auto experts = random_experts(3, 5, 4);
  const auto router = torch::randn({3, 4});
  const auto merged = uncurl_merge(experts, router, torch::tensor({0, 1, 2}), torch::tensor({0.5, 0.0, 0.5}));
  for (size_t e = 0; e < 3; ++e) EXPECT_EQ(distance(merged.experts[e], experts[e]), 0.0);
  EXPECT_EQ(distance(merged.router, router), 0.0);
}

TEST(UncurlMerge, AlignsToTheMostUsedAndWeighsByUse) {
  for (const bool gated : {true, false}) {
    torch::manual_seed(4);
    const auto base = random_expert(9, 5, gated);
    std::vector<ExpertWeights> experts;
    for (uint64_t e = 0; e < 3; ++e) experts.push_back(with_neurons(noisy(base, 0.05), random_order(9, e + 1)));
    const auto router = torch::randn({3, 5});
    const auto usage = torch::tensor({0.2, 0.5, 0.3});
    const auto merged = uncurl_merge(experts, router, torch::tensor({0, 0, 0}), usage);
    EXPECT_TRUE(torch::equal(merged.order[1], torch::arange(9)));
    const auto a = with_neurons(experts[0], list_of(merged.order[0])),
               c = with_neurons(experts[2], list_of(merged.order[2]));
    EXPECT_LT(distance(a, experts[1]), 0.5);
    EXPECT_LT(distance(c, experts[1]), 0.5);
    EXPECT_LT(distance(merged.experts[0].down, 0.2 * a.down + 0.5 * experts[1].down + 0.3 * c.down), 1e-6);
    EXPECT_LT(distance(merged.experts[0].up, 0.2 * a.up + 0.5 * experts[1].up + 0.3 * c.up), 1e-6);
    EXPECT_LT(distance(merged.router[0], 0.2 * router[0] + 0.5 * router[1] + 0.3 * router[2]), 1e-6);
    EXPECT_EQ(merged.experts[0].gate.defined(), gated);
  }
}

TEST(UncurlMerge, WithoutAlignmentAveragesAsTheyStand) {
  torch::manual_seed(5);
  const auto experts = random_experts(2, 5, 4);
  const auto merged = uncurl_merge(experts, {}, torch::tensor({0, 0}), torch::tensor({0.25, 0.75}), false);
  EXPECT_LT(distance(merged.experts[0].gate, 0.25 * experts[0].gate + 0.75 * experts[1].gate), 1e-6);
  EXPECT_FALSE(merged.router.defined());
}

TEST(UncurlMerge, ClustersThatWereNeverUsedArePlainMeans) {
  torch::manual_seed(6);
  auto experts = random_experts(3, 6, 4);
  experts[2] = with_neurons(experts[1], random_order(6, 1));
  const auto router = torch::randn({3, 4});
  const auto merged = uncurl_merge(experts, router, torch::tensor({0, 1, 1}), torch::tensor({1.0, 0.0, 0.0}));
  // The first of the cluster is the reference.
  EXPECT_LT(distance(merged.experts[1], experts[1]), 1e-6);
  EXPECT_LT(distance(merged.router[1], (router[1] + router[2]) / 2), 1e-6);
}

TEST(UncurlMerge, OtherClustersDoNotMatter) {
  torch::manual_seed(7);
  auto experts = random_experts(4, 5, 4);
  const auto labels = torch::tensor({0, 1, 0, 1});
  const auto usage = torch::tensor({0.1, 0.2, 0.3, 0.4});
  const auto before = uncurl_merge(experts, {}, labels, usage);
  experts[1] = random_expert(5, 4);
  EXPECT_EQ(distance(uncurl_merge(experts, {}, labels, usage).experts[0], before.experts[0]), 0.0);
}

TEST(UncurlMerge, BadInputIsAnError) {
  torch::manual_seed(8);
  const auto experts = random_experts(2, 5, 4);
  const auto use = torch::ones({2});
  EXPECT_NE(message_of([&] { uncurl_merge(experts, {}, torch::tensor({0}), use); }).find("1 labels for 2 experts"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              uncurl_merge(experts, torch::ones({3, 4}), torch::tensor({0, 0}), use);
            }).find("router"),
            std::string::npos);
  EXPECT_THROW(uncurl_merge(experts, {}, torch::tensor({0, 0}), -use), Error);
}

// The whole mixture, expert by expert.
Tensor plain_mixture(const Tensor& x, const Tensor& router, const std::vector<ExpertWeights>& experts, int64_t k,
                     bool normalize) {
  const auto scores = torch::softmax(torch::matmul(x, router.t()), -1);
  auto [gates, chosen] = top_k(scores, k);
  if (normalize) gates = gates / gates.sum(-1, true);
  auto y = torch::zeros_like(x);
  for (int64_t t = 0; t < x.size(0); ++t)
    for (int64_t i = 0; i < k; ++i)
      y[t] += gates[t][i] * output_of(experts[static_cast<size_t>(chosen[t][i].item<int64_t>())], x[t].unsqueeze(0))[0];
  return y;
}

TEST(RouteAliases, OfCopiesAreTheWholeMixture) {
  torch::manual_seed(9);
  const auto two = random_experts(2, 6, 5);
  std::vector<ExpertWeights> four = {two[0], two[1], with_neurons(two[0], random_order(6, 1)),
                                     with_neurons(two[1], random_order(6, 2))};
  const auto labels = torch::tensor({0, 1, 0, 1});
  const auto usage = torch::tensor({0.4, 0.3, 0.2, 0.1});
  const auto merged = uncurl_merge(four, {}, labels, usage);
  const auto x = torch::randn({11, 5}), router = torch::randn({4, 5});
  for (const bool normalize : {true, false}) {
    const auto mixed = route_aliases(x, router, labels, merged.experts, 3, normalize);
    EXPECT_LT(distance(mixed.y, plain_mixture(x, router, four, 3, normalize)), 1e-5);
    if (normalize) {
      EXPECT_LT(distance(mixed.weights.sum(1), torch::ones({11})), 1e-6);
    }
    // Three choices among aliases of two experts: each token meets both once.
    EXPECT_EQ(mixed.calls, 22);
  }
}

TEST(RouteAliases, OneClusterIsADenseLayerScaledByItsWeights) {
  torch::manual_seed(10);
  const auto e = random_expert(6, 5);
  const auto x = torch::randn({7, 5}), router = torch::randn({4, 5});
  const auto mixed = route_aliases(x, router, torch::zeros({4}, torch::kInt64), {e}, 2, false);
  const auto sums = top_k(torch::softmax(torch::matmul(x, router.t()), -1), 2).first.sum(1, true);
  EXPECT_LT(distance(mixed.y, sums * output_of(e, x)), 1e-5);
  EXPECT_EQ(mixed.calls, 7);
}

TEST(RouteAliases, ThatDoNotFitAreAnError) {
  torch::manual_seed(11);
  const auto x = torch::randn({3, 5}), router = torch::randn({4, 5});
  const auto experts = random_experts(2, 6, 5);
  EXPECT_NE(message_of([&] {
              route_aliases(x, router, torch::tensor({0, 1}), experts, 2, true);
            }).find("2 labels for 4 rows"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              route_aliases(x, router, torch::tensor({0, 0, 0, 0}), experts, 2, true);
            }).find("another number of experts"),
            std::string::npos);
  EXPECT_THROW(route_aliases(x, router, torch::tensor({0, 1, 0, 1}), experts, 5, true), Error);
}

TEST(Uncurl, IsRegistered) {
  EXPECT_EQ(get_method("transform", "uncurl").paper.arxiv, "2409.01483");
}

}  // namespace
}  // namespace moiety
