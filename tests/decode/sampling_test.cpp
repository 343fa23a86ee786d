#include "moiety/decode/sampling.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"

namespace moiety {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

SamplerConfig sampling() {
  SamplerConfig config;
  config.greedy = false;
  return config;
}

std::vector<float> processed(const SamplerConfig& config, std::vector<float> logits, std::vector<int64_t> prompt = {},
                             std::vector<int64_t> generated = {}) {
  Sampler sampler(config, RandomStream(1, "test"));
  sampler.see_prompt(prompt);
  for (const int64_t id : generated) sampler.accept(id);
  sampler.process(logits);
  return logits;
}

std::vector<int> kept(const std::vector<float>& logits) {
  std::vector<int> ids;
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] > -kInf) ids.push_back(static_cast<int>(i));
  return ids;
}

std::vector<float> log_of(std::vector<float> p) {
  for (float& x : p) x = std::log(x);
  return p;
}

TEST(Sampling, GreedyTakesTheLowestOfEquals) {
  Sampler sampler({}, RandomStream(1, "test"));
  std::vector<float> logits = {1, 3, 3, 2};
  EXPECT_EQ(sampler.sample(logits), 1);
  logits = {-1, std::nanf(""), -2};
  EXPECT_EQ(sampler.sample(logits), 0);
  logits = {-kInf, -kInf};
  EXPECT_THROW(sampler.sample(logits), Error);
}

TEST(Sampling, TemperatureZeroIsGreedy) {
  auto config = sampling();
  config.temperature = 0.0;
  Sampler sampler(config, RandomStream(1, "test"));
  std::vector<float> logits = {1, 2, 5, 0};
  EXPECT_EQ(sampler.sample(logits), 2);
}

TEST(Sampling, RepetitionPenaltyCountsThePromptOnce) {
  SamplerConfig config;
  config.repetition_penalty = 2.0;
  EXPECT_EQ(processed(config, {4, -4, 4, 4}, {0, 0, 1}, {2, 2, 99}), (std::vector<float>{2, -8, 2, 4}));
}

TEST(Sampling, FrequencyAndPresenceCountOnlyWhatWasGenerated) {
  SamplerConfig config;
  config.frequency_penalty = 0.5;
  config.presence_penalty = 1.0;
  EXPECT_EQ(processed(config, {4, 4, 4}, {0, 0}, {1, 1, 2}), (std::vector<float>{4, 2, 2.5}));
}

TEST(Sampling, LogitBiasBans) {
  SamplerConfig config;
  config.logit_bias = {{1, -std::numeric_limits<double>::infinity()}, {2, 1.5}};
  EXPECT_EQ(processed(config, {0, 9, 0}), (std::vector<float>{0, -kInf, 1.5}));
  config.logit_bias = {{3, 1.0}};
  EXPECT_THROW(processed(config, {0, 9, 0}), Error);
}

TEST(Sampling, TopKKeepsWhatEqualsTheLast) {
  auto config = sampling();
  config.top_k = 2;
  EXPECT_EQ(kept(processed(config, {3, 1, 2, 2})), (std::vector<int>{0, 2, 3}));
}

TEST(Sampling, TopPKeepsTheTokenThatCrosses) {
  auto config = sampling();
  config.top_p = 0.6;
  EXPECT_EQ(kept(processed(config, log_of({0.1f, 0.5f, 0.15f, 0.25f}))), (std::vector<int>{1, 3}));
  config.top_p = 0.0;
  EXPECT_EQ(kept(processed(config, log_of({0.1f, 0.5f, 0.4f}))), (std::vector<int>{1}));
}

TEST(Sampling, MinPIsAShareOfTheLargest) {
  auto config = sampling();
  config.min_p = 0.5;
  EXPECT_EQ(kept(processed(config, log_of({0.4f, 0.21f, 0.19f, 0.2f}))), (std::vector<int>{0, 1}));
}

TEST(Sampling, TypicalCanDropTheMostProbable) {
  auto config = sampling();
  config.typical_p = 0.15;
  const auto ids = kept(processed(config, log_of({0.5f, 0.2f, 0.1f, 0.1f, 0.1f})));
  EXPECT_EQ(ids, (std::vector<int>{1}));
}

TEST(Sampling, DrawsFollowTheProbabilities) {
  Sampler sampler(sampling(), RandomStream(7, "test"));
  std::vector<int> counts(3);
  constexpr int kDraws = 30000;
  for (int i = 0; i < kDraws; ++i) {
    auto logits = log_of({0.2f, 0.5f, 0.3f});
    ++counts[static_cast<size_t>(sampler.sample(logits))];
  }
  // Four standard deviations of a binomial share are below 0.012 here.
  EXPECT_NEAR(counts[0] / double(kDraws), 0.2, 0.012);
  EXPECT_NEAR(counts[1] / double(kDraws), 0.5, 0.012);
}

TEST(Sampling, OneSeedOneSequence) {
  const auto draw = [](uint64_t seed) {
    Sampler sampler(sampling(), RandomStream(seed, "test"));
    std::vector<int64_t> ids;
    for (int i = 0; i < 50; ++i) {
      std::vector<float> logits(20, 0.0f);
      ids.push_back(sampler.sample(logits));
    }
    return ids;
  };
  EXPECT_EQ(draw(3), draw(3));
  EXPECT_NE(draw(3), draw(4));
}

TEST(Sampling, BadSettingsNameTheField) {
  const auto message = [](auto change) {
    auto config = sampling();
    change(config);
    try {
      config.validate();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message([](auto& c) { c.temperature = -1; }).find("temperature"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.top_p = 1.5; }).find("top_p"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.typical_p = 0; }).find("typical_p"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.repetition_penalty = 0; }).find("repetition_penalty"), std::string::npos);
  EXPECT_EQ(message([](auto&) {}), "");
}

TEST(Sampling, TopIsSortedWithLowestIndexFirst) {
  const std::vector<float> values = {1, 5, 3, 5, 3, 0};
  using Pairs = std::vector<std::pair<int64_t, float>>;
  EXPECT_EQ(top(values, 3), (Pairs{{1, 5}, {3, 5}, {2, 3}}));
  EXPECT_EQ(top(values, 0), Pairs{});
  EXPECT_EQ(top(values, 99).size(), 6u);
}

// The partial sorts against plain full ones, on vocabularies large enough that they are partial.
RC_GTEST_PROP(Sampling, PartialSortsEqualFullOnes, ()) {
  const auto seed = *rc::gen::inRange<uint64_t>(0, 1000000);
  const auto size = *rc::gen::inRange<size_t>(2, 5000);
  const auto levels = *rc::gen::elementOf(std::vector<int>{3, 50, 1 << 20});
  const auto spread = *rc::gen::elementOf(std::vector<double>{0.1, 2.0, 20.0});
  RandomStream random(seed, "values");
  std::vector<float> logits(size);
  for (float& x : logits) x = static_cast<float>(std::floor(random.uniform() * levels) / levels * spread);
  auto config = sampling();
  const auto k = *rc::gen::inRange<int64_t>(0, static_cast<int64_t>(size) + 2);
  config.top_k = k;
  config.top_p = *rc::gen::elementOf(std::vector<double>{0.0, 0.1, 0.5, 0.9, 0.999, 1.0});
  const auto got = kept(processed(config, logits));

  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  size_t end = size;
  if (k > 0 && k < static_cast<int64_t>(size)) {
    end = static_cast<size_t>(k);
    while (end < size && logits[order[end]] == logits[order[end - 1]]) ++end;
  }
  double total = 0.0, mass = 0.0;
  const float largest = logits[order[0]];
  for (size_t i = 0; i < size; ++i)
    if (i < end) total += std::exp(logits[order[i]] - largest);
  std::vector<int> want;
  for (size_t i = 0; i < end; ++i) {
    // Sums in another order may differ in the last bits: leave a draw on the edge out of the comparison.
    if (config.top_p < 1.0 && i > 0 && std::abs(mass - config.top_p * total) < 1e-9 * total) RC_DISCARD("on the edge");
    if (config.top_p < 1.0 && i > 0 && mass >= config.top_p * total) break;
    want.push_back(static_cast<int>(order[i]));
    mass += std::exp(logits[order[i]] - largest);
  }
  std::sort(want.begin(), want.end());
  RC_ASSERT(got == want);
}

}  // namespace
}  // namespace moiety
