// The cache against a list of tokens for each row.
#include "moiety/nn/kv_cache.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kHeads = 2, kKeys = 3, kValues = 5;

std::pair<Tensor, Tensor> keys_values(int64_t batch, int64_t tokens) {
  return {torch::randn({batch, kHeads, tokens, kKeys}), torch::randn({batch, kHeads, tokens, kValues})};
}

// A cache beside the plain tensors that it must hold.
struct Twin {
  KvCache cache{2};
  Tensor k[2], v[2], mask, next;

  explicit Twin(int64_t batch) {
    for (int s = 0; s < 2; ++s) std::tie(k[s], v[s]) = keys_values(batch, 0);
    mask = torch::empty({batch, 0}, torch::kBool);
    next = torch::zeros({batch}, torch::kInt64);
  }
  void pass(int64_t tokens) {
    const int64_t batch = mask.size(0);
    for (int s = 0; s < 2; ++s) {
      const auto [a, b] = keys_values(batch, tokens);
      k[s] = torch::cat({k[s], a}, 2);
      v[s] = torch::cat({v[s], b}, 2);
      const auto held = cache.append(s, a, b);
      RC_ASSERT(torch::equal(held.first, k[s]));
      RC_ASSERT(torch::equal(held.second, v[s]));
    }
    const auto real = torch::rand({batch, tokens}) > 0.3;
    mask = torch::cat({mask, real}, 1);
    next = mask.sum(1);
    cache.advance(tokens, mask, next);
  }
  void crop(int64_t length) {
    for (int s = 0; s < 2; ++s) {
      k[s] = k[s].slice(2, 0, length);
      v[s] = v[s].slice(2, 0, length);
    }
    mask = mask.slice(1, 0, length);
    next = mask.sum(1);
    cache.crop(length);
  }
  void select(const Tensor& rows) {
    for (int s = 0; s < 2; ++s) {
      k[s] = k[s].index_select(0, rows);
      v[s] = v[s].index_select(0, rows);
    }
    mask = mask.index_select(0, rows);
    next = next.index_select(0, rows);
    cache.select(rows);
  }
  void check_state() {
    RC_ASSERT(cache.length() == mask.size(1));
    if (!cache.mask().defined()) return;  // before the first pass
    RC_ASSERT(torch::equal(cache.mask(), mask));
    RC_ASSERT(torch::equal(cache.next_position(), next));
  }
};

RC_GTEST_PROP(KvCache, HoldsWhatAListOfTokensHolds, ()) {
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1 << 20));
  Twin twin(*rc::gen::inRange<int64_t>(1, 4));
  const auto steps = *rc::gen::inRange(1, 12);
  for (int i = 0; i < steps; ++i) {
    const int64_t batch = twin.mask.size(0), length = twin.cache.length();
    switch (*rc::gen::inRange(0, 5)) {
      case 0:
        twin.crop(*rc::gen::inRange<int64_t>(0, length + 1));
        break;
      case 1: {
        const auto count = *rc::gen::inRange<int64_t>(1, 5);
        twin.select(torch::randint(batch, {count}, torch::kInt64));
        break;
      }
      case 2: {
        // A fork goes its own way; the original must not notice.
        Twin fork = twin;
        fork.cache = twin.cache.fork();
        fork.pass(*rc::gen::inRange<int64_t>(1, 80));
        fork.check_state();
        break;
      }
      default:
        twin.pass(*rc::gen::inRange<int64_t>(1, 90));  // longer than what is set aside at first
    }
    twin.check_state();
  }
  twin.pass(1);
  twin.check_state();
}

TEST(KvCache, CropCountsRealTokensOnly) {
  KvCache cache(1);
  const auto [k, v] = keys_values(2, 4);
  cache.append(0, k, v);
  const auto mask = torch::tensor({{0, 1, 1, 1}, {1, 1, 0, 0}}, torch::kBool);
  cache.advance(4, mask, torch::tensor({3, 2}, torch::kInt64));
  cache.crop(3);
  EXPECT_EQ(cache.length(), 3);
  EXPECT_TRUE(torch::equal(cache.next_position(), torch::tensor({2, 2}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(cache.mask(), mask.slice(1, 0, 3)));
}

TEST(KvCache, CropWithoutAMaskMovesEveryRow) {
  KvCache cache(1);
  const auto [k, v] = keys_values(2, 4);
  cache.append(0, k, v);
  cache.advance(4, {}, torch::tensor({4, 9}, torch::kInt64));
  cache.crop(1);
  EXPECT_TRUE(torch::equal(cache.next_position(), torch::tensor({1, 6}, torch::kInt64)));
  EXPECT_FALSE(cache.mask().defined());
}

TEST(KvCache, SlotsGrowOnDemandAndDifferInLength) {
  KvCache cache(0);
  const auto [k, v] = keys_values(1, 3);
  EXPECT_EQ(cache.append(4, k, v).first.size(2), 3);
  EXPECT_EQ(cache.append(1, k.narrow(2, 0, 1), v.narrow(2, 0, 1)).first.size(2), 1);
  EXPECT_EQ(cache.append(4, k, v).second.size(2), 6);
  EXPECT_GT(cache.bytes(), 0);
}

TEST(KvCache, ErrorsSayWhatIsHeld) {
  KvCache cache(1);
  const auto [k, v] = keys_values(2, 3);
  cache.append(0, k, v);
  cache.advance(3, {}, torch::tensor({3, 3}, torch::kInt64));
  EXPECT_THROW(cache.crop(4), Error);
  EXPECT_THROW(cache.crop(-1), Error);
  const auto [k3, v3] = keys_values(3, 1);
  EXPECT_THROW(cache.append(0, k3, v3), Error);
}

}  // namespace
}  // namespace moiety
