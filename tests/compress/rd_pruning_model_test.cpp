#include "moiety/compress/rd_pruning_model.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <set>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/nn/weights.h"
#include "moiety/train/run_folder.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

LoadOptions trainable() {
  LoadOptions o;
  o.dtype = "f32";
  o.trainable = true;
  return o;
}

std::shared_ptr<VisionModel> vision(bool shared, bool mixture = false) {
  torch::manual_seed(1);
  VisionConfig c;
  c.image = 8;
  c.patch = 4;
  c.hidden = 8;
  c.blocks = 3;
  c.heads = 2;
  c.width = 12;
  c.classes = 4;
  c.mixture = mixture;
  c.share_attention = c.share_ffn = shared;
  c.moe.unlimited = true;
  auto model = make_vision(c, trainable());
  model->eval();
  return model;
}

std::shared_ptr<CausalModel> decoder(const json& more = json::object()) {
  torch::manual_seed(2);
  json config = {{"model_type", "llama"},      {"vocab_size", 30},
                 {"hidden_size", 16},          {"intermediate_size", 24},
                 {"num_hidden_layers", 2},     {"num_attention_heads", 4},
                 {"num_key_value_heads", 2},   {"max_position_embeddings", 64},
                 {"tie_word_embeddings", true}};
  config.update(more);
  auto model = make_causal(config, trainable());
  model->eval();
  return model;
}

Tensor run(const StagedModel& model, Tensor x) {
  const torch::NoGradGuard frozen;
  for (const auto& stage : model.stages) x = stage(x);
  return x;
}

std::vector<std::string> names(const StagedModel& model) {
  std::vector<std::string> out;
  for (const auto& l : model.layers) out.push_back(l.name);
  return out;
}

TEST(StagesOfVision, AreTheModel) {
  for (const bool shared : {false, true}) {
    const auto model = vision(shared);
    const auto staged = stages_of(*model);
    const auto x = torch::randn({5, 1, 8, 8});
    const torch::NoGradGuard frozen;
    Pass pass;
    EXPECT_TRUE(torch::equal(run(staged, x), model->forward(x, pass)));
    // Patches, four of attention and two of the feed-forward layer (a block, or all), representation and head.
    EXPECT_EQ(staged.layers.size(), shared ? 9u : 21u);
    EXPECT_EQ(staged.layers[0].name, "patches.weight");
    EXPECT_EQ(staged.layers[0].stage, 0);
    EXPECT_EQ(staged.layers[1].name, shared ? "shared.attention.q.weight" : "blocks.0.attention.q.weight");
    EXPECT_EQ(staged.layers[1].stage, 1);
    EXPECT_EQ(staged.layers.back().name, "head.weight");
    EXPECT_EQ(staged.layers.back().stage, 4);
  }
}

TEST(StagesOfVision, ExpertsAreLayersAndRoutersAreNot) {
  const auto model = vision(true, true);
  const auto all = names(stages_of(*model));
  EXPECT_EQ(all.size(), 1u + 4u + 2u * 4u + 2u);
  const std::set<std::string> unique(all.begin(), all.end());
  EXPECT_EQ(unique.size(), all.size());
  EXPECT_EQ(unique.count("shared.ffn.experts.w1[3]"), 1u);
  EXPECT_EQ(unique.count("shared.ffn.router.weight"), 0u);
}

TEST(StagesOfDecoder, AreTheModel) {
  const auto model = decoder();
  const auto staged = stages_of(*model);
  const auto ids = torch::randint(30, {3, 7}, torch::kInt64);
  const torch::NoGradGuard frozen;
  Pass pass;
  const auto logits = model->forward(ids, pass);
  EXPECT_TRUE(torch::allclose(run(staged, ids), logits, 1e-5, 1e-6));
  EXPECT_EQ(staged.layers.size(), 14u);  // the head is the embedding
  EXPECT_EQ(staged.layers[0].name, "model.layers.0.self_attn.q_proj.weight");
  EXPECT_EQ(staged.layers[13].name, "model.layers.1.mlp.down_proj.weight");
  EXPECT_EQ(staged.layers[13].stage, 2);
  const auto some = run(stages_of(*model, 5, 3), ids);
  ASSERT_EQ(some.size(2), 5);
  for (int64_t i = 0; i < 5; ++i) {
    const auto column = some.select(2, i).unsqueeze(2);
    EXPECT_TRUE(((logits - column).abs().amax({0, 1}) < 1e-5).any().item<bool>()) << i;
  }
}

TEST(StagesOfDecoder, AHeadOfItsOwnIsALayer) {
  const auto staged = stages_of(*decoder({{"tie_word_embeddings", false}}));
  EXPECT_EQ(staged.layers.size(), 15u);
  EXPECT_EQ(staged.layers.back().name, "lm_head.weight");
}

class EncoderFamilies : public testing::TestWithParam<const char*> {};

// Stages, pruning and what is written, of fixtures that transformers made.
TEST_P(EncoderFamilies, ArePrunedAndWritten) {
  const auto folder = std::filesystem::path(MOIETY_SOURCE_DIR) / "tests/data/encoders" / GetParam();
  auto model = open_prunable(folder.string());
  ASSERT_TRUE(model.encoder);
  const torch::NoGradGuard frozen;
  torch::manual_seed(5);
  const auto ids = torch::randint(6, 40, {4, 9}, torch::kInt64);
  EXPECT_TRUE(torch::allclose(run(model.staged, ids), model.encoder->embed(ids, {}), 1e-5, 1e-6));
  const auto all = names(model.staged);
  const std::set<std::string> unique(all.begin(), all.end());
  EXPECT_EQ(unique.size(), all.size());
  for (const auto& name : all) EXPECT_TRUE(model.checkpoint->has(name)) << name;
  EXPECT_EQ(model.zeros(), 0.0);
  RdPruningConfig c;
  c.sparsity = 0.5;
  c.grid = 4;
  prune_layers(model.staged, {ids}, "rd", c);
  const TemporaryFolder out;
  write_hf(*model.now(), out / "pruned");
  const auto again = open_prunable((out / "pruned").string());
  EXPECT_EQ(again.zeros(), model.zeros());
  EXPECT_GE(again.zeros(), 0.5);
  EXPECT_TRUE(torch::allclose(run(again.staged, ids), run(model.staged, ids), 1e-5, 1e-6));
}
INSTANTIATE_TEST_SUITE_P(Fixtures, EncoderFamilies,
                         testing::Values("bert", "bert_bf16", "bert_mlm", "bert_old", "camembert", "distilbert",
                                         "distilbert_mlm", "electra", "modernbert", "modernbert_mlm", "mpnet",
                                         "nomic_bert", "roberta", "sentence", "xlm_roberta"));

TEST(PruneLayers, ReachesItsTargetByEveryMethod) {
  for (const char* method : {"rd", "uniform", "uniform+", "global", "lamp", "erk"}) {
    const auto model = vision(false);
    auto staged = stages_of(*model);
    RdPruningConfig c;
    c.sparsity = 0.6;
    c.grid = 10;
    const auto report = prune_layers(staged, {torch::randn({16, 1, 8, 8})}, method, c);
    const auto target = 0.6 * static_cast<double>(report.weights);
    // Others round in every layer.
    EXPECT_GE(static_cast<double>(report.pruned), target - (std::string(method) == "rd" ? 0.0 : 11.0)) << method;
    EXPECT_LE(static_cast<double>(report.pruned), target + 0.1 * static_cast<double>(report.weights)) << method;
    EXPECT_GT(report.joint, 0.0);
    int64_t zeros = 0;
    for (const auto& l : staged.layers) zeros += l.weight.numel() - l.weight.count_nonzero().item<int64_t>();
    EXPECT_EQ(zeros, report.pruned);
    EXPECT_EQ(report.layers.size(), staged.layers.size());
  }
}

TEST(PruneLayers, DisturbsLessThanUniform) {
  double moved[2];
  int i = 0;
  for (const char* method : {"rd", "uniform"}) {
    const auto model = vision(false);
    auto staged = stages_of(*model);
    RdPruningConfig c;
    c.sparsity = 0.5;
    c.grid = 20;
    c.worst_case = false;
    torch::manual_seed(3);
    moved[i++] = prune_layers(staged, {torch::randn({32, 1, 8, 8})}, method, c).joint;
  }
  EXPECT_LT(moved[0], 0.8 * moved[1]);
}

TEST(PruneLayers, IterationsOnlyGrowMasks) {
  const auto model = decoder();
  auto staged = stages_of(*model);
  const std::vector<Tensor> batches{torch::randint(30, {4, 8}, torch::kInt64)};
  RdPruningConfig c;
  c.sparsity = 0.3;
  c.grid = 5;
  c.iterations = 2;
  prune_layers(staged, batches, "rd", c);
  std::vector<Tensor> before;
  for (const auto& l : staged.layers) before.push_back(l.weight == 0);
  c.sparsity = 0.7;
  const auto report = prune_layers(staged, batches, "rd", c);
  EXPECT_GE(static_cast<double>(report.pruned), 0.7 * static_cast<double>(report.weights));
  for (size_t l = 0; l < before.size(); ++l) {
    EXPECT_TRUE((staged.layers[l].weight.masked_select(before[l]) == 0).all().item<bool>());
    EXPECT_EQ(report.layers[l].before, before[l].sum().item<int64_t>());
  }
  c.sparsity = 0.2;
  EXPECT_NE(message_of([&] { prune_layers(staged, batches, "rd", c); }).find("the model is already 7"),
            std::string::npos);
}

TEST(PruneLayers, FloorsHold) {
  const auto model = vision(false);
  auto staged = stages_of(*model);
  RdPruningConfig c;
  c.sparsity = 0.6;
  c.grid = 10;
  c.floor = 0.3;
  const std::vector<Tensor> batches{torch::randn({8, 1, 8, 8})};
  const auto report = prune_layers(staged, batches, "rd", c);
  for (const auto& l : report.layers)
    EXPECT_GE(static_cast<double>(l.weights - l.pruned), 0.3 * static_cast<double>(l.weights) - 1e-6) << l.name;
  c.sparsity = 0.8;
  EXPECT_NE(message_of([&] { prune_layers(staged, batches, "rd", c); }).find("cannot be pruned further"),
            std::string::npos);
}

TEST(WithValues, WritesZerosInTheBasesTypes) {
  const TemporaryFolder folder;
  const auto model = decoder();
  NamedTensors tensors;
  for (const auto& t : model->stored()) tensors[t.name] = t.value().detach().to(torch::kBFloat16).contiguous();
  write_tensors(folder / "model.safetensors", tensors);
  write_file(folder / "config.json", model->config().dump());
  const auto base = Checkpoint::open(folder.path().string());
  const auto own = load_causal(*base, trainable());
  auto staged = stages_of(*own);
  RdPruningConfig c;
  c.sparsity = 0.5;
  prune_layers(staged, {}, "global", c);
  const auto pruned = with_values(base, own->stored());
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  const auto w = as_tensor(pruned->get(name));
  EXPECT_EQ(w.scalar_type(), torch::kBFloat16);
  const auto kept = w != 0;
  EXPECT_TRUE(torch::equal(w.masked_select(kept), tensors.at(name).masked_select(kept)));
  EXPECT_LT(kept.sum().item<int64_t>(), w.numel());
  EXPECT_TRUE(torch::equal(as_tensor(pruned->get("model.norm.weight")), tensors.at("model.norm.weight")));
}

}  // namespace
}  // namespace moiety
