#include "moiety/compress/compressed_checkpoint.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/models/model.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;

struct Saved {
  TemporaryFolder folder{"moiety-test"};
  std::shared_ptr<const Checkpoint> checkpoint;
  explicit Saved(const std::string& family) {
    torch::manual_seed(1);
    json config = {{"model_type", family},       {"vocab_size", 40},
                   {"hidden_size", 16},          {"intermediate_size", 24},
                   {"moe_intermediate_size", 8}, {"num_hidden_layers", 3},
                   {"num_attention_heads", 4},   {"num_key_value_heads", 4},
                   {"num_experts", 6},           {"n_routed_experts", 6},
                   {"n_shared_experts", 1},      {"first_k_dense_replace", 1},
                   {"num_experts_per_tok", 4},   {"max_position_embeddings", 64},
                   {"norm_topk_prob", false},    {"tie_word_embeddings", false}};
    const auto model = make_causal(config);
    config["dtype"] = "float32";
    std::filesystem::create_directories(folder.path());
    write_file(folder / "config.json", config.dump());
    write_stored(folder.path(), model->stored(), "f32");
    checkpoint = Checkpoint::open(folder.path().string());
  }
};

torch::Tensor logits_of(const Checkpoint& checkpoint) {
  const torch::NoGradGuard frozen;
  const auto model = load_causal(checkpoint);
  model->eval();
  Pass pass;
  return model->forward(torch::arange(12, torch::kInt64).view({2, 6}), pass);
}

TEST(CompressedCheckpoint, StartsAsTheModelWithItsFirstSlots) {
  const Saved saved("olmoe");
  const auto made = with_compressed_experts(saved.checkpoint, -1);
  EXPECT_EQ(made->config()["use_ce"], true);
  EXPECT_EQ(made->config()["n_ce"], 2);
  EXPECT_EQ(made->get("model.layers.2.mlp.ces").shape, (std::vector<int64_t>{6, 3, 24}));
  // Raw gates: fewer slots leave the others' gates as they are.
  json config = saved.checkpoint->config();
  config["num_experts_per_tok"] = 2;
  const torch::NoGradGuard frozen;
  const auto half = load_causal(*saved.checkpoint, config, {});
  Pass pass;
  const auto want = half->forward(torch::arange(12, torch::kInt64).view({2, 6}), pass);
  EXPECT_LT((logits_of(*made) - want).abs().max().item<double>(), 1e-6);
}

TEST(CompressedCheckpoint, IsWrittenAndReadAgain) {
  const Saved saved("olmoe");
  const auto made = with_compressed_experts(saved.checkpoint, 1);
  const TemporaryFolder out("moiety-test");
  write_hf(*made, out.path(), {});
  EXPECT_TRUE(torch::equal(logits_of(*Checkpoint::open(out.path().string())), logits_of(*made)));
}

TEST(CompressedCheckpoint, LeavesDenseLayersAlone) {
  const Saved saved("deepseek");
  const auto made = with_compressed_experts(saved.checkpoint, 2);
  EXPECT_FALSE(made->has("model.layers.0.mlp.ces"));
  EXPECT_EQ(made->get("model.layers.1.mlp.ces").shape, (std::vector<int64_t>{6, 3, 16}));
  EXPECT_TRUE(logits_of(*made).isfinite().all().item<bool>());
}

TEST(CompressedCheckpoint, BadInputIsAnError) {
  const Saved saved("olmoe"), dense("llama");
  EXPECT_NE(message_of([&] { with_compressed_experts(saved.checkpoint, 4); }).find("top_k=4, n_ce=4"),
            std::string::npos);
  EXPECT_NE(message_of([&] { with_compressed_experts(dense.checkpoint, 1); }).find("is dense"), std::string::npos);
  const auto made = with_compressed_experts(saved.checkpoint, 2);
  EXPECT_NE(message_of([&] { with_compressed_experts(made, 2); }).find("already"), std::string::npos);
}

}  // namespace
}  // namespace moiety
