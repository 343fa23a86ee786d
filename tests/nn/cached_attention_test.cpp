// Attention over keys and values as a cache keeps them, against the composite over the same numbers.
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include "moiety/nn/attention.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

using torch::Tensor;

double difference(const Tensor& q, const CacheRows& k, const CacheRows& v, const AttentionContext& context,
                  const AttentionOptions& options) {
  const torch::NoGradGuard frozen;
  const auto found = attend(q, k, v, context, options);
  const WithoutShortcuts composite;
  const auto want = attend(q, k.widened(torch::kFloat32), v.widened(torch::kFloat32), context, options);
  EXPECT_EQ(found.sizes(), want.sizes());
  return (found - want).abs().max().item<double>();
}

RC_GTEST_PROP(CachedAttention, EqualsItsComposite, ()) {
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1 << 20));
  const auto format = [] {
    return *rc::gen::element<std::optional<Format>>(std::nullopt, Format::F32, Format::BF16, Format::F16, Format::Q8_0);
  };
  const auto size = [] { return 32 * *rc::gen::inRange<int64_t>(1, 5); };
  const auto batch = *rc::gen::inRange<int64_t>(1, 4), shared = *rc::gen::inRange<int64_t>(1, 4),
             groups = *rc::gen::inRange<int64_t>(1, 4), past = *rc::gen::inRange<int64_t>(0, 120),
             tokens = *rc::gen::inRange<int64_t>(1, 20), keys = size(), values = size();
  KvCache cache(1, {format(), format()});
  const auto fill = [&](int64_t count) {
    return cache.store(0, torch::randn({batch, shared, count, keys}), torch::randn({batch, shared, count, values}));
  };
  if (past > 0) fill(past);
  const auto [k, v] = fill(tokens);
  Tensor padding;
  if (*rc::gen::arbitrary<bool>()) padding = torch::rand({batch, past + tokens}) > 0.3;
  const auto positions = (torch::arange(tokens, torch::kInt64) + past).expand({batch, tokens});
  const AttentionContext context(positions, past, padding, {});
  AttentionOptions options{.scale = 0.2, .window = *rc::gen::element<int64_t>(0, 5, 40), .softcap = 0.0, .sinks = {}};
  if (*rc::gen::arbitrary<bool>()) options.softcap = 4.0;
  if (*rc::gen::arbitrary<bool>()) options.sinks = torch::randn({shared * groups});
  RC_ASSERT(difference(torch::randn({batch, shared * groups, tokens, keys}), k, v, context, options) < 5e-6);
}

// So many numbers that only some heads of one row are widened at a time.
TEST(CachedAttention, EqualsItsCompositeInPieces) {
  torch::manual_seed(1);
  const int64_t past = 6000, tokens = 9, shared = 3;
  for (const Format format : {Format::F16, Format::Q8_0}) {
    KvCache cache(1, {format, format});
    const auto x = torch::randn({2, shared, past + tokens, 64});
    const auto [k, v] = cache.store(0, x, x.flip(2));
    const auto positions = (torch::arange(tokens, torch::kInt64) + past).expand({2, tokens});
    const AttentionContext context(positions, past, {}, {});
    AttentionOptions options{.scale = 0.2, .window = 0, .softcap = 0.0, .sinks = {}};
    for (const bool sinks : {false, true}) {
      if (sinks) options.sinks = torch::randn({2 * shared});
      EXPECT_LT(difference(torch::randn({2, 2 * shared, tokens, 64}), k, v, context, options), 5e-6);
    }
  }
}

TEST(CachedAttention, GradientsFlowThroughACacheOfHalves) {
  torch::manual_seed(2);
  KvCache cache(1, {Format::F16, Format::BF16});
  const auto q = torch::randn({1, 4, 3, 32}), k = torch::randn({1, 2, 3, 32}).requires_grad_(true),
             v = torch::randn({1, 2, 3, 32}).requires_grad_(true);
  const AttentionContext context(torch::arange(3, torch::kInt64).unsqueeze(0), 0, {}, {});
  const AttentionOptions options{.scale = 0.2, .window = 0, .softcap = 0.0, .sinks = {}};
  const auto weight = torch::randn({1, 4, 3, 32});
  const auto gradients = [&](const Tensor& y) { return torch::autograd::grad({(y * weight).sum()}, {k, v}); };
  const auto [held_k, held_v] = cache.store(0, k, v);
  const auto found = gradients(attend(q, held_k, held_v, context, options)),
             want = gradients(attend(q, k, v, context, options));
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_GT(want[i].abs().max().item<double>(), 0.1);
    EXPECT_LT((found[i] - want[i]).abs().max().item<double>(), 0.02);  // a bf16 has 8 bits
  }
}

}  // namespace
}  // namespace moiety
