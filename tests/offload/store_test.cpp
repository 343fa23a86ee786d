// Reads and the store: the right bytes by every way, limits, and clear errors when files fail.
#include "moiety/offload/store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <future>
#include <mutex>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"

namespace moiety {
namespace {

// Experts are random bytes; piece p of an expert begins anywhere.
class Bytes : public ExpertSource {
 public:
  Bytes(const TemporaryFolder& folder, int64_t layers, int64_t experts, int64_t bytes)
      : layers_(layers), experts_(experts), bytes_(bytes) {
    files_ = {folder / "experts.bin"};
    std::string all(static_cast<size_t>(layers * experts * 3 * (bytes + 13) + 7), '\0');
    RandomStream random(1, "bytes");
    for (auto& c : all) c = static_cast<char>(random.bits());
    write_file(files_[0], all);
    content = all;
  }
  int64_t layers() const override { return layers_; }
  int64_t experts() const override { return experts_; }
  bool has_low() const override { return false; }
  const std::vector<std::filesystem::path>& files() const override { return files_; }
  std::vector<StoredPiece> pieces(const ExpertVersion& v) const override {
    std::vector<StoredPiece> out;
    for (int64_t p = 0; p < 3; ++p)
      out.push_back({0, 7 + ((v.layer * experts_ + v.expert) * 3 + p) * (bytes_ + 13), bytes_});
    return out;
  }
  SlotMatrix matrix(const ExpertVersion&, int) const override { return {}; }
  int64_t slot_bytes(Precision) const override { return 3 * bytes_; }
  void unpack(const ExpertVersion&, size_t piece, std::span<const std::byte> bytes, std::byte* slot) const override {
    std::memcpy(slot + static_cast<int64_t>(piece) * bytes_, bytes.data(), bytes.size());
  }
  bool right(const ExpertVersion& v, const std::byte* slot) const {
    size_t at = 0;
    for (const StoredPiece& p : pieces(v)) {
      if (std::memcmp(slot + at, content.data() + p.offset, static_cast<size_t>(p.bytes)) != 0) return false;
      at += static_cast<size_t>(p.bytes);
    }
    return true;
  }
  std::string content;
  std::vector<std::filesystem::path> files_;

 private:
  int64_t layers_, experts_, bytes_;
};

std::shared_ptr<OffloadPolicy> lru(int64_t layers, int64_t experts) {
  return factory<MakeOffloadPolicy>(get_method("policy", "lru"))({.layers = layers, .experts = experts},
                                                                 nlohmann::json::object());
}

// Runs random demands; every expert that is handed out must hold its own bytes.
void run_all(const std::shared_ptr<Bytes>& source, StoreOptions options, int64_t steps, int64_t rows = 1) {
  const int64_t layers = source->layers(), experts = source->experts();
  ExpertStore store(source, lru(layers, experts), {.layers = layers, .experts = experts, .top_k = 2}, options);
  RandomStream random(2, "demands");
  int64_t uses = 0;
  for (int64_t t = 1; t <= steps; ++t)
    for (int64_t l = 0; l < layers; ++l) {
      Demand d{.layer = l, .token = t, .rows = rows, .pairs = {}};
      for (int64_t r = 0; r < rows; ++r)
        for (const int64_t e : random.sample(experts, 2)) d.pairs.push_back({r, e, random.uniform()});
      sort_pairs(d, experts);
      std::vector<int> seen(static_cast<size_t>(experts), 0);
      const auto all = store.run(d, nullptr, [&](std::span<const ReadyExpert> ready) {
        for (const ReadyExpert& r : ready) {
          ++seen[static_cast<size_t>(r.expert)];
          EXPECT_TRUE(source->right({l, r.expert, r.precision}, r.memory)) << l << " " << r.expert;
        }
      });
      for (const Use& u : all) EXPECT_EQ(seen[static_cast<size_t>(u.expert)], 1);
      uses += static_cast<int64_t>(all.size());
    }
  const StoreStats s = store.stats();
  EXPECT_EQ(s.counts.hit_high + s.counts.miss_high, uses);
  EXPECT_EQ(s.experts_read, s.counts.miss_high);
  EXPECT_TRUE(s.lossless());
}

TEST(Store, HandsOutTheRightBytesByEveryWay) {
  const TemporaryFolder folder;
  const auto source = std::make_shared<Bytes>(folder, 3, 6, 5000);
  for (const bool sync : {false, true})
    for (const bool direct : {false, true})
      for (const bool uring : {false, true})
        run_all(source, {.capacity_high = 4, .sync = sync, .read = {.direct = direct, .uring = uring}}, 12);
}

TEST(Store, ReadsLargePiecesInSeveralRequests) {
  const TemporaryFolder folder;
  run_all(std::make_shared<Bytes>(folder, 1, 4, (int64_t{2} << 20) + 77), {.capacity_high = 2}, 6);
}

TEST(Store, APromptThatNeedsMoreThanThePoolRunsInWaves) {
  const TemporaryFolder folder;
  const auto source = std::make_shared<Bytes>(folder, 2, 8, 300);
  for (const bool sync : {false, true}) run_all(source, {.capacity_high = 2, .sync = sync}, 10, /*rows=*/9);
}

TEST(Store, ReadsTakeTheTimeThatARateGivesThem) {
  const TemporaryFolder folder;
  const auto source = std::make_shared<Bytes>(folder, 1, 4, 10000);
  const auto start = std::chrono::steady_clock::now();
  run_all(source, {.capacity_high = 4, .read = {.rate = 1e6}}, 20);  // all four once: 120000 bytes
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_GE(took.count(), 0.119);
}

Demand one(int64_t expert) {
  return {.layer = 0, .token = 1, .rows = 1, .pairs = {{0, expert, 1.0}}};
}

TEST(Store, AFileCutShortIsNamedWithLayerExpertAndOffset) {
  for (const bool sync : {false, true})
    for (const bool uring : {false, true})
      for (const bool direct : {false, true}) {
        const TemporaryFolder folder;
        const auto source = std::make_shared<Bytes>(folder, 1, 4, 5000);
        ExpertStore store(source, lru(1, 4), {.layers = 1, .experts = 4, .top_k = 1},
                          {.capacity_high = 2, .sync = sync, .read = {.direct = direct, .uring = uring}});
        std::filesystem::resize_file(source->files_[0], 20000);
        const auto message = message_of([&] { store.run(one(3), nullptr, [](auto) {}); });
        EXPECT_NE(message.find("expert 3 of layer 0 (high precision)"), std::string::npos) << message;
        EXPECT_NE(message.find("experts.bin at offset"), std::string::npos) << message;
        EXPECT_NE(message.find("the file ends at 20000"), std::string::npos) << message;
        EXPECT_EQ(message_of([&] { store.run(one(0), nullptr, [](auto) {}); }), message)
            << "a store whose reading failed does not go on";
      }
}

TEST(Store, AFailingDiskIsNamed) {
  for (const bool uring : {false, true}) {
    const TemporaryFolder folder;
    const auto source = std::make_shared<Bytes>(folder, 1, 4, 5000);
    source->files_ = {"/proc/self/mem"};  // nothing is mapped at these offsets: reads fail with an input/output error
    ExpertStore store(source, lru(1, 4), {.layers = 1, .experts = 4, .top_k = 1},
                      {.capacity_high = 2, .read = {.uring = uring}});
    const auto message = message_of([&] { store.run(one(2), nullptr, [](auto) {}); });
    EXPECT_NE(message.find("expert 2 of layer 0"), std::string::npos) << message;
    EXPECT_NE(message.find("Input/output error"), std::string::npos) << message;
  }
}

TEST(Store, AFileThatIsGoneIsNamed) {
  const TemporaryFolder folder;
  const auto source = std::make_shared<Bytes>(folder, 1, 4, 500);
  source->files_ = {folder / "gone.bin"};
  EXPECT_NE(message_of([&] {
              ExpertStore(source, lru(1, 4), {.layers = 1, .experts = 4, .top_k = 1}, {.capacity_high = 2});
            }).find("gone.bin"),
            std::string::npos);
}

TEST(Store, RefusesAPoolThatIsTooSmall) {
  const TemporaryFolder folder;
  const auto source = std::make_shared<Bytes>(folder, 1, 4, 500);
  EXPECT_NE(message_of([&] {
              ExpertStore(source, lru(1, 4), {.layers = 1, .experts = 4, .top_k = 3}, {.capacity_high = 2});
            }).find("holds 2 experts, a token needs 3"),
            std::string::npos);
}

// Guesses one layer ahead: always the same two experts.
class Guesser : public OffloadPolicy {
 public:
  size_t victim(std::span<const ExpertVersion> c, const Moment&) override {
    return lowest(c, [](const ExpertVersion&) { return 0.0; });
  }
  std::vector<Guess> guess(const Demand& d, const Cached&, LookAhead*) override {
    if (d.layer + 1 >= 3) return {};
    return {{{d.layer + 1, 0, Precision::high}, true}, {{d.layer + 1, 1, Precision::high}, true}};
  }
};

TEST(Store, WhatIsReadAheadIsThereWhenItsLayerComes) {
  const TemporaryFolder folder;
  const auto source = std::make_shared<Bytes>(folder, 3, 4, 5000);
  for (const bool sync : {true, false}) {
    ExpertStore store(source, std::make_shared<Guesser>(), {.layers = 3, .experts = 4, .top_k = 1},
                      {.capacity_high = 5, .sync = sync});
    for (int64_t t = 1; t <= 20; ++t)
      for (int64_t l = 0; l < 3; ++l) {
        Demand d{.layer = l, .token = t, .rows = 1, .pairs = {{0, l == 2 ? 3 : 0, 1.0}}};
        store.run(d, nullptr, [&](std::span<const ReadyExpert> ready) {
          EXPECT_TRUE(source->right({l, ready[0].expert, Precision::high}, ready[0].memory));
        });
      }
    const auto s = store.stats();
    EXPECT_EQ(s.counts.guessed, 20 * 4);
    EXPECT_EQ(s.counts.right, 20) << "expert 0 of layer 1, and none of layer 2";
    EXPECT_EQ(s.counts.wanted_of_guessed, 40);
    EXPECT_GT(s.counts.ahead, 0);
    EXPECT_GT(s.counts.ahead_used, 0);
  }
}

// Notes the order in which pieces are unpacked; the first one waits.
class Gated : public Bytes {
 public:
  using Bytes::Bytes;
  void unpack(const ExpertVersion& v, size_t piece, std::span<const std::byte> bytes, std::byte* slot) const override {
    bool first = false;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      first = order_.empty();
      order_.push_back(v);
    }
    if (first) {
      began.set_value();
      open.get_future().wait();
    }
    Bytes::unpack(v, piece, bytes, slot);
  }
  int64_t pieces_of(int64_t layer, int64_t expert, int64_t among_the_first = 1000) const {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto n = std::min<int64_t>(among_the_first, static_cast<int64_t>(order_.size()));
    return std::count(order_.begin(), order_.begin() + n, ExpertVersion{layer, expert});
  }
  mutable std::promise<void> began, open;

 private:
  mutable std::mutex lock_;
  mutable std::vector<ExpertVersion> order_;
};

// Guesses all experts of layer 1 but the last, and says when what layer 1 wants is asked for.
class GuessesMany : public OffloadPolicy {
 public:
  explicit GuessesMany(std::promise<void>& asked) : asked_(asked) {}
  size_t victim(std::span<const ExpertVersion> c, const Moment&) override {
    return lowest(c, [](const ExpertVersion&) { return 0.0; });
  }
  std::vector<Guess> guess(const Demand& d, const Cached&, LookAhead*) override {
    std::vector<Guess> out;
    if (d.layer == 1) asked_.set_value();
    for (int64_t e = 0; e < 5 && d.layer == 0; ++e) out.push_back({{1, e, Precision::high}, true});
    return out;
  }

 private:
  std::promise<void>& asked_;
};

TEST(Store, WrongGuessesAreGivenUpAndWhatIsWantedGoesFirst) {
  const TemporaryFolder folder;
  for (const bool uring : {false, true}) {
    const auto source = std::make_shared<Gated>(folder, 2, 6, 5000);
    ExpertStore store(source, std::make_shared<GuessesMany>(source->open), {.layers = 2, .experts = 6, .top_k = 0},
                      {.capacity_high = 12, .read = {.uring = uring}});
    store.run({.layer = 0, .token = 1, .rows = 1, .pairs = {}}, nullptr, [](auto) {});
    source->began.get_future().wait();  // the reading thread is busy with the first guess
    // The router wants the fourth guess, and one that was not guessed.
    const auto uses = store.run({.layer = 1, .token = 1, .rows = 1, .pairs = {{0, 3, 0.6}, {0, 5, 0.4}}}, nullptr,
                                [&](std::span<const ReadyExpert> ready) {
                                  for (const ReadyExpert& r : ready)
                                    EXPECT_TRUE(source->right({1, r.expert, r.precision}, r.memory));
                                });
    EXPECT_TRUE(uses[0].hit);
    EXPECT_FALSE(uses[1].hit);
    // The first guess had begun, and a piece of the second at most.
    EXPECT_EQ(source->pieces_of(1, 2) + source->pieces_of(1, 4), 0);
    EXPECT_EQ(source->pieces_of(1, 3), 3);
    EXPECT_EQ(source->pieces_of(1, 5), 3);
    EXPECT_EQ(source->pieces_of(1, 3, 3 + 1 + 6) + source->pieces_of(1, 5, 3 + 1 + 6), 6) << "before what is left";
    const auto c = store.stats().counts;
    EXPECT_EQ(c.ahead, 5);
    EXPECT_EQ(c.ahead_used, 1);
    EXPECT_GE(c.ahead_cancelled, 2) << "the second guess may have begun";
    EXPECT_EQ(c.hit_high, 1);
  }
}

}  // namespace
}  // namespace moiety
