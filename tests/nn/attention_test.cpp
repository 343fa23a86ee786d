// Attention against its definition: one query after the other, in f64.
#include "moiety/nn/attention.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kBatch = 2, kHeads = 4, kKvHeads = 2, kDim = 6;

// Query token t of row b may look at key s (both counted from the start of the cache).
using Rule = std::function<bool(int64_t b, int64_t t, int64_t s)>;

struct Case {
  int64_t past = 0, tokens = 7;
  AttentionOptions options;
  Tensor padding, segments;
};

Tensor naive(const Tensor& q, const Tensor& k, const Tensor& v, const Case& c, const Rule& rule) {
  auto out = torch::zeros({kBatch, kHeads, c.tokens, kDim}, torch::kFloat64);
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t h = 0; h < kHeads; ++h)
      for (int64_t t = 0; t < c.tokens; ++t) {
        const auto keys = k[b][h / (kHeads / kKvHeads)].to(torch::kFloat64),
                   values = v[b][h / (kHeads / kKvHeads)].to(torch::kFloat64), query = q[b][h][t].to(torch::kFloat64);
        double sum = c.options.sinks.defined() ? std::exp(c.options.sinks[h].item<double>()) : 0.0;
        auto y = torch::zeros({kDim}, torch::kFloat64);
        for (int64_t s = 0; s < c.past + c.tokens; ++s) {
          if (!rule(b, c.past + t, s)) continue;
          double score = (query * keys[s]).sum().item<double>() * c.options.scale;
          if (c.options.softcap > 0.0) score = c.options.softcap * std::tanh(score / c.options.softcap);
          sum += std::exp(score);
          y += std::exp(score) * values[s];
        }
        out[b][h][t] = y / sum;
      }
  return out;
}

void expect_equal(Case c, const Rule& rule, const std::function<bool(int64_t, int64_t)>& real = {}) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  c.options.scale = 0.4;
  const int64_t total = c.past + c.tokens;
  const auto q = torch::randn({kBatch, kHeads, c.tokens, kDim}) * 2, k = torch::randn({kBatch, kKvHeads, total, kDim}),
             v = torch::randn({kBatch, kKvHeads, total, kDim});
  const auto positions = (torch::arange(c.tokens, torch::kInt64) + c.past).expand({kBatch, c.tokens});
  const AttentionContext context(positions, c.past, c.padding, c.segments);
  const auto y = attend(q, k, v, context, c.options), expected = naive(q, k, v, c, rule);
  EXPECT_TRUE(torch::isfinite(y).all().item<bool>());
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t t = 0; t < c.tokens; ++t)
      if (!real || real(b, c.past + t)) {
        EXPECT_LT((y[b].select(1, t) - expected[b].select(1, t)).abs().max().item<double>(), 2e-6)
            << "row " << b << ", token " << t;
      }
}

const Rule kCausal = [](int64_t, int64_t t, int64_t s) { return s <= t; };

TEST(Attention, Causal) {
  expect_equal({}, kCausal);
  expect_equal({.past = 5, .tokens = 3}, kCausal);
  expect_equal({.past = 5, .tokens = 1}, kCausal);
}

TEST(Attention, SlidingWindowSeesItsLastTokens) {
  for (int64_t window : {1, 3, 7, 100}) {
    const Rule rule = [=](int64_t, int64_t t, int64_t s) { return s <= t && t - s < window; };
    AttentionOptions options;
    options.window = window;
    expect_equal({.past = 0, .tokens = 7, .options = options}, rule);
    expect_equal({.past = 6, .tokens = 2, .options = options}, rule);
    expect_equal({.past = 6, .tokens = 1, .options = options}, rule);
  }
}

TEST(Attention, PaddingIsNeverSeen) {
  for (bool left : {true, false})
    for (int64_t window : {0, 3}) {
      // Row 0 has 2 tokens of padding, row 1 has 4.
      const auto real = [=](int64_t b, int64_t s) { return left ? s >= 2 + 2 * b : s < 7 - 2 - 2 * b; };
      Case c;
      c.options.window = window;
      c.padding = torch::empty({kBatch, 7}, torch::kBool);
      for (int64_t b = 0; b < kBatch; ++b)
        for (int64_t s = 0; s < 7; ++s) c.padding[b][s] = real(b, s);
      expect_equal(
          c, [=](int64_t b, int64_t t, int64_t s) { return s <= t && (window == 0 || t - s < window) && real(b, s); },
          real);
    }
}

TEST(Attention, PackedSequencesDoNotSeeEachOther) {
  Case c;
  c.segments = torch::tensor({{0, 0, 0, 1, 1, 2, 2}, {5, 5, 5, 5, 5, 5, 6}}, torch::kInt64);
  const auto segments = c.segments;
  for (int64_t window : {0, 2}) {
    c.options.window = window;
    expect_equal(c, [=](int64_t b, int64_t t, int64_t s) {
      return s <= t && (window == 0 || t - s < window) && torch::equal(segments[b][t], segments[b][s]);
    });
  }
}

TEST(Attention, SoftCapAndSinks) {
  for (int64_t window : {0, 3})
    for (bool capped : {true, false})
      for (bool sunk : {true, false}) {
        AttentionOptions options;
        options.window = window;
        if (capped) options.softcap = 1.5;
        if (sunk) options.sinks = torch::tensor({0.5, -1.0, 2.0, 0.0});
        const Rule rule = [=](int64_t, int64_t t, int64_t s) { return s <= t && (window == 0 || t - s < window); };
        expect_equal({.past = 0, .tokens = 7, .options = options}, rule);
        expect_equal({.past = 4, .tokens = 2, .options = options}, rule);
      }
}

TEST(Attention, PackedSequencesCannotContinueACache) {
  const AttentionContext context(torch::zeros({1, 2}, torch::kInt64), 3, {}, torch::zeros({1, 2}, torch::kInt64));
  EXPECT_THROW(context.allowed(0), Error);
}

}  // namespace
}  // namespace moiety
