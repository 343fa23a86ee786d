#include "moiety/compress/prune_experts.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/kernels/format.h"
#include "moiety/models/decoder.h"
#include "moiety/models/model.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/weights.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
using List = std::vector<ExpertAt>;

TEST(ParseExperts, ReadsPairs) {
  EXPECT_EQ(parse_experts("1,68;2,92"), (List{{1, 68}, {2, 92}}));
  EXPECT_EQ(parse_experts("3,-1"), (List{{3, -1}}));
  for (const char* wrong : {"", "1", "1,", "1,2;", "1,2;3", "a,1", "1,2,3", "1, 2"})
    EXPECT_NE(message_of([&] { parse_experts(wrong); }).find("1,68;2,92"), std::string::npos) << wrong;
  EXPECT_NE(message_of([] { parse_experts("1,2;1,2"); }).find("twice"), std::string::npos);
  EXPECT_NE(message_of([] { parse_experts("1,-2"); }).find("-1 is the shared expert"), std::string::npos);
}

json config_of(const std::string& family) {
  return {{"model_type", family},
          {"vocab_size", 40},
          {"hidden_size", 32},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 8},
          {"intermediate_size", 32},
          {"max_position_embeddings", 64},
          {"moe_intermediate_size", 32},
          {"num_experts", 4},
          {"num_local_experts", 4},
          {"n_routed_experts", 4},
          {"num_experts_per_tok", 2},
          {"first_k_dense_replace", 1},
          {"n_shared_experts", 1},
          {"shared_expert_intermediate_size", 32},
          {"shared_intermediate_size", 32},
          {"decoder_sparse_step", 1},
          {"pad_token_id", 0},
          {"tie_word_embeddings", false}};
}

// A small model on disk.
struct Saved {
  TemporaryFolder folder{"moiety-test"};
  std::shared_ptr<const Checkpoint> checkpoint;
  explicit Saved(const std::string& family) {
    torch::manual_seed(1);
    json config = config_of(family);
    const auto model = make_causal(config);
    // Biases are zero at first, and a zero would prove nothing.
    const torch::NoGradGuard frozen;
    for (auto& p : model->parameters())
      if (p.dim() <= 2 && p.abs().max().item<double>() == 0.0) p.add_(0.5);
    config["dtype"] = "float32";
    std::filesystem::create_directories(folder.path());
    write_file(folder / "config.json", config.dump());
    write_stored(folder.path(), model->stored(), "f32");
    checkpoint = Checkpoint::open(folder.path().string());
  }
};

// Largest output of every expert of a layer on random rows; the shared one last, if there is one.
std::vector<double> outputs(const Checkpoint& checkpoint, int64_t layer) {
  const torch::NoGradGuard frozen;
  const auto model = std::dynamic_pointer_cast<Decoder>(load_causal(checkpoint, {.dtype = "f32"}));
  auto& mixture = dynamic_cast<Mixture&>(*model->layers[static_cast<size_t>(layer)]->ffn);
  torch::manual_seed(2);
  const auto x = torch::randn({5, 32});
  std::vector<double> out;
  for (int64_t e = 0; e < mixture.experts->count(); ++e) {
    std::vector<int64_t> counts(static_cast<size_t>(mixture.experts->count()), 0);
    counts[static_cast<size_t>(e)] = 5;
    out.push_back(mixture.experts->forward(x, counts).abs().max().item<double>());
  }
  Pass pass;
  if (mixture.shared) out.push_back(mixture.shared->apply(x, pass).abs().max().item<double>());
  return out;
}

class PruneExperts : public testing::TestWithParam<const char*> {};

TEST_P(PruneExperts, SilencesTheNamedOnesAlone) {
  const Saved saved(GetParam());
  const auto before = outputs(*saved.checkpoint, 1);
  const auto after = outputs(*prune_experts(saved.checkpoint, {{1, 2}}), 1);
  ASSERT_EQ(after.size(), before.size());
  for (size_t e = 0; e < before.size(); ++e) {
    EXPECT_GT(before[e], 0.0);
    EXPECT_EQ(after[e], e == 2 ? 0.0 : before[e]) << e;
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, PruneExperts,
                         testing::Values("mixtral", "qwen3_moe", "qwen2_moe", "deepseek", "granitemoeshared",
                                         "gpt_oss"),
                         [](const auto& info) { return std::string(info.param); });

TEST(PruneExpertsShared, IsExpertMinusOne) {
  for (const char* family : {"deepseek", "qwen2_moe", "granitemoeshared"}) {
    const Saved saved(family);
    const auto before = outputs(*saved.checkpoint, 1), after = outputs(*prune_experts(saved.checkpoint, {{1, -1}}), 1);
    EXPECT_EQ(after.back(), 0.0) << family;
    for (size_t e = 0; e + 1 < before.size(); ++e) EXPECT_EQ(after[e], before[e]) << family;
  }
}

TEST(PruneExpertsBlocks, AreZeroInEveryFormat) {
  const Saved saved("mixtral");
  for (const char* type : {"q8_0", "q4_0", "q5_1", "mxfp4"}) {
    const auto file = (saved.folder / (std::string(type) + ".gguf")).string();
    WriteOptions write;
    write.type = type;
    write_gguf(*saved.checkpoint, file, write);
    const auto pruned = prune_experts(Checkpoint::open(file), {{0, 1}});
    const auto after = outputs(*pruned, 0);
    EXPECT_EQ(after[1], 0.0) << type;
    EXPECT_GT(after[0], 0.0) << type;
  }
}

TEST(PruneExpertsNone, IsTheSameModel) {
  const Saved saved("qwen3_moe");
  const auto same = prune_experts(saved.checkpoint, {});
  const torch::NoGradGuard frozen;
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  Pass a, b;
  EXPECT_TRUE(torch::equal(load_causal(*same)->forward(ids, a), load_causal(*saved.checkpoint)->forward(ids, b)));
}

TEST(PruneExpertsErrors, NameWhatThereIs) {
  const Saved saved("deepseek");
  const auto says = [&](const List& list) { return message_of([&] { prune_experts(saved.checkpoint, list); }); };
  EXPECT_NE(says({{0, 0}}).find("layer 0 has no experts; layers with experts are 1"), std::string::npos);
  EXPECT_NE(says({{1, 4}}).find("layer 1 has no expert 4; it has 0 to 3"), std::string::npos);
  const Saved plain("mixtral");
  EXPECT_NE(message_of([&] {
              prune_experts(plain.checkpoint, {{0, -1}});
            }).find("no shared expert"),
            std::string::npos);
  EXPECT_THROW(without_experts(torch::zeros({2, 3, 4}), {2}), Error);
}

TEST(ReportedExperts, BelongToOneModel) {
  const TemporaryFolder folder("moiety-test");
  std::filesystem::create_directories(folder.path());
  json config = config_of("mixtral");
  const json report = {
      {"config_hash", config_hash(config)},
      {"super_experts", {{{"layer_index", 1}, {"expert_index", 3}}, {{"layer_index", 0}, {"expert_index", -1}}}}};
  const auto file = (folder / "report.json").string();
  write_file(file, report.dump());
  EXPECT_EQ(reported_experts(file, config), (List{{1, 3}, {0, -1}}));
  config["dtype"] = "bfloat16";  // the same model in other numbers
  EXPECT_EQ(reported_experts(file, config).size(), 2u);
  config["num_local_experts"] = 8;
  EXPECT_NE(message_of([&] { reported_experts(file, config); }).find("another model"), std::string::npos);
  write_file(file, "{}");
  EXPECT_NE(message_of([&] { reported_experts(file, config); }).find("no report"), std::string::npos);
}

}  // namespace
}  // namespace moiety
