// What must hold of HOBBIT's scores, priorities and replays.
#include "moiety/offload/hobbit.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <filesystem>
#include <set>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/offload/residency.h"
#include "moiety/offload/traces.h"

namespace moiety {
namespace {

using Pairs = std::vector<Demand::Pair>;

ExpertTraces random_traces(uint64_t seed, int64_t tokens, int64_t layers, int64_t experts, int64_t k) {
  RandomStream random(seed, "traces");
  ExpertTraces t{.tokens = tokens, .layers = layers, .top_k = k, .num_experts = experts};
  for (int64_t n = 0; n < tokens; ++n) {
    t.sequence_start.push_back(n == 0 || random.chance(0.1));
    for (int64_t l = 0; l < layers; ++l) {
      std::vector<double> gates;
      double sum = 0.0;
      for (int64_t i = 0; i < k; ++i) sum += gates.emplace_back(random.uniform(0.05, 1.0));
      for (const int64_t e : random.sample(experts, k)) t.experts.push_back(e);
      for (const double g : gates) t.gates.push_back(static_cast<float>(g / sum));
    }
  }
  return t;
}

std::shared_ptr<Hobbit> hobbit(const ExpertTraces& t, double t1, double t2, HobbitWeights w = {}) {
  return std::make_shared<Hobbit>(t.layers, t.num_experts, t1, t2, 0, w);
}

TEST(Hobbit, ScoresAreTheGatesInFront) {
  const Pairs row = {{0, 4, 1.0}, {0, 1, 0.6}, {0, 7, 0.4}};  // sum 2: 0.5, 0.3, 0.2
  const auto s = hobbit_scores(row, 0.5, 0.7);
  ASSERT_EQ(s.size(), 3u);
  EXPECT_DOUBLE_EQ(s[0].score, 0.0);
  EXPECT_DOUBLE_EQ(s[1].score, 0.5);
  EXPECT_DOUBLE_EQ(s[2].score, 0.8);
  EXPECT_EQ(s[1].precision, Precision::high) << "a score equal to t1 is high";
  EXPECT_EQ(s[2].precision, Precision::skip);
  EXPECT_EQ(hobbit_scores(row, 0.4, 0.5)[1].precision, Precision::low) << "a score equal to t2 is low";
}

TEST(Hobbit, TheFirstExpertIsAlwaysHighAndOneExpertNeverElse) {
  for (const double t2 : {0.0, 1.0}) {
    EXPECT_EQ(hobbit_scores(Pairs{{0, 3, 0.2}}, 0.0, t2)[0].precision, Precision::high);
    EXPECT_EQ(hobbit_scores(Pairs{{0, 3, 0.0}, {0, 4, 0.0}}, 0.0, t2)[0].precision, Precision::high);
  }
  const auto t = random_traces(1, 200, 3, 6, 1);
  const auto r = replay(t, hobbit(t, 0.0, 0.0), 2, 1, 4, 16);
  EXPECT_EQ(r.counts[1] + r.counts[3] + r.counts[4], 0);
}

TEST(Hobbit, T1OfOneIsHighWhateverSumsRoundTo) {
  Pairs row;
  for (int64_t e = 0; e < 64; ++e) row.push_back({0, e, e == 0 ? 1.0 : 1e-17});
  for (const auto& s : hobbit_scores(row, 1.0, 1.0)) EXPECT_EQ(s.precision, Precision::high);
}

TEST(Hobbit, TheNextLayerHasTheHighestPriority) {
  const HobbitWeights fld{0, 0, 0, 1};
  const int64_t layers = 4;
  EXPECT_DOUBLE_EQ(hobbit_priority({}, 2, {2, 5}, layers, fld), 1.0);
  EXPECT_DOUBLE_EQ(hobbit_priority({}, 3, {2, 5}, layers, fld), 0.75);
  EXPECT_DOUBLE_EQ(hobbit_priority({}, 1, {2, 5}, layers, fld), 0.25) << "just passed";
  Hobbit policy(4, 2, 1, 1, 0, fld);
  const std::vector<ExpertVersion> all = {{0, 0}, {1, 1}, {2, 0}, {3, 1}};
  EXPECT_EQ(policy.victim(all, {2, 5}), 1u);
}

// (1, 0, 0, 0): a global LRU whose clock is the token, ties by the lowest index.
TEST(Hobbit, RecencyAloneIsLru) {
  auto t = random_traces(2, 120, 3, 6, 2);
  std::fill(t.sequence_start.begin() + 1, t.sequence_start.end(), 0);
  struct TokenLru : OffloadPolicy {
    std::map<int64_t, int64_t> last;
    void used(const ExpertVersion& v, int64_t, bool, const Moment& now) override {
      last[v.layer * 6 + v.expert] = now.token;
    }
    size_t victim(std::span<const ExpertVersion> c, const Moment&) override {
      return lowest(c, [&](const ExpertVersion& v) { return static_cast<double>(last[v.layer * 6 + v.expert]); });
    }
  };
  for (const int64_t capacity : {2, 5, 9}) {
    const auto a = replay(t, hobbit(t, 1, 1, {1, 0, 0, 0}), capacity, 0, 4, 16);
    const auto b = replay(t, std::make_shared<TokenLru>(), capacity, 0, 4, 16);
    EXPECT_EQ(a.counts, b.counts) << capacity;
    EXPECT_EQ(a.cached_high, b.cached_high);
  }
}

RC_GTEST_PROP(Hobbit, EveryUseIsAHitAMissOrASkip, ()) {
  const auto k = *rc::gen::inRange<int64_t>(1, 4);
  const auto t = random_traces(*rc::gen::arbitrary<uint64_t>(), 40, 3, 6, k);
  const double t1 = *rc::gen::inRange(0, 11) / 10.0, t2 = std::max(t1, *rc::gen::inRange(0, 11) / 10.0);
  const auto high = *rc::gen::inRange<int64_t>(k, 19), low = *rc::gen::inRange<int64_t>(0, 19);
  const auto r = replay(t, hobbit(t, t1, t2), high, low, 4, 16);
  int64_t sum = 0, in_high = 0, in_low = 0;
  for (const int64_t c : r.counts) sum += c;
  for (const auto c : r.cached_high) in_high += c;
  for (const auto c : r.cached_low) in_low += c;
  RC_ASSERT(sum == t.tokens * t.layers * t.top_k);
  RC_ASSERT(in_high <= high);
  RC_ASSERT(in_low <= low);
  RC_ASSERT(r.penalty == static_cast<double>(r.counts[2]) + 0.25 * static_cast<double>(r.counts[3]));
  const auto again = replay(t, hobbit(t, t1, t2), high, low, 4, 16);
  RC_ASSERT(again.precision_used == r.precision_used);
  RC_ASSERT(t1 < 1.0 || r.counts[1] + r.counts[3] + r.counts[4] == 0);
}

TEST(Hobbit, WithRoomForAllEachExpertIsReadOnce) {
  const auto t = random_traces(4, 100, 3, 6, 2);
  std::set<int64_t> used;
  for (size_t i = 0; i < t.experts.size(); ++i) used.insert(static_cast<int64_t>(i) / 2 % 3 * 6 + t.experts[i]);
  const auto r = replay(t, hobbit(t, 1, 1), 18, 0, 4, 16);
  EXPECT_EQ(r.counts[2], static_cast<int64_t>(used.size()));
}

TEST(Hobbit, CountsStartAnewWithASequenceAndPoolsDoNot) {
  Residency pools({1, 4, 2, 0}, std::make_shared<Hobbit>(1, 4, 1, 1, 0, HobbitWeights{0, 1, 0, 0}));
  const auto step = [&](int64_t expert, int64_t token) {
    Demand d{.layer = 0, .token = token, .rows = 1, .pairs = {{0, expert, 1.0}}};
    for (Use& u : pools.look_up(d)) {
      pools.record(u, d);
      if (!u.hit) {
        EXPECT_TRUE(pools.place(u, d));
      }
    }
    pools.end_layer(0);
  };
  pools.begin_sequence();
  for (int64_t t = 1; t <= 5; ++t) step(0, t);  // used often
  step(1, 6);
  pools.begin_sequence();
  EXPECT_TRUE(pools.has({0, 0, Precision::high}));
  step(1, 1);  // now the only one with a count
  step(2, 2);
  EXPECT_FALSE(pools.has({0, 0, Precision::high})) << "its five uses were of another sequence";
  EXPECT_TRUE(pools.has({0, 1, Precision::high}));
}

TEST(Hobbit, ALowCopyServesNoHighDemand) {
  Residency pools({1, 4, 2, 2}, std::make_shared<Hobbit>(1, 4, 0.0, 0.6, 0, HobbitWeights()));
  EXPECT_TRUE(pools.put({0, 0, Precision::low}));
  EXPECT_TRUE(pools.put({0, 1, Precision::low}));
  EXPECT_TRUE(pools.put({0, 2, Precision::high}));
  EXPECT_EQ(pools.Cached::look_up(0, 0, Precision::high), Precision::high);
  EXPECT_FALSE(pools.has({0, 0, Precision::high}));
  EXPECT_EQ(pools.Cached::look_up(0, 1, Precision::skip), Precision::low) << "a copy that is there is used";
  EXPECT_EQ(pools.Cached::look_up(0, 2, Precision::skip), Precision::high);
  EXPECT_EQ(pools.Cached::look_up(0, 3, Precision::skip), Precision::skip);
}

TEST(Hobbit, CalibrationIsNoWorseThanEvenWeights) {
  const auto t = random_traces(5, 60, 3, 8, 2);
  const auto c = calibrate_hobbit(t, 0.6, 0.9, 6, 3, 4, 16);
  EXPECT_LE(c.penalty, c.penalty_even);
  EXPECT_EQ(c.weights.problem(), "");
  const TemporaryFolder folder;
  write_calibration(folder / "m.hobbit.json", c);
  const auto back = read_calibration(folder / "m.hobbit.json");
  EXPECT_DOUBLE_EQ(back.weights.lhu, c.weights.lhu);
  EXPECT_EQ(back.capacity_high, 6);
}

TEST(Hobbit, QuantilesGiveTheSharesAskedFor) {
  const auto t = random_traces(6, 200, 2, 8, 4);
  const auto [t1, t2] = score_quantiles(t, 0.6, 0.9);
  int64_t high = 0, low = 0, all = 0;
  const auto r = replay(t, hobbit(t, t1, t2), 4, 0, 4, 16);
  (void)r;
  for (int64_t step = 0; step < t.tokens * t.layers; ++step) {
    Demand d;
    for (int64_t k = 0; k < 4; ++k) d.pairs.push_back({0, t.experts[step * 4 + k], t.gates[step * 4 + k]});
    sort_pairs(d, 8);
    for (const auto& s : hobbit_scores(d.pairs, t1, t2)) {
      high += s.precision == Precision::high;
      low += s.precision == Precision::low;
      ++all;
    }
  }
  EXPECT_NEAR(static_cast<double>(high) / static_cast<double>(all), 0.6, 0.01);
  EXPECT_NEAR(static_cast<double>(high + low) / static_cast<double>(all), 0.9, 0.01);
}

TEST(Hobbit, RefusesWhatCannotBe) {
  const auto make = [](nlohmann::json settings, bool low = true) {
    return message_of([&] {
      PolicySetup setup{.layers = 2, .experts = 4, .top_k = 2, .has_low = low, .model = "m.gguf", .router_hash = "x"};
      factory<MakeOffloadPolicy>(get_method("policy", "hobbit"))(setup, settings);
    });
  };
  EXPECT_EQ(make({{"t1", 0.5}, {"t2", 0.5}}), "");
  EXPECT_NE(make({{"t1", 0.7}, {"t2", 0.6}}).find("t1 is 0.7 and t2 0.6"), std::string::npos);
  EXPECT_NE(make({{"t1", 1.5}}).find("1.5"), std::string::npos);
  EXPECT_NE(make({{"weights", {{"lru", 0.5}, {"lfu", 0.6}}}}).find("add up to 1.1"), std::string::npos);
  EXPECT_NE(make({{"weights", "1,-1,0.5,0.5"}}).find("-1"), std::string::npos);
  EXPECT_NE(make({{"weights", "even"}}).find("even"), std::string::npos);
  EXPECT_NE(make(nlohmann::json::object(), false).find("--add-low-experts"), std::string::npos) << "names the command";
  EXPECT_EQ(make({{"t1", 1.0}, {"t2", 1.0}}, false), "");
}

TEST(Traces, RefusesWhatCannotBe) {
  auto t = random_traces(7, 4, 2, 4, 2);
  EXPECT_EQ(message_of([&] { t.validate("t"); }), "");
  auto far = t;
  far.experts[3] = 4;
  EXPECT_NE(message_of([&] { far.validate("t"); }).find("names expert 4, but there are 4"), std::string::npos);
  auto twice = t;
  twice.experts[1] = twice.experts[0];
  EXPECT_NE(message_of([&] { twice.validate("t"); }).find("twice"), std::string::npos);
  auto late = t;
  late.sequence_start[0] = 0;
  EXPECT_NE(message_of([&] { late.validate("t"); }).find("start a sequence"), std::string::npos);
  EXPECT_NE(message_of([&] { replay(t, hobbit(t, 1, 1), 1, 0, 4, 16); }).find("holds 1 experts, a token needs 2"),
            std::string::npos);
  const TemporaryFolder folder;
  write_traces(folder / "t.safetensors", t);
  const auto back = read_traces(folder / "t.safetensors");
  EXPECT_EQ(back.experts, t.experts);
  EXPECT_EQ(back.gates, t.gates);
  EXPECT_EQ(back.num_experts, 4);
}

// Whatever happens, what a step uses stays until the layer has run.
RC_GTEST_PROP(Residency, NothingInUseIsEvicted, ()) {
  const int64_t layers = 3, experts = 5;
  RandomStream random(*rc::gen::arbitrary<uint64_t>(), "residency");
  const int64_t high = 2 + static_cast<int64_t>(random.below(5)), low = static_cast<int64_t>(random.below(4));
  Residency pools({layers, experts, high, low},
                  std::make_shared<Hobbit>(layers, experts, 0.3, 0.8, 0, HobbitWeights()));
  pools.begin_sequence();
  for (int64_t token = 1; token < 30; ++token)
    for (int64_t l = 0; l < layers; ++l) {
      Demand d{.layer = l, .token = token, .rows = 1, .pairs = {}};
      for (const int64_t e : random.sample(experts, 2)) d.pairs.push_back({0, e, random.uniform(0.1, 1.0)});
      sort_pairs(d, experts);
      auto uses = pools.look_up(d);
      std::set<std::pair<Precision, int64_t>> slots;
      for (Use& u : uses) {
        pools.record(u, d);
        const bool left = u.hit || u.used == Precision::skip || pools.place(u, d);
        RC_ASSERT(left || (u.used == Precision::low && low < 1));
      }
      for (const Use& u : uses) {
        if (u.slot < 0) continue;
        RC_ASSERT(pools.slot({l, u.expert, u.used}) == u.slot);
        RC_ASSERT(slots.insert({u.used, u.slot}).second);
      }
      pools.end_layer(l);
    }
}

}  // namespace
}  // namespace moiety
