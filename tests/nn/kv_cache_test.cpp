// The cache against a list of tokens for each row.
#include "moiety/nn/kv_cache.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <tuple>

#include "message_of.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kHeads = 2, kKeys = 3, kValues = 5;

std::pair<Tensor, Tensor> keys_values(int64_t batch, int64_t tokens, int64_t keys = kKeys, int64_t values = kValues) {
  return {torch::randn({batch, kHeads, tokens, keys}), torch::randn({batch, kHeads, tokens, values})};
}

using Kept = std::optional<Format>;

// What is left of numbers that are kept in a format.
Tensor rounded(const Tensor& x, Kept format) {
  if (!format) return x;
  auto out = x.clone();
  const int64_t size = x.size(-1), rows = size == 0 ? 0 : x.numel() / size;
  std::vector<std::byte> row(static_cast<size_t>(row_bytes(*format, size)));
  for (int64_t r = 0; r < rows; ++r) {
    quantize_row(*format, x.const_data_ptr<float>() + r * size, row.data(), size);
    dequantize_row(*format, row.data(), out.data_ptr<float>() + r * size, size);
  }
  return out;
}

rc::Gen<Kept> formats_of_caches() {
  return rc::gen::element<Kept>(std::nullopt, Format::F32, Format::BF16, Format::F16, Format::Q8_0);
}

int64_t size_for(Kept format, int64_t size) {
  return format == Format::Q8_0 ? 32 * size : size;
}

// A cache beside the plain tensors that it must hold.
struct Twin {
  CacheFormats formats;
  KvCache cache;
  Tensor k[2], v[2], mask, next;

  Twin(int64_t batch, CacheFormats kept) : formats(kept), cache(2, kept) {
    for (int s = 0; s < 2; ++s) std::tie(k[s], v[s]) = fresh(batch, 0);
    mask = torch::empty({batch, 0}, torch::kBool);
    next = torch::zeros({batch}, torch::kInt64);
  }
  std::pair<Tensor, Tensor> fresh(int64_t batch, int64_t tokens) const {
    return keys_values(batch, tokens, size_for(formats.k, kKeys), size_for(formats.v, kValues));
  }
  void pass(int64_t tokens) {
    const int64_t batch = mask.size(0);
    for (int s = 0; s < 2; ++s) {
      const auto [a, b] = fresh(batch, tokens);
      k[s] = torch::cat({k[s], rounded(a, formats.k)}, 2);
      v[s] = torch::cat({v[s], rounded(b, formats.v)}, 2);
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
  Twin twin(*rc::gen::inRange<int64_t>(1, 4), {*formats_of_caches(), *formats_of_caches()});
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

// What a caller writes at the place of a new position is what the cache holds there.
TEST(KvCache, PlacesAreWhereTheRowsLie) {
  for (const Kept format : {Kept{}, Kept{Format::F16}, Kept{Format::Q8_0}}) {
    KvCache cache(1, {format, format});
    const auto [k, v] = keys_values(2, 70, 32, 64);
    cache.append(0, k, v);
    const auto [key_place, value_place] = cache.extend_in_place(0, 2, kHeads, 1, 32, 64, k.options());
    EXPECT_EQ(key_place.length, 71);
    const auto [one_k, one_v] = keys_values(2, 1, 32, 64);
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t h = 0; h < kHeads; ++h)
        for (const auto& [place, from, size] : {std::tuple(key_place, one_k, 32), std::tuple(value_place, one_v, 64)})
          quantize_row(place.format, from[b][h][0].const_data_ptr<float>(),
                       place.at(b, h) + 70 * row_bytes(place.format, size), size);
    const auto [none_k, none_v] = keys_values(2, 0, 32, 64);
    const auto [keys, values] = cache.append(0, none_k, none_v);
    EXPECT_TRUE(torch::equal(keys, torch::cat({rounded(k, format), rounded(one_k, format)}, 2)));
    EXPECT_TRUE(torch::equal(values, torch::cat({rounded(v, format), rounded(one_v, format)}, 2)));
  }
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

TEST(KvCache, StatesOfFinishedPassesCount) {
  KvCache cache(1, {Format::Q8_0, Format::Q8_0});
  const auto held = [](double value) { return std::vector<Tensor>{torch::full({2, 3}, value)}; };
  EXPECT_TRUE(cache.state(0, 2).empty());
  cache.set_state(0, held(1), 4);
  EXPECT_TRUE(cache.state(0, 2).empty());  // the pass still runs
  cache.advance(4, {}, torch::tensor({4, 4}, torch::kInt64));
  EXPECT_TRUE(torch::equal(cache.state(0, 2)[0], held(1)[0]));
  EXPECT_NE(message_of([&] { cache.state(0, 3); }).find("holds 2 rows but this pass has 3"), std::string::npos);
  EXPECT_NE(message_of([&] { cache.state(5, 2); }).find("no state"), std::string::npos);
  cache.set_state(0, held(2), 2);
  cache.advance(2, {}, torch::tensor({6, 6}, torch::kInt64));
  EXPECT_EQ(cache.bytes(), 2 * 6 * 4);
  auto fork = cache.fork();
  fork.crop(4);
  EXPECT_TRUE(torch::equal(fork.state(0, 2)[0], held(1)[0]));
  EXPECT_TRUE(torch::equal(cache.state(0, 2)[0], held(2)[0]));
  EXPECT_TRUE(cache.can_crop(0));
  EXPECT_FALSE(cache.can_crop(2));
  EXPECT_FALSE(cache.can_crop(7));
  EXPECT_THROW(cache.crop(2), Error);
  EXPECT_EQ(cache.length(), 6);
  // Of a pass that ended in an error.
  cache.set_state(0, held(3), 5);
  EXPECT_TRUE(torch::equal(cache.state(0, 2)[0], held(2)[0]));
  cache.crop(6);
  EXPECT_TRUE(torch::equal(cache.state(0, 2)[0], held(2)[0]));
  cache.select(torch::tensor({1}, torch::kInt64));
  EXPECT_EQ(cache.state(0, 1)[0].size(0), 1);
  cache.crop(0);
  EXPECT_TRUE(cache.state(0, 7).empty());
}

RC_GTEST_PROP(KvCache, WhatIsKeptIsAsNearAsTheFormatAllows, ()) {
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1 << 20));
  const auto format = *rc::gen::element(Format::BF16, Format::F16, Format::Q8_0);
  const double scale = std::exp2(*rc::gen::inRange(-8, 9));
  KvCache cache(1, {format, format});
  const auto tokens = *rc::gen::inRange<int64_t>(1, 40);
  const auto k = torch::randn({2, kHeads, tokens, 64}) * scale, v = torch::randn({2, kHeads, tokens, 32}) * scale;
  const auto [held_k, held_v] = cache.append(0, k, v);
  for (const auto& [held, x] : {std::pair{held_k, k}, {held_v, v}}) {
    const auto off = (held - x).abs();
    if (format == Format::Q8_0) {
      // Half a step of 1 / 127 of the largest, and what the step loses as a half: 127 times 2^-11 of it, or 2^-25 where
      // it is below the normal halves.
      const auto most = x.unflatten(-1, {-1, 32}).abs().amax(-1, true);
      RC_ASSERT((off.unflatten(-1, {-1, 32}) <= most * (0.5 / 127 + std::exp2(-11)) * 1.001 + 127 * std::exp2(-25))
                    .all()
                    .item<bool>());
    } else {
      const double part = std::exp2(format == Format::F16 ? -11 : -8);
      RC_ASSERT((off <= x.abs() * part + std::exp2(-25)).all().item<bool>());
    }
  }
}

TEST(KvCache, OtherTypesTakeLessMemory) {
  const auto k = torch::randn({1, 2, 9, 64});
  const auto bytes = [&](Kept keys, Kept values) {
    KvCache cache(1, {keys, values});
    cache.append(0, k, k);
    return cache.bytes();
  };
  const int64_t f32 = bytes({}, {});
  EXPECT_EQ(bytes(Format::F32, Format::F32), f32);
  EXPECT_EQ(bytes(Format::F16, Format::BF16), f32 / 2);
  EXPECT_EQ(bytes(Format::Q8_0, Format::Q8_0), f32 * 34 / 128);
  EXPECT_EQ(bytes(Format::Q8_0, {}), (f32 * 34 / 128 + f32) / 2);
}

TEST(KvCache, ErrorsSayWhatAFormatCannotHold) {
  const auto store = [](Format format, const Tensor& x) {
    KvCache cache(1, {format, format});
    return message_of([&] { cache.store(0, x, x); });
  };
  EXPECT_EQ(
      store(Format::Q8_0, torch::zeros({1, 1, 2, 20})),
      "a cache of Q8_0 has blocks of 32 numbers, and keys of this model have 20 a head: keep them as F16, BF16 or "
      "F32");
  EXPECT_NE(store(Format::F16, torch::full({1, 1, 40, 20}, 1e6)).find("F16 holds at most 65504"), std::string::npos);
  EXPECT_NE(store(Format::Q8_0, torch::full({1, 1, 2, 32}, NAN)).find("finite"), std::string::npos);
  EXPECT_NE(store(Format::Q8_0, torch::zeros({1, 1, 2, 32}).requires_grad_(true)).find("no gradient"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
