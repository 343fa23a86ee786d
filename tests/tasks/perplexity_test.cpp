#include "moiety/tasks/perplexity.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "fake_model.h"
#include "moiety/tasks/scoring.h"

namespace moiety {
namespace {

std::vector<int64_t> some_ids(int64_t n, int64_t vocabulary) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back((i * i * 7 + 3 * i + 1) % vocabulary);
  return ids;
}

/// The definition, token by token: the first window whose predicted range holds token t scores it.
double brute_force(const FakeModel& model, const std::vector<int64_t>& ids, int64_t context, int64_t stride,
                   int64_t bos, int64_t* scored) {
  const auto n = static_cast<int64_t>(ids.size());
  const int64_t base = bos >= 0 ? 0 : 1;
  double nll = 0.0;
  *scored = 0;
  for (int64_t t = base; t < n; ++t) {
    int64_t k = 0;
    while (t >= base + k * stride + context) ++k;
    std::vector<int64_t> prefix;
    if (bos >= 0) prefix.push_back(bos);
    for (int64_t i = k * stride; i < t; ++i) prefix.push_back(ids[static_cast<size_t>(i)]);
    nll -= model.logprob(prefix, ids[static_cast<size_t>(t)]);
    ++*scored;
  }
  return nll;
}

RC_GTEST_PROP(Perplexity, SlidingWindowsFollowTheDefinition, ()) {
  const auto n = *rc::gen::inRange<int64_t>(2, 60), context = *rc::gen::inRange<int64_t>(1, 20);
  const auto stride = *rc::gen::inRange<int64_t>(1, context + 1), batch = *rc::gen::inRange<int64_t>(1, 5);
  const int64_t bos = *rc::gen::arbitrary<bool>() ? 2 : -1;
  FakeModel model(11, 32);
  const auto ids = some_ids(n, 11);
  PerplexityOptions options;
  options.context = context;
  options.stride = stride;
  options.batch_size = batch;
  const auto result = perplexity_of_ids(model, ids, bos, {}, options);
  int64_t scored = 0;
  const double nll = brute_force(model, ids, context, stride, bos, &scored);
  RC_ASSERT(result.tokens == scored);
  RC_ASSERT(std::abs(result.nll - nll) < 1e-4 * static_cast<double>(n));
  RC_ASSERT(std::abs(result.perplexity() - std::exp(nll / static_cast<double>(scored))) < 1e-3);
  RC_ASSERT(model.largest_batch <= batch);
}

TEST(Perplexity, LlamaCppScoresTheSecondHalf) {
  FakeModel model(11, 32);
  for (const int64_t bos : {int64_t{-1}, int64_t{2}}) {
    for (const int64_t context : {8, 9}) {
      const auto ids = some_ids(3 * context + 5, 11);
      PerplexityOptions options;
      options.method = PerplexityOptions::llama_cpp;
      options.context = context;
      const auto result = perplexity_of_ids(model, ids, bos, {}, options);
      double nll = 0.0;
      int64_t count = 0;
      for (int64_t w = 0; w < 3; ++w) {
        std::vector<int64_t> window(ids.begin() + w * context, ids.begin() + (w + 1) * context);
        if (bos >= 0) window[0] = bos;
        for (int64_t j = context / 2; j < context - 1; ++j, ++count)
          nll -= model.logprob({window.begin(), window.begin() + j + 1}, window[static_cast<size_t>(j + 1)]);
      }
      EXPECT_EQ(result.windows, 3);
      EXPECT_EQ(result.tokens, count);
      EXPECT_EQ(result.tokens, 3 * (context - context / 2 - 1));
      EXPECT_NEAR(result.nll, nll, 1e-4);
    }
  }
}

TEST(Perplexity, NumbersOfTheResult) {
  PerplexityResult r;
  r.tokens = 4;
  r.bytes = 10;
  r.nll = 8.0;
  r.nll_squared = 1 + 1 + 9 + 9;  // nlls 1, 1, 3, 3
  EXPECT_DOUBLE_EQ(r.perplexity(), std::exp(2.0));
  EXPECT_DOUBLE_EQ(r.bits_per_byte(), 8.0 / std::log(2.0) / 10.0);
  EXPECT_DOUBLE_EQ(r.bits_per_token(), 2.0 / std::log(2.0));
  // Mean 2, variance over n - 1: 4/3, standard error sqrt(4/3/4).
  EXPECT_NEAR(r.perplexity_stderr(), std::exp(2.0) * std::sqrt(1.0 / 3.0), 1e-12);
}

TEST(Perplexity, BytesAreThoseOfScoredTokens) {
  FakeModel model(11, 32);
  const auto ids = some_ids(20, 11);
  std::vector<int64_t> before = {0};
  for (int64_t i = 0; i < 20; ++i) before.push_back(before.back() + 1 + i);
  PerplexityOptions options;
  options.context = 8;
  EXPECT_EQ(perplexity_of_ids(model, ids, 2, before, options).bytes, before.back());
  EXPECT_EQ(perplexity_of_ids(model, ids, -1, before, options).bytes, before.back() - 1);
}

TEST(Perplexity, BadSettingsAreErrors) {
  FakeModel model(11, 32);
  PerplexityOptions options;
  options.context = 33;
  EXPECT_THROW(perplexity_of_ids(model, some_ids(50, 11), -1, {}, options), Error);
  options.context = 8;
  options.stride = 9;
  EXPECT_THROW(perplexity_of_ids(model, some_ids(50, 11), -1, {}, options), Error);
  options.stride = 0;
  EXPECT_THROW(perplexity_of_ids(model, {4}, -1, {}, options), Error);
  options.method = PerplexityOptions::llama_cpp;
  EXPECT_THROW(perplexity_of_ids(model, some_ids(7, 11), -1, {}, options), Error);
}

TEST(Scoring, GreedyTakesTheLowestIndexAmongEquals) {
  struct Flat : FakeModel {
    using FakeModel::FakeModel;
    torch::Tensor forward(const torch::Tensor& ids, Pass&) override {
      auto y = torch::zeros({ids.size(0), ids.size(1), 4});
      y.select(2, 1).fill_(3.f);
      y.select(2, 3).fill_(3.f);
      return y;
    }
  } model(4, 32);
  const auto s = score_tokens(model, torch::tensor({{0, 1, 3, 2}}, torch::kInt64), {}, 0, true);
  EXPECT_TRUE(s.greedy[0][0].item<bool>());
  EXPECT_FALSE(s.greedy[0][1].item<bool>());
  EXPECT_FALSE(s.greedy[0][2].item<bool>());
}

}  // namespace
}  // namespace moiety
