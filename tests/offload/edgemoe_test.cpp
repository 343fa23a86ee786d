#include "moiety/offload/edgemoe.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <numeric>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/safetensors.h"
#include "moiety/offload/residency.h"

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

// All experts of a model; the victim while `running` executes.
std::pair<int64_t, int64_t> victim_of(int64_t layers, int64_t experts, std::vector<int64_t> frequency, int64_t running,
                                      const std::vector<int64_t>& pinned = {}, EdgeMoeEviction evict = {}) {
  EdgeMoePolicyConfig config;
  config.evict = std::move(evict);
  EdgeMoe policy(layers, experts, std::move(frequency), {}, config);
  std::vector<ExpertVersion> candidates;
  for (int64_t x = 0; x < layers * experts; ++x)
    if (std::find(pinned.begin(), pinned.end(), x) == pinned.end())
      candidates.push_back({x / experts, x % experts, Precision::high});
  const auto& v = candidates[policy.victim(candidates, {running, 1})];
  return {v.layer, v.expert};
}
using At = std::pair<int64_t, int64_t>;

TEST(Eviction, EqualFrequenciesGiveUpTheLayerJustPassed) {
  const std::vector<int64_t> f(8, 5), running = {4, 5};
  EXPECT_EQ(victim_of(4, 2, f, 2, running), (At{1, 0}));
  EXPECT_EQ(victim_of(4, 2, f, 2, running, {.distance = "printed"}), (At{3, 0}));  // the one that comes next
}

TEST(Eviction, EqualDistancesAreLeastFrequentlyUsed) {
  EXPECT_EQ(victim_of(1, 4, {7, 3, 9, 3}, 0), (At{0, 1}));
}

TEST(Eviction, ZeroFrequenciesLeaveFirstTheFarthestOfThem) {
  EXPECT_EQ(victim_of(3, 2, {0, 9, 0, 9, 0, 9}, 0), (At{0, 0}));  // D = 3
  EXPECT_EQ(victim_of(3, 2, {0, 9, 0, 9, 0, 9}, 1), (At{1, 0}));
}

// Frequent and far against seldom and near: 12 / 3 = 4, 3 / 1 = 3.
TEST(Eviction, WeighsFrequencyAgainstDistance) {
  EXPECT_EQ(victim_of(4, 1, {9, 3, 9, 12}, 0, {0, 2}), (At{1, 0}));
  EXPECT_EQ(victim_of(4, 1, {9, 5, 9, 12}, 0, {0, 2}), (At{3, 0}));
}

TEST(Eviction, OnlineUsesCountWhereAsked) {
  EdgeMoePolicyConfig config;
  config.evict.online = true;
  EdgeMoe policy(1, 2, {3, 4}, {}, config);
  policy.used({0, 0, Precision::high}, 2, true, {0, 1});
  const std::vector<ExpertVersion> both = {{0, 0, Precision::high}, {0, 1, Precision::high}};
  EXPECT_EQ(policy.victim(both, {0, 2}), 1u);
}

std::shared_ptr<EdgeMoe> by_paths(const Trace& profile, int64_t layers, int64_t slots, int64_t experts,
                                  int64_t preload) {
  EdgeMoePolicyConfig config;
  config.preload = preload;
  return std::make_shared<EdgeMoe>(std::make_shared<const ExpertPaths>(profile, layers, slots, experts), config);
}

RC_GTEST_PROP(EdgeMoeReplay, CountsEveryUseOnce, ()) {
  const auto capacity = *rc::gen::inRange<int64_t>(3, 45), preload = *rc::gen::inRange<int64_t>(0, 4);
  const Trace run = skewed(30, 5, 8, *rc::gen::arbitrary<uint64_t>());
  const auto r = replay_paths(run, 5, 1, 8, by_paths(skewed(60, 5, 8, 1), 5, 1, 8, preload), capacity);
  RC_ASSERT(r.hits + r.demand == static_cast<int64_t>(run.size()));
  RC_ASSERT(std::count(r.cached.begin(), r.cached.end(), true) <= capacity);
  RC_ASSERT(r.preloads_used <= r.preloads);
  const auto again = replay_paths(run, 5, 1, 8, by_paths(skewed(60, 5, 8, 1), 5, 1, 8, preload), capacity);
  RC_ASSERT(again.cached == r.cached && again.hits == r.hits);
}

TEST(EdgeMoeReplay, ABufferForAllReadsEveryExpertOnce) {
  const Trace t = skewed(200, 4, 6, 3);
  const auto r = replay_paths(t, 4, 1, 6, by_paths(t, 4, 1, 6, 2), 24);
  EXPECT_EQ(r.demand + r.preloads, std::count(r.cached.begin(), r.cached.end(), true));
  EXPECT_LE(r.demand + r.preloads, 24);
}

TEST(EdgeMoeReplay, PerfectPredictionReadsOnDemandInTheFirstLayerOnly) {
  const Trace t = skewed(50, 4, 6, 5);
  size_t at = 0;  // layer 0 of the first token cannot be foreseen; from then on the future is known
  EdgeMoePolicyConfig config;
  config.preload = 1;
  const auto r = replay_paths(t, 4, 1, 6,
                              std::make_shared<EdgeMoe>(
                                  4, 6, std::vector<int64_t>(24, 1),
                                  [&](int64_t, const ExpertSet&, const ExpertSet&) {
                                    std::vector<double> p(6);
                                    if (at > 0) p[static_cast<size_t>(t[at])] = 1.0;
                                    ++at;
                                    return p;
                                  },
                                  config),
                              3);
  EXPECT_EQ(r.demand, 1);
  EXPECT_EQ(r.preloads_used, r.preloads);
}

TEST(EdgeMoeReplay, PathsForeseeMoreThanFrequencies) {
  const Trace profile = skewed(2000, 5, 8, 1), run = skewed(300, 5, 8, 2);
  const ExpertPaths paths(profile, 5, 1, 8);
  const auto used = [&](const EdgeMoe::Predictor& predictor) {
    EdgeMoePolicyConfig config;
    config.preload = 1;
    return replay_paths(run, 5, 1, 8, std::make_shared<EdgeMoe>(5, 8, paths.frequency(), predictor, config), 6)
        .preloads_used;
  };
  const auto two = used([&](int64_t n, const ExpertSet& a, const ExpertSet& b) { return paths.probability(n, a, b); });
  const auto one =
      used([&](int64_t n, const ExpertSet&, const ExpertSet& b) { return paths.probability_of_one(n, b); });
  const auto none = used([&](int64_t n, const ExpertSet&, const ExpertSet&) { return paths.share(n); });
  EXPECT_GT(two, 2 * one);
  EXPECT_GT(two, 2 * none);
}

TEST(EdgeMoeReplay, PreloadsDoNotEvictEachOtherNorTheRunningLayer) {
  // Two places: the running layer's expert takes one, the first preload the other, the others find none.
  EdgeMoePolicyConfig config;
  config.preload = 3;
  auto policy = std::make_shared<EdgeMoe>(
      2, 3, std::vector<int64_t>(6, 1),
      [](int64_t, const ExpertSet&, const ExpertSet&) {
        return std::vector<double>{0.5, 0.3, 0.2};
      },
      config);
  Residency residency({.layers = 2, .experts = 3, .high = 2, .low = 0}, policy);
  Demand demand{.layer = 0, .token = 1, .rows = 1, .pairs = {{0, 0, 1.0}}};
  auto uses = residency.look_up(demand);
  residency.record(uses[0], demand);
  ASSERT_TRUE(residency.place(uses[0], demand));
  residency.guess_ahead(demand, nullptr);
  EXPECT_EQ(residency.counts().ahead, 1);
  EXPECT_EQ(residency.counts().ahead_dropped, 2);
  EXPECT_TRUE(residency.has({0, 0, Precision::high}) && residency.has({1, 0, Precision::high}));
}

TEST(EdgeMoePolicy, StaysOutOfPromptsAndBatches) {
  auto policy = by_paths(skewed(60, 3, 4, 1), 3, 1, 4, 2);
  Residency residency({.layers = 3, .experts = 4, .high = 6, .low = 0}, policy);
  EXPECT_TRUE(
      policy->guess({.layer = 0, .token = 2, .rows = 2, .pairs = {{0, 1, 1.0}, {1, 2, 1.0}}}, residency, nullptr)
          .empty());
  EXPECT_EQ(policy->guess({.layer = 0, .token = 3, .rows = 1, .pairs = {{0, 1, 1.0}}}, residency, nullptr).size(), 2u);
}

TEST(EdgeMoePolicy, NeedsPlacesForATokenAndWhatIsReadAhead) {
  EXPECT_EQ(by_paths(skewed(60, 3, 4, 1), 3, 1, 4, 3)->least_high({.layers = 3, .experts = 4, .top_k = 2}), 5);
}

TEST(EdgeMoePolicy, StartsWithTheMostFrequent) {
  const auto initial = EdgeMoe(2, 2, {1, 5, 5, 0}, {}).initial();
  ASSERT_EQ(initial.size(), 4u);
  EXPECT_EQ(initial[0], (ExpertVersion{0, 1, Precision::high}));
  EXPECT_EQ(initial[1], (ExpertVersion{1, 0, Precision::high}));
}

TEST(ExpertPathsFile, GivesBackTheProfileAndRefusesAnother) {
  const TemporaryFolder folder;
  const std::string file = (folder / "p.safetensors").string();
  for (const int64_t experts : {8, 200, 40000}) {
    Trace t = skewed(20, 3, 8, 4);
    t[5] = -1;
    t[7] = experts - 1;
    write_expert_paths(file, t, 3, 1, experts, "abc");
    EXPECT_EQ(SafetensorsFile::open(file)->get("profile_trace").format, experts == 8     ? Format::I8
                                                                        : experts == 200 ? Format::I16
                                                                                         : Format::I32);
    const auto paths = read_expert_paths(file, "abc", 3, experts);
    EXPECT_EQ(paths.frequency(), ExpertPaths(t, 3, 1, experts).frequency());
    EXPECT_EQ(paths.probability(2, {t[0]}, {t[1]}), ExpertPaths(t, 3, 1, experts).probability(2, {t[0]}, {t[1]}));
    EXPECT_NE(message_of([&] { read_expert_paths(file, "abd", 3, experts); }).find("another model"), std::string::npos);
    EXPECT_NE(message_of([&] { read_expert_paths(file, "abc", 4, experts); }).find("3 layers"), std::string::npos);
  }
  SafetensorsWriter writer(file, {{"x", Format::U8, {1}}});
  writer.write("x", std::vector<std::byte>(1));
  writer.finish();
  EXPECT_NE(message_of([&] { read_expert_paths(file); }).find("profile_trace"), std::string::npos);
}

}  // namespace
}  // namespace moiety
