#include "moiety/io/edge_experts.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/safetensors.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

// Odd sizes: rows end inside of bytes, experts inside of words.
EdgeLayout layout_of(std::vector<int64_t> bits, bool bf16 = false) {
  return {{1, 3}, 3, 5, 7, std::move(bits), bf16, "abc"};
}

EdgeExpert expert_of(int64_t layer, int64_t expert) {
  RandomStream random(static_cast<uint64_t>(10 * layer + expert), "expert");
  EdgeExpert e;
  for (auto* m : {&e.gate, &e.up, &e.down})
    for (int i = 0; i < 35; ++i) m->push_back(static_cast<float>(random.normal()));
  return e;
}

// A model file that holds keys and one tensor that no expert is.
std::filesystem::path written(const TemporaryFolder& folder, const EdgeLayout& layout,
                              Int2Scale int2 = Int2Scale::max) {
  const auto path = folder / "m.gguf";
  GgufWriter w(path);
  w.set("general.architecture", std::string("llama"));
  write_edge_keys(w, layout);
  w.declare({"x", Format::F32, {1}});
  const float one = 1.0f;
  w.write("x", std::as_bytes(std::span(&one, 1)));
  w.finish();
  write_edge_experts(edge_experts_path(path), layout, int2, expert_of);
  return path;
}

std::shared_ptr<const EdgeExperts> opened(const std::filesystem::path& path) {
  return EdgeExperts::open(*GgufFile::open(path), path);
}

TEST(EdgeExperts, GivesBackWhatEveryWidthKeeps) {
  const TemporaryFolder folder;
  for (const auto int2 : {Int2Scale::max, Int2Scale::fit}) {
    const auto layout = layout_of({2, 4, 8, 16, 32, 2});
    const auto path = written(folder, layout, int2);
    const auto experts = opened(path);
    ASSERT_EQ(experts->layout().bits, layout.bits);
    for (int64_t l = 0; l < 2; ++l)
      for (int64_t e = 0; e < 3; ++e) {
        std::vector<float> got[3];
        std::array<std::byte*, 3> to{};
        for (size_t p = 0; p < 3; ++p) {
          got[p].resize(35);
          to[p] = reinterpret_cast<std::byte*>(got[p].data());
        }
        experts->decode(l, e, experts->stored(l, e), to);
        const EdgeExpert wanted = expert_of(l, e);
        const std::vector<float>* from[] = {&wanted.gate, &wanted.up, &wanted.down};
        for (size_t p = 0; p < 3; ++p) {
          auto w = *from[p];
          round_to_width(w, p == 2 ? 7 : 5, layout.bits[static_cast<size_t>(3 * l + e)], int2);
          EXPECT_EQ(got[p], w) << l << " " << e << " " << p;
        }
      }
  }
}

TEST(EdgeExperts, OneReadFetchesAnExpert) {
  const TemporaryFolder folder;
  const auto layout = layout_of({2, 4, 8, 16, 32, 2});
  const auto experts = opened(written(folder, layout));
  int64_t end = 0;
  for (int64_t l = 0; l < 2; ++l)
    for (int64_t e = 0; e < 3; ++e) {
      const auto r = experts->range(l, e);
      EXPECT_EQ(r.bytes, layout.stored_bytes(layout.bits[static_cast<size_t>(3 * l + e)]));
      EXPECT_EQ(r.offset % 8, 0);
      EXPECT_TRUE(end == 0 || (r.offset >= end && r.offset < end + 8));
      end = r.offset + r.bytes;
    }
  // 2 bits: 7 + 7 + 5 scales, rows of 2, 2 and 2 bytes.
  EXPECT_EQ(layout.stored_bytes(2), 2 * 19 + 2 * 19);
  EXPECT_EQ(layout.stored_bytes(32), 4 * 105);
}

TEST(EdgeExperts, DecodesToBf16) {
  const TemporaryFolder folder;
  const auto experts = opened(written(folder, layout_of({4, 4, 4, 4, 4, 4}, true)));
  std::vector<uint16_t> down(35);
  experts->decode(1, 2, experts->stored(1, 2), {nullptr, nullptr, reinterpret_cast<std::byte*>(down.data())});
  auto w = expert_of(1, 2).down;
  round_to_width(w, 7, 4, Int2Scale::max);
  for (size_t i = 0; i < w.size(); ++i) EXPECT_EQ(down[i], float_to_bf16(w[i]));
}

TEST(EdgeExperts, ModelsWithoutTheKeyHaveNone) {
  const TemporaryFolder folder;
  const auto path = folder / "m.gguf";
  GgufWriter w(path);
  w.set("general.architecture", std::string("llama"));
  w.finish();
  EXPECT_EQ(opened(path), nullptr);
}

TEST(EdgeExperts, RefusesFilesThatDoNotBelongTogether) {
  const TemporaryFolder folder;
  const auto layout = layout_of({2, 4, 8, 16, 32, 2});
  const auto path = written(folder, layout), experts = edge_experts_path(path);
  auto other = layout;
  other.router_hash = "another";
  write_edge_experts(experts, other, Int2Scale::max, expert_of);
  EXPECT_NE(message_of([&] { opened(path); }).find("another model"), std::string::npos);
  other = layout;
  other.bits[0] = 4;
  write_edge_experts(experts, other, Int2Scale::max, expert_of);
  EXPECT_NE(message_of([&] { opened(path); }).find("blk.1.ffn_gate.0.q"), std::string::npos);
  std::filesystem::remove(experts);
  EXPECT_NE(message_of([&] { opened(path); }).find("m.experts.safetensors"), std::string::npos);
}

TEST(EdgeExperts, RefusesKeysThatCannotBe) {
  const TemporaryFolder folder;
  for (const auto& bits : std::vector<std::vector<int64_t>>{{2, 4}, {2, 4, 8, 16, 32, 3}}) {
    const auto path = folder / "m.gguf";
    GgufWriter w(path);
    w.set("general.architecture", std::string("llama"));
    write_edge_keys(w, layout_of(bits));
    w.finish();
    EXPECT_NE(message_of([&] { opened(path); }).find("edgemoe.bits"), std::string::npos);
  }
}

TEST(EdgeExperts, NamesTheRowThatCannotBeQuantized) {
  const TemporaryFolder folder;
  const auto file = folder / "e.safetensors";
  const auto said = message_of([&] {
    write_edge_experts(file, layout_of({2, 4, 8, 16, 32, 2}), Int2Scale::max, [](int64_t l, int64_t e) {
      auto x = expert_of(l, e);
      if (l == 1 && e == 2) x.up[3] = 1e9f;
      return x;
    });
  });
  EXPECT_NE(said.find("layer 1, expert 2, up"), std::string::npos) << said;
  EXPECT_FALSE(std::filesystem::exists(file));
}

}  // namespace
}  // namespace moiety
