// EAQuant over a whole small mixture: with many bits the model stays, with few it is another, and what is saved loads.
#include "moiety/compress/eaquant_model.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/whole_matrices.h"
#include "moiety/models/merged.h"
#include "moiety/models/model.h"
#include "moiety/train/open_run.h"
#include "small_mixture.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json config_of(const json& more = json::object()) {
  json c = {{"model_type", "qwen2_moe"},
            {"vocab_size", 40},
            {"hidden_size", 32},
            {"num_hidden_layers", 2},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 4},
            {"intermediate_size", 32},
            {"moe_intermediate_size", 16},
            {"shared_expert_intermediate_size", 32},
            {"num_experts", 4},
            {"num_experts_per_tok", 2},
            {"decoder_sparse_step", 1},
            {"initializer_range", 0.2},
            {"max_position_embeddings", 64},
            {"tie_word_embeddings", true}};
  c.update(more);
  return c;
}

struct Base {
  TemporaryFolder folder{"moiety-test"};
  std::shared_ptr<const Checkpoint> checkpoint;
  explicit Base(const json& more = json::object()) {
    torch::manual_seed(1);
    json config = config_of(more);
    const auto model = make_causal(config);
    config["dtype"] = "float32";
    std::filesystem::create_directories(folder.path());
    write_file(folder / "config.json", config.dump());
    write_stored(folder.path(), model->stored(), "f32");
    checkpoint = Checkpoint::open(folder.path().string());
  }
};

std::vector<std::vector<int64_t>> samples(int64_t count = 4, int64_t length = 24) {
  std::vector<std::vector<int64_t>> out;
  for (int64_t s = 0; s < count; ++s) {
    out.emplace_back();
    for (int64_t t = 0; t < length; ++t) out.back().push_back((s * 13 + t * 5 + t * t * 3) % 40);
  }
  return out;
}

EaquantConfig bits(int64_t weights, int64_t activations, int64_t router) {
  EaquantConfig c;
  c.weight_bits = weights;
  c.activation_bits = activations;
  c.router_bits = router;
  c.block_size = 8;
  c.lac = 1.0;  // clipping would hide what bits cost
  c.rotation_steps = 8;
  return c;
}

Tensor logits(const Checkpoint& checkpoint) {
  const torch::NoGradGuard frozen;
  const auto model = load_causal(checkpoint, {.dtype = "f32"});
  model->eval();
  Pass pass;
  return model->forward(torch::arange(24, torch::kInt64).view({2, 12}), pass);
}

double relative(const Tensor& a, const Tensor& b) {
  return (a - b).norm().item<double>() / b.norm().item<double>();
}

TEST(EaquantModel, ManyBitsLeaveTheModel) {
  const Base base;
  const auto config = bits(16, 16, 16);
  json report;
  const auto same = eaquant_checkpoint(base.checkpoint, config, samples(), &report);
  EXPECT_LT(relative(logits(*same), logits(*base.checkpoint)), 2e-3);
  ASSERT_EQ(report["layers"].size(), 2u);
  EXPECT_EQ(report["layers"][1]["router_overlap"], 1.0);
  // Something was done to the matrices all the same.
  const auto weight = [](const Checkpoint& c) { return c.get("model.layers.0.self_attn.q_proj.weight").to_float(); };
  EXPECT_NE(weight(*same), weight(*base.checkpoint));
}

TEST(EaquantModel, FewerBitsCostMore) {
  const Base base;
  const auto want = logits(*base.checkpoint);
  const auto loss = [&](int64_t w, int64_t a) {
    return relative(logits(*eaquant_checkpoint(base.checkpoint, bits(w, a, 8), samples())), want);
  };
  const double eight = loss(8, 8), four = loss(4, 4), weights_only = loss(4, 16);
  EXPECT_LT(eight, four);
  EXPECT_LT(weights_only, four);
  EXPECT_GT(four, 0.02);
  EXPECT_LT(eight, 0.1);
}

TEST(EaquantModel, IsWrittenAndReadAgain) {
  const Base base;
  const auto small = eaquant_checkpoint(base.checkpoint, bits(4, 4, 8), samples());
  const TemporaryFolder out("moiety-test");
  write_hf(*small, out.path(), {});
  const auto read = Checkpoint::open(out.path().string());
  EXPECT_TRUE(torch::equal(logits(*read), logits(*small)));
  // Merged, it is the model with rounded weights alone, in the base that it had.
  const auto plain = merged_checkpoint(read);
  EXPECT_FALSE(plain->config().contains("moiety"));
  EXPECT_LT(relative(logits(*plain), logits(*base.checkpoint)), relative(logits(*read), logits(*base.checkpoint)));
}

// Written packed and read again, it is what is stored plain, and as small as its bits say.
void expect_packed_is_plain(const std::shared_ptr<const Checkpoint>& base, const EaquantConfig& config) {
  const auto plain = eaquant_checkpoint(base, config, samples()),
             packed = eaquant_checkpoint(base, config, samples(), nullptr, {}, true);
  const TemporaryFolder out("moiety-test");
  const WriteReport written = write_hf(*packed, out.path(), {});
  WriteOptions dry;
  dry.dry_run = true;
  EXPECT_EQ(write_hf(*packed, out.path(), dry).bytes, written.bytes);
  const auto read = Checkpoint::open(out.path().string());
  EXPECT_EQ(read->config(), plain->config());
  ASSERT_EQ(read->tensors().size(), plain->tensors().size());
  int64_t bound = 0, matrices = 0;
  for (const TensorInfo& t : plain->tensors()) {
    ASSERT_TRUE(read->has(t.name)) << t.name;
    const TensorView got = read->get(t.name), want = plain->get(t.name);
    EXPECT_EQ(got.format, want.format) << t.name;
    EXPECT_EQ(got.shape, want.shape) << t.name;
    EXPECT_TRUE(std::equal(got.data.begin(), got.data.end(), want.data.begin(), want.data.end())) << t.name;
    const bool on_grid = packed->has(t.name + ".q");
    EXPECT_EQ(on_grid, t.name.find("_proj") != std::string::npos && t.name.find("weight") != std::string::npos &&
                               t.name.find("shared_expert") == std::string::npos ||
                           t.name.ends_with("experts.gate_up_proj") || t.name.ends_with("experts.down_proj") ||
                           t.name.find(".w1.") != std::string::npos || t.name.find(".w2.") != std::string::npos ||
                           t.name.find(".w3.") != std::string::npos)
        << t.name;
    matrices += on_grid ? 1 : 0;
    bound += on_grid ? t.rows() * ((t.cols() * config.weight_bits + 7) / 8 + 2 * 4) : t.bytes();
  }
  EXPECT_GT(matrices, 0);
  EXPECT_EQ(written.bytes, bound);
  int64_t stored = 0;
  for (const TensorInfo& t : stored_tensors(*read)) stored += t.bytes();
  EXPECT_EQ(stored, bound);
  const auto header = static_cast<int64_t>(stored_tensors(*read).size()) * 256 + 64;
  EXPECT_LE(static_cast<int64_t>(std::filesystem::file_size(out.path() / "model.safetensors")), bound + header);
  EXPECT_TRUE(torch::equal(logits(*read), logits(*plain)));
}

TEST(EaquantModel, PackedIsPlainBitByBit) {
  const Base base;
  for (const int64_t width : {2, 3, 4, 5, 8, 11, 16}) expect_packed_is_plain(base.checkpoint, bits(width, 8, 8));
  auto minmax = bits(4, 8, 8);
  minmax.weight_method = "minmax";
  minmax.balance_ratio = 0.0;
  expect_packed_is_plain(base.checkpoint, minmax);
}

TEST(EaquantModel, PackedIsPlainInEveryLayout) {
  const Base base;
  expect_packed_is_plain(small_mixture::separate(base.checkpoint), bits(4, 4, 8));
  const TemporaryFolder folder("moiety-test");
  WriteOptions bf16;
  bf16.dtype = "bf16";
  write_hf(*base.checkpoint, folder.path(), bf16);
  expect_packed_is_plain(Checkpoint::open(folder.path().string()), bits(4, 4, 8));
  // Rows of 21 codes do not fill their bytes.
  auto odd = bits(3, 4, 8);
  odd.block_size = 7;
  const Base narrow(
      json{{"hidden_size", 28}, {"num_attention_heads", 2}, {"num_key_value_heads", 2}, {"moe_intermediate_size", 21}});
  expect_packed_is_plain(narrow.checkpoint, odd);
  const Base mixtral(json{{"model_type", "mixtral"}, {"num_local_experts", 4}});
  expect_packed_is_plain(small_mixture::separate(mixtral.checkpoint), bits(2, 4, 8));
}

TEST(EaquantModel, IsTheSameWithTheSameSeed) {
  const Base base;
  const auto one = eaquant_checkpoint(base.checkpoint, bits(4, 4, 8), samples()),
             other = eaquant_checkpoint(base.checkpoint, bits(4, 4, 8), samples());
  for (const TensorInfo& t : one->tensors()) EXPECT_EQ(one->get(t.name).to_float(), other->get(t.name).to_float());
}

TEST(EaquantModel, SwitchesMayBeOff) {
  const Base base;
  for (const char* aggregate : {"frequency", "router", "weight", "none"}) {
    auto config = bits(8, 8, 8);
    config.aggregate = aggregate;
    config.balance_ratio = 0.0;
    config.router_loss = "kl";
    EXPECT_LT(relative(logits(*eaquant_checkpoint(base.checkpoint, config, samples())), logits(*base.checkpoint)), 0.3)
        << aggregate;
  }
}

TEST(EaquantModel, BadInputIsAnError) {
  const Base base;
  auto blocks = bits(4, 4, 8);
  blocks.block_size = 12;
  EXPECT_NE(message_of([&] { eaquant_checkpoint(base.checkpoint, blocks, samples()); }).find("blocks of 4 would do"),
            std::string::npos);
  const auto says = [&](const std::vector<std::vector<int64_t>>& s) {
    return message_of([&] { eaquant_checkpoint(base.checkpoint, bits(4, 4, 8), s); });
  };
  EXPECT_NE(says({}).find("no calibration data"), std::string::npos);
  EXPECT_NE(says({{1, 2}}).find("fewer than 4 experts"), std::string::npos);
  EXPECT_NE(says({{1, 2, 3}, {1, 2}}).find("of one length"), std::string::npos);
  const Base dense(json({{"model_type", "llama"}}));
  EXPECT_NE(message_of([&] { eaquant_checkpoint(dense.checkpoint, bits(4, 4, 8), samples()); }).find("is dense"),
            std::string::npos);
  const auto small = eaquant_checkpoint(base.checkpoint, bits(4, 4, 8), samples());
  EXPECT_NE(message_of([&] { eaquant_checkpoint(small, bits(4, 4, 8), samples()); }).find("has parts already"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
