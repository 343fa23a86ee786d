#include "moiety/io/low_rank_sparse.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>
#include <map>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/safetensors.h"

namespace moiety {
namespace {

struct Stored {
  std::vector<int64_t> shape;
  std::vector<float> values;
  std::vector<int64_t> integers;  // instead of values
};

std::string stored(const TemporaryFolder& folder, const std::map<std::string, Stored>& tensors) {
  write_file(folder / "config.json", R"({"model_type": "mixtral", "moiety": {"low_rank_sparse": {"rank": 2}}})");
  std::vector<TensorInfo> infos;
  for (const auto& [name, t] : tensors)
    infos.push_back({name, t.integers.empty() ? Format::F32 : Format::I64, t.shape});
  SafetensorsWriter writer(folder / "model.safetensors", infos);
  for (const auto& [name, t] : tensors)
    writer.write(name, t.integers.empty() ? std::as_bytes(std::span(t.values)) : std::as_bytes(std::span(t.integers)));
  writer.finish();
  return folder.path().string();
}

std::map<std::string, Stored> matrix() {
  return {{"w.left", {{3, 1}, {1.f, 2.f, 3.f}, {}}},
          {"w.right", {{1, 2}, {10.f, 20.f}, {}}},
          {"w.rows", {{1, 2}, {0.5f, -0.5f}, {}}},
          {"w.index", {{1}, {}, {2}}}};
}

TEST(LowRankSparse, MatricesAreWholeWhereTheyAreRead) {
  const TemporaryFolder folder;
  const auto checkpoint = Checkpoint::open(stored(folder, matrix()));
  ASSERT_EQ(checkpoint->tensors().size(), 1u);
  EXPECT_EQ(checkpoint->get("w.weight").to_float(), (std::vector<float>{10.f, 20.f, 20.f, 40.f, 30.5f, 59.5f}));
  EXPECT_FALSE(checkpoint->config().contains("moiety"));
  EXPECT_FALSE(checkpoint->has("w.left"));
}

RC_GTEST_PROP(LowRankSparse, IsTheSumOfItsHalves, ()) {
  const auto out = *rc::gen::inRange<int64_t>(1, 9), in = *rc::gen::inRange<int64_t>(1, 9),
             rank = *rc::gen::inRange<int64_t>(1, 5), n = *rc::gen::inRange<int64_t>(1, out + 1);
  RandomStream random(*rc::gen::arbitrary<uint64_t>(), "halves");
  const auto some = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (auto& x : v) x = static_cast<float>(random.uniform()) - 0.5f;
    return v;
  };
  std::vector<int64_t> index(static_cast<size_t>(out));
  for (int64_t i = 0; i < out; ++i) index[static_cast<size_t>(i)] = i;
  random.shuffle(index);
  index.resize(static_cast<size_t>(n));
  std::sort(index.begin(), index.end());
  const auto left = some(out * rank), right = some(rank * in), rows = some(n * in);
  const TemporaryFolder folder;
  const auto got = Checkpoint::open(stored(folder, {{"w.left", {{out, rank}, left, {}}},
                                                    {"w.right", {{rank, in}, right, {}}},
                                                    {"w.rows", {{n, in}, rows, {}}},
                                                    {"w.index", {{n}, {}, index}}}))
                       ->get("w.weight")
                       .to_float();
  for (int64_t i = 0; i < out; ++i) {
    const auto at = std::find(index.begin(), index.end(), i);
    for (int64_t j = 0; j < in; ++j) {
      double want = at == index.end() ? 0.0 : rows[static_cast<size_t>((at - index.begin()) * in + j)];
      for (int64_t k = 0; k < rank; ++k)
        want += static_cast<double>(left[static_cast<size_t>(i * rank + k)]) * right[static_cast<size_t>(k * in + j)];
      RC_ASSERT(std::abs(got[static_cast<size_t>(i * in + j)] - want) < 1e-5);
    }
  }
}

TEST(LowRankSparse, WhatDoesNotFitIsNamed) {
  const auto refusal = [](const std::string& name, const Stored& instead) {
    const TemporaryFolder folder;
    auto tensors = matrix();
    tensors[name] = instead;
    return message_of([&] { Checkpoint::open(stored(folder, tensors))->get("w.weight"); });
  };
  EXPECT_NE(refusal("w.right", {{2, 1}, {1.f, 2.f}, {}}).find("do not make one matrix"), std::string::npos);
  EXPECT_NE(refusal("w.rows", {{4, 2}, std::vector<float>(8), {}}).find("do not make one matrix"), std::string::npos);
  EXPECT_NE(refusal("w.left", {{3}, {1.f, 2.f, 3.f}, {}}).find("do not make one matrix"), std::string::npos);
  EXPECT_NE(refusal("w.index", {{1}, {}, {3}}).find("3 is no row of 3"), std::string::npos);
  EXPECT_NE(refusal("w.index", {{1}, {}, {-1}}).find("-1 is no row of 3"), std::string::npos);
  EXPECT_NE(refusal("w.index", {{1}, {2.f}, {}}).find("64-bit integers"), std::string::npos);
  EXPECT_NE(refusal("w.weight", {{3, 2}, std::vector<float>(6), {}}).find("whole and in parts"), std::string::npos);
  const TemporaryFolder folder;
  auto tensors = matrix();
  tensors.erase("w.rows");
  EXPECT_NE(message_of([&] { Checkpoint::open(stored(folder, tensors)); }).find("lacks 'w.rows'"), std::string::npos);
}

}  // namespace
}  // namespace moiety
