// Models with experts of their own widths: in memory, on disk, and while they are searched.
#include "moiety/offload/edge_source.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/compress/edgemoe_experts.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/models/model.h"
#include "moiety/models/random_checkpoint.h"
#include "moiety/offload/edgemoe.h"
#include "moiety/offload/offload.h"
#include "moiety/offload/record.h"
#include "moiety/train/byte_tokenizer.h"
#include "offload/run_twice.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr int64_t kLayers = 3, kExperts = 4;

// A random model in a GGUF file.
std::string model_file(const TemporaryFolder& folder, const std::string& format, int64_t top_k = 2,
                       const std::string& name = "m") {
  const auto file = folder / (name + "-" + format + ".gguf");
  const TemporaryFolder scratch;
  const json config = {{"model_type", "mixtral"},  {"vocab_size", byte_tokenizer_size}, {"hidden_size", 64},
                       {"intermediate_size", 96},  {"num_hidden_layers", kLayers},      {"num_attention_heads", 4},
                       {"num_key_value_heads", 2}, {"num_local_experts", kExperts},     {"num_experts_per_tok", top_k},
                       {"initializer_range", 0.2}, {"max_position_embeddings", 128},    {"tie_word_embeddings", false}};
  write_file(scratch / "tokenizer.json", byte_tokenizer().dump());
  write_file(scratch / "tokenizer_config.json", byte_tokenizer_config().dump());
  write_file(scratch / "config.json", config.dump());
  WriteOptions options;
  options.type = format;
  write_gguf(*random_checkpoint(config, scratch.path(), 3), file, options);
  return file.string();
}

// The same with experts of these widths.
std::string edge_file(const TemporaryFolder& folder, const std::string& source, const std::vector<int64_t>& bits,
                      const std::string& name = "e") {
  const auto file = folder / (name + ".gguf");
  const auto checkpoint = Checkpoint::open(source);
  const auto model = load_causal(*checkpoint);
  const std::string hash = router_hash(*model);
  EdgeMoeExperts experts(model, Int2Scale::max, [](CausalModel&) { return 1.0; });
  experts.set_bits(bits);
  EdgeLayout layout = experts.layout();
  layout.router_hash = hash;
  write_edge_experts(edge_experts_path(file), layout, Int2Scale::max,
                     [&](int64_t l, int64_t e) { return experts.original(l, e); });
  WriteOptions again;
  again.overwrite = true;
  write_edge_model(*checkpoint, file, layout, again);
  return file.string();
}

std::vector<int64_t> mixed() {
  return {2, 4, 8, 16, 32, 2, 4, 4, 8, 8, 2, 32};
}

Tensor run(CausalModel& model) {
  return test::run_twice(model, 32);
}

std::shared_ptr<CausalModel> resident(const std::string& file) {
  auto model = load_causal(*Checkpoint::open(file));
  model->eval();
  return model;
}

std::string paths_of(const TemporaryFolder& folder, const std::string& file) {
  const auto model = resident(file);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 200; ++i) ids.push_back(i * i * 31 % 256);
  const auto t = record_experts(*model, ids, -1, 64);
  const std::string out = (folder / "paths.safetensors").string();
  write_expert_paths(out, t.experts, t.layers, t.top_k, t.num_experts, t.router_hash);
  return out;
}

struct OnDisk {
  std::shared_ptr<CausalModel> model;
  std::shared_ptr<Offload> offload;
};

OnDisk on_disk(const std::string& file, const json& settings, int64_t capacity = 0, bool sync = false,
               const std::string& policy = "edgemoe") {
  const auto checkpoint = Checkpoint::open(file);
  OnDisk out;
  out.model = load_causal(*edge_outline(checkpoint), {.leave_experts = true});
  out.model->eval();
  OffloadOptions options;
  options.policy = policy;
  options.settings = settings;
  options.capacity_high = capacity;
  options.sync = sync;
  out.offload = Offload::attach(*out.model, *checkpoint, options);
  out.offload->start({.context = 64});
  return out;
}

TEST(EdgeModel, With32BitsEqualsTheOriginalBitForBit) {
  const TemporaryFolder folder;
  for (const char* format : {"f32", "bf16", "f16"}) {
    const auto source = model_file(folder, format);
    const auto edge = edge_file(folder, source, std::vector<int64_t>(12, 32));
    EXPECT_TRUE(torch::equal(run(*resident(edge)), run(*resident(source)))) << format;
  }
}

TEST(EdgeModel, OnDiskEqualsInMemoryBitForBit) {
  const TemporaryFolder folder;
  for (const char* format : {"f32", "bf16"}) {
    const auto source = model_file(folder, format);
    const auto edge = edge_file(folder, source, mixed());
    const auto paths = paths_of(folder, source);  // of the model it came from: the routers are the same
    const auto whole = run(*resident(edge));
    ASSERT_TRUE(whole.isfinite().all().item<bool>());
    for (const int64_t preload : {0, 1, 2})
      for (const int64_t capacity : {4, 7, 12})
        for (const bool sync : {false, true}) {
          const auto l = on_disk(edge, {{"preload", preload}, {"expert_paths", paths}}, capacity, sync);
          EXPECT_TRUE(torch::equal(run(*l.model), whole)) << format << preload << capacity << sync;
          EXPECT_TRUE(l.offload->stats().lossless());
        }
  }
}

TEST(EdgeModel, PolicyRunsOnPlainFilesToo) {
  const TemporaryFolder folder;
  for (const char* format : {"q4_0", "f32"}) {
    const auto file = model_file(folder, format);
    const auto paths = paths_of(folder, file);
    const auto l = on_disk(file, {{"preload", 2}, {"expert_paths", paths}}, 5);
    EXPECT_TRUE(torch::equal(run(*l.model), run(*resident(file)))) << format;
    const auto c = l.offload->stats().counts;
    EXPECT_GT(c.ahead_used, 0);
    EXPECT_EQ(c.skip, 0);
  }
}

TEST(EdgeModel, PrintedDistanceAndOnlineCountsChangeTimeOnly) {
  const TemporaryFolder folder;
  const auto file = model_file(folder, "f32");
  const auto paths = paths_of(folder, file);
  const auto whole = run(*resident(file));
  for (const json& evict : {json{{"distance", "printed"}}, json{{"online", true}}}) {
    const auto l = on_disk(file, {{"preload", 1}, {"expert_paths", paths}, {"evict", evict}}, 5, true);
    EXPECT_TRUE(torch::equal(run(*l.model), whole));
  }
}

TEST(EdgeModel, RoomForAllReadsEveryExpertOnce) {
  const TemporaryFolder folder;
  const auto edge = edge_file(folder, model_file(folder, "f32"), mixed());
  const auto l = on_disk(edge, {{"preload", 2}, {"expert_paths", paths_of(folder, edge)}});
  run(*l.model);
  EXPECT_EQ(l.offload->stats().experts_read, 12);
}

TEST(EdgeModel, NarrowExpertsAreFewerBytesToRead) {
  const TemporaryFolder folder;
  const auto source = model_file(folder, "f32");
  const auto bytes = [&](int64_t width) {
    const auto edge = edge_file(folder, source, std::vector<int64_t>(12, width));
    const auto l = on_disk(edge, json::object(), 12, true, "lru");
    run(*l.model);
    const auto s = l.offload->stats();
    return static_cast<double>(s.bytes_read) / static_cast<double>(s.experts_read);
  };
  const double eight = bytes(8);
  EXPECT_NEAR(bytes(2) / eight, 0.25, 0.03);
  EXPECT_NEAR(bytes(32) / eight, 4.0, 0.15);
}

TEST(EdgeModel, RefusesPathsOfAnotherModelAndTooSmallBuffers) {
  const TemporaryFolder folder;
  const auto file = model_file(folder, "f32");
  const auto paths = paths_of(folder, file);
  EXPECT_NE(message_of([&] {
              on_disk(file, {{"preload", 3}, {"expert_paths", paths}}, 4);
            }).find("holds 4 experts, a token needs 5"),
            std::string::npos);
  EXPECT_NE(message_of([&] { on_disk(file, json::object(), 4); }).find("--expert-paths"), std::string::npos);
  std::vector<int64_t> trace(3 * 2 * 4);
  write_expert_paths(paths, trace, kLayers, 2, kExperts, "of another");
  EXPECT_NE(message_of([&] { on_disk(file, {{"expert_paths", paths}}, 6); }).find("another model"), std::string::npos);
}

TEST(EdgeModel, SearchMeasuresWhatTheFileComputes) {
  const TemporaryFolder folder;
  const auto source = model_file(folder, "f32");
  const auto checkpoint = Checkpoint::open(source);
  const auto model = load_causal(*checkpoint);
  const auto whole = run(*model);
  EdgeMoeExperts experts(model, Int2Scale::max,
                         [](CausalModel& m) { return 1.0 / (1.0 + run(m).abs().mean().item<double>()); });
  EXPECT_TRUE(torch::equal(run(*model), whole));  // 32 bits at first
  experts.set_bits(mixed());
  EXPECT_TRUE(torch::equal(run(*model), run(*resident(edge_file(folder, source, mixed())))));
  experts.set_bits(std::vector<int64_t>(12, 32));
  EXPECT_TRUE(torch::equal(run(*model), whole));
}

TEST(EdgeModel, ConvertsBackToAnOrdinaryFile) {
  const TemporaryFolder folder;
  const auto edge = edge_file(folder, model_file(folder, "f32"), mixed());
  const auto back = (folder / "back.gguf").string();
  write_gguf(*Checkpoint::open(edge), back);
  EXPECT_EQ(edge_experts_of(*Checkpoint::open(back)), nullptr);
  EXPECT_TRUE(torch::equal(run(*resident(back)), run(*resident(edge))));
}

TEST(EdgeMoeExperts, NotesExpertsWithoutATokenAndRefusesDenseModels) {
  const TemporaryFolder folder;
  const auto model = load_causal(*Checkpoint::open(model_file(folder, "f32", 1)));
  EdgeMoeExperts experts(model, Int2Scale::max, [](CausalModel& m) {
    const torch::NoGradGuard frozen;
    Pass pass;
    m.forward(torch::tensor({{5}}, torch::kInt64), pass);  // one token: one expert a layer
    return 1.0;
  });
  const auto unused = experts.unused();
  EXPECT_EQ(std::count(unused.begin(), unused.end(), false), kLayers);
  const json dense = {{"model_type", "llama"},    {"vocab_size", 32},
                      {"hidden_size", 16},        {"intermediate_size", 16},
                      {"num_hidden_layers", 1},   {"num_attention_heads", 2},
                      {"num_key_value_heads", 2}, {"max_position_embeddings", 16}};
  EXPECT_NE(message_of([&] { EdgeMoeExperts(make_causal(dense), Int2Scale::max, {}); }).find("no expert layers"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
