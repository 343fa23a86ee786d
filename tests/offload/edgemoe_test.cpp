#include "moiety/offload/edgemoe.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <numeric>

#include "message_of.h"
#include "moiety/base/random.h"

namespace moiety {
namespace {

using Trace = std::vector<int64_t>;

// Tokens whose next layer depends on the two before it.
Trace skewed(int64_t tokens, int64_t layers, int64_t experts, uint64_t seed) {
  RandomStream random(seed, "trace");
  Trace t;
  for (int64_t i = 0; i < tokens; ++i) {
    int64_t a = 0, b = 0;
    for (int64_t n = 0; n < layers; ++n) {
      const auto free = static_cast<int64_t>(random.below(static_cast<uint64_t>(experts)));
      const int64_t e = n < 2 || random.chance(0.1) ? free : (3 * a + 5 * b + n) % experts;
      t.push_back(e);
      a = b;
      b = e;
    }
  }
  return t;
}

TEST(ExpertPaths, CountsWhatFollowsTwoStates) {
  // Layers 0, 1, 2 of five tokens.
  const ExpertPaths p(Trace{0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 1, 1, 2, 0, 0}, 3, 1, 3);
  EXPECT_EQ(p.probability(2, {0}, {1}), (std::vector<double>{1.0 / 3, 0, 2.0 / 3}));
  EXPECT_EQ(p.probability(2, {1}, {1}), (std::vector<double>{0, 1, 0}));
  // The pair (2, 1) was never seen: after 1 alone.
  EXPECT_EQ(p.probability(2, {2}, {1}), (std::vector<double>{0.25, 0.25, 0.5}));
  // Neither was 2 in layer 1: how often at all.
  EXPECT_EQ(p.probability(2, {0}, {2}), (std::vector<double>{0.4, 0.2, 0.4}));
  EXPECT_EQ(p.probability(0, {}, {}), (std::vector<double>{0.6, 0.2, 0.2}));
  EXPECT_EQ(p.probability(1, {}, {1}), (std::vector<double>{0, 1, 0}));
  EXPECT_EQ(p.frequency(), (std::vector<int64_t>{3, 1, 1, 1, 4, 0, 2, 1, 2}));
}

TEST(ExpertPaths, StatesAreSetsAndKnowTheirLayer) {
  // Two experts a token; the order in which a router names them says nothing.
  const ExpertPaths p(Trace{0, 1, 2, 3, 1, 2, /**/ 1, 0, 3, 2, 3, 1}, 3, 2, 4);
  EXPECT_EQ(p.probability(2, {0, 1}, {2, 3}), (std::vector<double>{0, 1, 0.5, 0.5}));
  EXPECT_EQ(expert_set(std::vector<int64_t>{3, -1, 1, 3}), (ExpertSet{1, 3}));
  // The same states, asked one layer later, have not been seen there.
  const ExpertPaths q(Trace{0, 1, 2, 0, /**/ 0, 1, 2, 0}, 4, 1, 3);
  EXPECT_EQ(q.probability(2, {0}, {1}), (std::vector<double>{0, 0, 1}));
  EXPECT_EQ(q.probability(3, {0}, {1}), (std::vector<double>{1, 0, 0}));  // back-off to the layer's frequencies
}

RC_GTEST_PROP(ExpertPaths, ProbabilitiesSumToTheExpertsOfAToken, ()) {
  const auto k = *rc::gen::inRange<int64_t>(1, 4), experts = *rc::gen::inRange<int64_t>(4, 9);
  RandomStream random(*rc::gen::arbitrary<uint64_t>(), "t");
  Trace t;
  for (int i = 0; i < 20 * 3; ++i)
    for (const int64_t e : random.sample(experts, k)) t.push_back(e);
  const ExpertPaths p(t, 3, k, experts);
  for (int64_t n = 0; n < 3; ++n) {
    const auto probability =
        p.probability(n, expert_set(random.sample(experts, k)), expert_set(random.sample(experts, k)));
    RC_ASSERT(std::abs(std::accumulate(probability.begin(), probability.end(), 0.0) - static_cast<double>(k)) < 1e-9);
  }
}

TEST(ExpertPaths, RefusesTracesThatCannotBe) {
  EXPECT_NE(message_of([] { ExpertPaths(Trace{0, 3}, 2, 1, 3); }).find("no expert 3"), std::string::npos);
  EXPECT_NE(message_of([] { ExpertPaths(Trace{0, -2}, 2, 1, 3); }), "");
  EXPECT_NE(message_of([] { ExpertPaths(Trace{0, 1, 2}, 2, 1, 3); }), "");
  EXPECT_NE(message_of([] { ExpertPaths(Trace{}, 2, 1, 3); }), "");
}

TEST(Eviction, CountsLayersAheadAndWraps) {
  EXPECT_EQ(layers_ahead(5, 4, 6), 1);
  EXPECT_EQ(layers_ahead(3, 4, 6), 5);  // just passed: farthest but the running one
  EXPECT_EQ(layers_ahead(4, 4, 6), 6);
  EXPECT_EQ(layers_ahead(3, 4, 6, true), 1);  // as printed: what has just been used counts as near
  EXPECT_EQ(layers_ahead(5, 4, 6, true), 5);
  EXPECT_EQ(layers_ahead(4, 4, 6, true), 6);
}

ExpertBuffer filled(int64_t layers, int64_t experts, std::vector<int64_t> frequency, EdgeMoeEviction evict = {}) {
  ExpertBuffer b(layers, experts, layers * experts, std::move(frequency), std::move(evict));
  for (int64_t x = 0; x < layers * experts; ++x) b.insert(x, 0);
  return b;
}

TEST(Eviction, EqualFrequenciesGiveUpTheLayerJustPassed) {
  auto b = filled(4, 2, std::vector<int64_t>(8, 5));
  for (int64_t x = 4; x < 6; ++x) b.pin(x);  // layer 2 runs
  EXPECT_EQ(*b.victim(2) / 2, 1);
  auto printed = filled(4, 2, std::vector<int64_t>(8, 5), {.distance = "printed"});
  for (int64_t x = 4; x < 6; ++x) printed.pin(x);
  EXPECT_EQ(*printed.victim(2) / 2, 3);  // the one that comes next
}

TEST(Eviction, EqualDistancesAreLeastFrequentlyUsed) {
  const auto b = filled(1, 4, {7, 3, 9, 3});
  EXPECT_EQ(*b.victim(0), 1);
}

TEST(Eviction, ZeroFrequenciesLeaveFirstTheFarthestOfThem) {
  const auto b = filled(3, 2, {0, 9, 0, 9, 0, 9});
  EXPECT_EQ(*b.victim(0), 0);  // D = 3
  EXPECT_EQ(*b.victim(1), 2);
}

TEST(Eviction, PinnedExpertsStay) {
  auto b = filled(2, 1, {0, 5});
  b.pin(0);
  EXPECT_EQ(*b.victim(0), 1);
  b.pin(1);
  EXPECT_FALSE(b.victim(0).has_value());
}

struct Replayed {
  EdgeMoeReplay r;
  int64_t pairs = 0;
};

Replayed replayed(const Trace& profile, const Trace& run, int64_t layers, int64_t slots, int64_t experts,
                  int64_t capacity, int64_t preload) {
  const ExpertPaths paths(profile, layers, slots, experts);
  ExpertBuffer buffer(layers, experts, capacity, paths.frequency());
  return {replay_edgemoe(
              run, layers, slots, experts,
              [&](int64_t n, const ExpertSet& a, const ExpertSet& b) { return paths.probability(n, a, b); }, buffer,
              preload),
          static_cast<int64_t>(run.size())};
}

RC_GTEST_PROP(EdgeMoeReplay, CountsEveryUseOnce, ()) {
  const auto capacity = *rc::gen::inRange<int64_t>(3, 45), preload = *rc::gen::inRange<int64_t>(0, 4);
  const auto x =
      replayed(skewed(60, 5, 8, 1), skewed(30, 5, 8, *rc::gen::arbitrary<uint64_t>()), 5, 1, 8, capacity, preload);
  RC_ASSERT(x.r.hits + x.r.demand == x.pairs);
  RC_ASSERT(std::count(x.r.cached.begin(), x.r.cached.end(), true) <= capacity);
  RC_ASSERT(x.r.preloads_used <= x.r.preloads);
}

TEST(EdgeMoeReplay, ABufferForAllReadsEveryExpertOnce) {
  const Trace t = skewed(200, 4, 6, 3);
  const auto x = replayed(t, t, 4, 1, 6, 24, 2);
  EXPECT_LE(x.r.demand + x.r.preloads, 24);
  EXPECT_EQ(x.r.demand + x.r.preloads, std::count(x.r.cached.begin(), x.r.cached.end(), true));
}

TEST(EdgeMoeReplay, PerfectPredictionReadsOnDemandInTheFirstLayerOnly) {
  const Trace t = skewed(50, 4, 6, 5);
  ExpertBuffer buffer(4, 6, 3, std::vector<int64_t>(24, 1));
  size_t at = 0;  // layer 0 of the first token cannot be foreseen; from then on the future is known
  const auto r = replay_edgemoe(
      t, 4, 1, 6,
      [&](int64_t, const ExpertSet&, const ExpertSet&) {
        std::vector<double> p(6);
        if (at > 0) p[static_cast<size_t>(t[at])] = 1.0;
        ++at;
        return p;
      },
      buffer, 1);
  EXPECT_EQ(r.demand, 1);
  EXPECT_EQ(r.preloads_used, r.preloads);
}

TEST(EdgeMoeReplay, PathsForeseeMoreThanFrequencies) {
  const Trace profile = skewed(2000, 5, 8, 1), run = skewed(300, 5, 8, 2);
  const ExpertPaths paths(profile, 5, 1, 8);
  const auto used = [&](const EdgeMoeSteps::Predictor& predictor) {
    ExpertBuffer buffer(5, 8, 6, paths.frequency());
    return replay_edgemoe(run, 5, 1, 8, predictor, buffer, 1).preloads_used;
  };
  const auto two = used([&](int64_t n, const ExpertSet& a, const ExpertSet& b) { return paths.probability(n, a, b); });
  const auto one =
      used([&](int64_t n, const ExpertSet&, const ExpertSet& b) { return paths.probability_of_one(n, b); });
  const auto none = used([&](int64_t n, const ExpertSet&, const ExpertSet&) { return paths.share(n); });
  EXPECT_GT(two, 2 * one);
  EXPECT_GT(two, 2 * none);
}

TEST(EdgeMoeReplay, PreloadsDoNotEvictEachOtherNorTheRunningLayer) {
  // Two places: the running layer's expert takes one, the first preload the other, the second finds none.
  ExpertBuffer buffer(2, 3, 2, {1, 1, 1, 1, 1, 1});
  EdgeMoeSteps steps(
      2, 3,
      [](int64_t, const ExpertSet&, const ExpertSet&) {
        return std::vector<double>{0.5, 0.3, 0.2};
      },
      buffer, 3);
  steps.use(0, std::vector<int64_t>{0});
  const auto p = steps.preload(1);
  ASSERT_EQ(p.size(), 3u);
  EXPECT_EQ(p[0].kind, EdgeMoeSteps::Preload::load);
  EXPECT_EQ(p[1].kind, EdgeMoeSteps::Preload::dropped);
  EXPECT_EQ(p[2].kind, EdgeMoeSteps::Preload::dropped);
  EXPECT_TRUE(buffer.cached(0) && buffer.cached(3));
}

}  // namespace
}  // namespace moiety
