// A model whose experts stay on disk computes what it computes with all in memory.
#include "moiety/offload/offload.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/models/model.h"
#include "moiety/models/random_checkpoint.h"
#include "moiety/nn/shortcut.h"
#include "moiety/offload/hobbit.h"
#include "moiety/offload/low_experts.h"
#include "moiety/offload/record.h"
#include "moiety/train/byte_tokenizer.h"
#include "offload/run_twice.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json config_of(const std::string& family, int64_t top_k = 2) {
  return {{"model_type", family},
          {"vocab_size", 512},
          {"hidden_size", 256},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 64},
          {"intermediate_size", 256},
          {"moe_intermediate_size", 256},
          {"num_experts", 8},
          {"num_local_experts", 8},
          {"num_experts_per_tok", top_k},
          {"norm_topk_prob", false},
          {"initializer_range", 0.3},
          {"max_position_embeddings", 128},
          {"tie_word_embeddings", false},
          {"decoder_sparse_step", 1}};
}

// A random model in a GGUF file, once for a format and family.
class Files {
 public:
  std::string gguf(const std::string& family, const std::string& format, int64_t top_k = 2) {
    const auto name = folder_ / (family + "-" + format + "-" + std::to_string(top_k) + ".gguf");
    if (std::filesystem::exists(name)) return name;
    const TemporaryFolder scratch;
    const auto config = config_of(family, top_k);
    auto tokenizer = byte_tokenizer();
    for (int64_t id = byte_tokenizer_size; id < 512; ++id)
      tokenizer["model"]["vocab"]["<unused" + std::to_string(id) + ">"] = id;
    write_file(scratch / "tokenizer.json", tokenizer.dump());
    write_file(scratch / "tokenizer_config.json", byte_tokenizer_config().dump());
    write_file(scratch / "config.json", config.dump());
    WriteOptions options;
    options.type = format;
    write_gguf(*random_checkpoint(config, scratch.path(), 3), name, options);
    return name;
  }
  std::string with_low(const std::string& format, Format low, int64_t top_k = 2) {
    const auto name = folder_ / (format + "-" + std::string(info(low).name) + std::to_string(top_k) + ".low.gguf");
    if (!std::filesystem::exists(name))
      add_low_experts(*Checkpoint::open(gguf("mixtral", format, top_k)), low, name, false);
    return name;
  }

 private:
  TemporaryFolder folder_;
};

Files& files() {
  static Files all;
  return all;
}

struct Loaded {
  std::shared_ptr<CausalModel> model;
  std::shared_ptr<Offload> offload;
};

Loaded on_disk(const std::string& file, OffloadOptions options, const std::string& dtype = "auto") {
  const auto checkpoint = Checkpoint::open(file);
  Loaded out;
  out.model = load_causal(*checkpoint, {.dtype = dtype, .leave_experts = true});
  out.model->eval();
  out.offload = Offload::attach(*out.model, *checkpoint, std::move(options));
  out.offload->start({.context = 64});
  return out;
}

Tensor run(CausalModel& model, int64_t rows = 1) {
  return test::run_twice(model, 28, rows);
}

Tensor resident(const std::string& file, int64_t rows = 1, const std::string& dtype = "auto") {
  const auto model = load_causal(*Checkpoint::open(file), {.dtype = dtype});
  model->eval();
  return run(*model, rows);
}

OffloadOptions lossless(const std::string& policy, int64_t capacity, bool sync = false, int64_t lookahead = 2) {
  OffloadOptions o;
  o.policy = policy;
  if (policy == "hobbit") o.settings = {{"t1", 1.0}, {"t2", 1.0}, {"lookahead", lookahead}};
  o.capacity_high = capacity;
  o.sync = sync;
  return o;
}

TEST(Offload, EqualsTheModelInMemoryBitForBitInEveryFormat) {
  for (const char* format : {"q4_0", "q8_0", "q4_k", "q6_k", "mxfp4", "tq1_0", "tq2_0", "f32", "f16", "bf16"}) {
    const auto file = files().gguf("mixtral", format);
    const auto whole = resident(file);
    ASSERT_TRUE(whole.isfinite().all().item<bool>());
    for (const int64_t capacity : {3, 24}) {
      const auto l = on_disk(file, lossless("hobbit", capacity));
      EXPECT_TRUE(torch::equal(run(*l.model), whole)) << format << " with " << capacity;
      EXPECT_TRUE(l.offload->stats().lossless());
    }
  }
}

TEST(Offload, EqualsTheModelInMemoryUnderEveryPolicyAndTiming) {
  const auto file = files().gguf("qwen3_moe", "q4_0", 3);
  const auto whole = resident(file);
  for (const char* policy : {"lru", "lfu", "hobbit"})
    for (const bool sync : {false, true})
      for (const int64_t lookahead : {0, 1, 3}) {
        if (lookahead > 0 && std::string(policy) != "hobbit") continue;
        const auto l = on_disk(file, lossless(policy, 4, sync, lookahead));
        EXPECT_TRUE(torch::equal(run(*l.model), whole)) << policy << sync << lookahead;
      }
  const int threads = at::get_num_threads();
  at::set_num_threads(threads == 1 ? 2 : 1);
  const auto other = resident(file);
  EXPECT_TRUE(torch::equal(run(*on_disk(file, lossless("hobbit", 4)).model), other));
  at::set_num_threads(threads);
}

TEST(Offload, EqualsTheModelInMemoryForSeveralSequencesAndExactProducts) {
  const auto file = files().gguf("mixtral", "q4_0");
  EXPECT_TRUE(torch::equal(run(*on_disk(file, lossless("lru", 3)).model, 3), resident(file, 3)));
  EXPECT_TRUE(torch::equal(run(*on_disk(file, lossless("lru", 3), "f32").model), resident(file, 1, "f32")));
}

TEST(Offload, EqualsTheModelInMemoryWhereExpertsHaveBiases) {
  const auto file = files().gguf("gpt_oss", "mxfp4");
  const auto whole = resident(file, 2);
  ASSERT_TRUE(whole.isfinite().all().item<bool>());
  EXPECT_TRUE(torch::equal(run(*on_disk(file, lossless("lru", 3)).model, 2), whole));
}

TEST(Offload, WithRoomForAllEachExpertIsReadOnce) {
  const auto file = files().gguf("mixtral", "q4_0");
  auto options = lossless("hobbit", 24, false, 0);
  const auto l = on_disk(file, options);
  run(*l.model);
  const auto s = l.offload->stats();
  EXPECT_EQ(s.counts.miss_high, s.experts_read);
  EXPECT_LE(s.experts_read, 24);
  const auto before = s.experts_read;
  run(*l.model);
  EXPECT_EQ(l.offload->stats().experts_read, before);
}

TEST(Offload, WithoutToleranceOnlyTheFirstExpertIsComputed) {
  const auto file = files().with_low("q8_0", Format::Q4_0);
  OffloadOptions options;
  options.policy = "hobbit";
  options.settings = {{"t1", 0.0}, {"t2", 0.0}, {"lookahead", 0}};
  options.capacity_high = 2;
  const auto l = on_disk(file, options);
  const torch::NoGradGuard frozen;
  Pass pass;
  l.model->forward(torch::tensor({{5}}, torch::kInt64), pass);
  const auto c = l.offload->stats().counts;
  EXPECT_EQ(c.miss_high, 3);
  EXPECT_EQ(c.skip, 3);
  EXPECT_EQ(c.hit_high + c.hit_low + c.miss_low, 0);
  EXPECT_FALSE(l.offload->stats().lossless());
}

TEST(Offload, OneExpertATokenIsNeverLow) {
  const auto file = files().with_low("q8_0", Format::Q4_0, 1);
  OffloadOptions options;
  options.policy = "hobbit";
  options.settings = {{"t1", 0.0}, {"t2", 0.0}};
  options.capacity_high = options.capacity_low = 3;
  const auto l = on_disk(file, options);
  EXPECT_TRUE(torch::equal(run(*l.model), resident(files().gguf("mixtral", "q8_0", 1))));
}

TEST(Offload, MixedPrecisionIsNearAndSynchronousRunsRepeat) {
  std::map<Format, double> off;
  for (const Format low : {Format::Q4_0, Format::TQ2_0}) {
    const auto file = files().with_low("q8_0", low);
    OffloadOptions options;
    options.policy = "hobbit";
    options.settings = {{"t1", 0.4}, {"t2", 1.0}};
    options.capacity_high = 4;
    options.capacity_low = 3;
    options.sync = true;
    const auto a = on_disk(file, options), b = on_disk(file, options);
    const auto one = run(*a.model), two = run(*b.model), whole = resident(file);
    EXPECT_TRUE(torch::equal(one, two));
    EXPECT_GT(a.offload->stats().counts.miss_low, 0);
    EXPECT_FALSE(torch::equal(one, whole));
    off[low] = ((one - whole).norm() / whole.norm()).item<double>();
  }
  EXPECT_LT(off[Format::Q4_0], 0.5);
  EXPECT_LT(off[Format::Q4_0], off[Format::TQ2_0]);
}

TEST(Offload, CountsAddUp) {
  const auto file = files().with_low("q8_0", Format::Q4_0);
  OffloadOptions options;
  options.policy = "hobbit";
  options.settings = {{"t1", 0.3}, {"t2", 0.6}};
  options.capacity_high = 4;
  options.capacity_low = 0;
  const auto l = on_disk(file, options);
  const torch::NoGradGuard frozen;
  auto cache = l.model->make_cache();
  for (int64_t t = 0; t < 20; ++t) {
    Pass pass;
    pass.cache = &cache;
    l.model->forward(torch::tensor({{t * 7}}, torch::kInt64), pass);
  }
  const auto c = l.offload->stats().counts;
  EXPECT_EQ(c.hit_high + c.hit_low + c.miss_high + c.miss_low + c.skip, 20 * 3 * 2);
  EXPECT_EQ(c.pairs, 20 * 3 * 2);
}

// Pages of the mapped file that are resident in this process.
int64_t mapped_resident(const std::string& file) {
  std::ifstream maps("/proc/self/smaps");
  bool inside = false;
  int64_t bytes = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') != std::string::npos && line.find(':') > line.find(' '))
      inside = line.find(std::filesystem::path(file).filename()) != std::string::npos;
    else if (inside && line.rfind("Rss:", 0) == 0)
      bytes += std::atoll(line.c_str() + 4) * 1024;
  }
  return bytes;
}

TEST(Offload, ExpertsAreNeverReadThroughTheMapping) {
  const auto file = files().gguf("qwen3_moe", "q8_0");
  const auto l = on_disk(file, lossless("lru", 4));
  run(*l.model);
  const auto checkpoint = Checkpoint::open(file);
  int64_t experts = 0, rest = 0;
  for (const auto& t : checkpoint->tensors())
    (t.name.find("experts") != std::string::npos ? experts : rest) += t.bytes();
  // Tables, norms and the embedding stay mapped; the kernel maps some pages around each that happen to be cached.
  EXPECT_LT(mapped_resident(file), rest + experts / 2);
  EXPECT_GT(experts, 2 * rest);
}

TEST(Offload, ABudgetThatIsTooSmallNamesTheSmallestThatWorks) {
  const auto file = files().gguf("mixtral", "q4_0");
  auto options = lossless("lru", 0);
  options.memory = 1000000;
  const auto small = message_of([&] { on_disk(file, options); });
  EXPECT_NE(small.find("a memory of 1000000 bytes is too small"), std::string::npos) << small;
  EXPECT_NE(small.find("a token needs 2"), std::string::npos) << small;
  const auto at = small.find("the smallest that works is ");
  ASSERT_NE(at, std::string::npos) << small;
  options.memory = std::atoll(small.c_str() + at + 27) + (int64_t{64} << 20);  // the process grows while tests run
  const auto l = on_disk(file, options);
  EXPECT_GE(l.offload->plan().capacity_high, 2);
}

TEST(Offload, ABudgetCountsKeysAndValuesAsTheyAreKept) {
  const auto checkpoint = Checkpoint::open(files().gguf("mixtral", "q4_0"));
  const auto cache = [&](CacheFormats formats) {
    const auto model = load_causal(*checkpoint, {.leave_experts = true});
    model->cache_formats = formats;
    const auto offload = Offload::attach(*model, *checkpoint, lossless("lru", 4));
    offload->start({.context = 64});
    return offload->plan().cache;
  };
  const int64_t computed = cache({});
  EXPECT_EQ(cache({Format::F32, Format::F32}), computed);
  EXPECT_EQ(cache({Format::F16, Format::BF16}), computed / 2);
  EXPECT_EQ(cache({Format::F16, {}}), computed * 3 / 4);
}

TEST(Offload, NumbersOfExpertsThatWereAskedForStayUnderTheBudget) {
  const auto file = files().with_low("q8_0", Format::Q4_0);
  OffloadOptions options;
  options.policy = "hobbit";
  options.capacity_high = 6;
  options.capacity_low = 5;
  options.memory = 1000000;
  const auto refused = message_of([&] { on_disk(file, options); });
  EXPECT_NE(refused.find("too small for 6 experts in full and 5 in low precision"), std::string::npos) << refused;
  const auto at = refused.find("the smallest that works is ");
  ASSERT_NE(at, std::string::npos) << refused;
  options.memory = std::atoll(refused.c_str() + at + 27) + (int64_t{64} << 20);  // the process grows while tests run
  const auto l = on_disk(file, options);
  EXPECT_EQ(l.offload->plan().capacity_high, 6);
  EXPECT_EQ(l.offload->plan().capacity_low, 5);
}

TEST(Offload, RefusesWhatCannotBe) {
  const auto attach = [](const std::string& file, OffloadOptions o) {
    return message_of([&] { on_disk(file, std::move(o)); });
  };
  const auto mixture = files().gguf("mixtral", "q4_0");
  OffloadOptions o;
  o.policy = "hobbit";
  EXPECT_NE(attach(mixture, o).find("--add-low-experts"), std::string::npos);
  o.policy = "lur";
  EXPECT_NE(attach(mixture, o).find("lru"), std::string::npos);
  EXPECT_NE(attach(files().gguf("llama", "q4_0"), lossless("lru", 4)).find("no expert layers"), std::string::npos);
  EXPECT_NE(attach(mixture, lossless("lru", 1)).find("holds 1 experts, a token needs 2"), std::string::npos);
  EXPECT_NE(attach(mixture, lossless("static", 4)).find("expert-traces"), std::string::npos);
  const auto loaded = load_causal(*Checkpoint::open(mixture));
  EXPECT_EQ(message_of([&] { loaded->eval(); }), "");
}

TEST(Offload, AGraphIsRefused) {
  const auto l = on_disk(files().gguf("mixtral", "q4_0"), lossless("lru", 4));
  const WithoutShortcuts graph;
  Pass pass;
  const auto message = message_of([&] { l.model->forward(torch::tensor({{1}}, torch::kInt64), pass); });
  EXPECT_NE(message.find("no gradients"), std::string::npos) << message;
}

TEST(Offload, StaticKeepsTheExpertsOfATrace) {
  const auto file = files().gguf("mixtral", "q4_0");
  const auto model = load_causal(*Checkpoint::open(file));
  model->eval();
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 60; ++i) ids.push_back(i * 37 % 512);
  const auto traces = record_experts(*model, ids, -1, 20);
  EXPECT_EQ(traces.tokens, 60);
  EXPECT_EQ(traces.layers, 3);
  const TemporaryFolder folder;
  write_traces(folder / "t.safetensors", traces);
  OffloadOptions o = lossless("static", 10);
  o.settings["expert_traces"] = (folder / "t.safetensors").string();
  const auto l = on_disk(file, o);
  EXPECT_TRUE(torch::equal(run(*l.model), resident(file)));
  auto other = traces;
  other.router_hash = "of another model";
  write_traces(folder / "other.safetensors", other);
  o.settings["expert_traces"] = (folder / "other.safetensors").string();
  EXPECT_NE(message_of([&] { on_disk(file, o); }).find("another model"), std::string::npos);
}

TEST(LowExperts, TernaryCopiesKeepMoreOfARowThanItsLargestWeightWould) {
  RandomStream random(3, "ternary");
  std::vector<float> row(1024), fitted;
  for (auto& w : row) w = static_cast<float>(random.normal());
  fitted = row;
  fit_ternary(fitted);
  double lost = 0, all = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    lost += (row[i] - fitted[i]) * (row[i] - fitted[i]);
    all += row[i] * row[i];
  }
  EXPECT_NEAR(lost / all, 0.21, 0.03);
  std::vector<std::byte> blocks(static_cast<size_t>(row_bytes(Format::TQ2_0, 1024)));
  quantize_row(Format::TQ2_0, fitted.data(), blocks.data(), 1024);
  std::vector<float> back(1024);
  dequantize_row(Format::TQ2_0, blocks.data(), back.data(), 1024);
  for (size_t i = 0; i < row.size(); ++i) EXPECT_NEAR(back[i], fitted[i], 1e-3);
}

TEST(LowExperts, RefusesWhatCannotBe) {
  const TemporaryFolder folder;
  const auto four = Checkpoint::open(files().gguf("mixtral", "q4_0"));
  EXPECT_NE(message_of([&] { add_low_experts(*four, Format::Q4_0, folder / "a.gguf", false); }).find("not be smaller"),
            std::string::npos);
  const auto copied = Checkpoint::open(files().with_low("q8_0", Format::Q4_0));
  EXPECT_NE(message_of([&] { add_low_experts(*copied, Format::TQ2_0, folder / "b.gguf", false); }).find("already"),
            std::string::npos);
  EXPECT_NE(message_of([&] { add_low_experts(*four, Format::TQ2_0, folder / "b", false); }).find(".gguf"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              add_low_experts(*Checkpoint::open(files().gguf("llama", "q4_0")), Format::TQ2_0, folder / "c.gguf",
                              false);
            }).find("no stacked experts"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "a.gguf"));
}

TEST(Memory, SizesAndRates) {
  EXPECT_EQ(parse_memory("512MiB"), int64_t{512} << 20);
  EXPECT_EQ(parse_memory("2G"), int64_t{2} << 30);
  EXPECT_EQ(parse_memory("1.5GB"), 1500000000);
  EXPECT_EQ(parse_memory("1000"), 1000);
  EXPECT_GT(parse_memory("auto"), 0);
  for (const char* bad : {"", "x", "-1", "5 apples", "0", "nan", "1e40"})
    EXPECT_NE(message_of([&] { parse_memory(bad); }), "") << bad;
  EXPECT_EQ(parse_rate("200MB/s"), 2e8);
  EXPECT_EQ(parse_rate("1e6"), 1e6);
  EXPECT_NE(message_of([&] { parse_rate("fast"); }).find("fast"), std::string::npos);
}

}  // namespace
}  // namespace moiety
