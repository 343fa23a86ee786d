// Encoders against what transformers computed (tools/make_encoder_fixtures.py), and the properties that batches must
// have.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>

#include "moiety/base/error.h"
#include "moiety/io/checkpoint.h"
#include "moiety/io/safetensors.h"
#include "moiety/models/model.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

const fs::path kData = fs::path(MOIETY_SOURCE_DIR) / "tests/data/encoders";

struct Fixture {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::shared_ptr<EncoderModel> model;
  Tensor ids, mask, types, hidden, pooled;
};

Fixture open(const std::string& name, const std::string& dtype = "f32", bool trainable = false) {
  Fixture f;
  f.checkpoint = Checkpoint::open((kData / name).string());
  f.model = load_encoder(*f.checkpoint, {.dtype = dtype, .trainable = trainable});
  const auto file = SafetensorsFile::open(kData / name / "expected.safetensors");
  const auto read = [&](const char* key) { return file->has(key) ? as_tensor(file->get(key)).clone() : Tensor(); };
  f.ids = read("ids");
  f.mask = read("mask").to(torch::kBool);
  f.types = read("types");
  f.hidden = read("hidden");
  f.pooled = read("pooled");
  return f;
}

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

class Family : public testing::TestWithParam<const char*> {};

TEST_P(Family, MatchesTransformers) {
  torch::NoGradGuard no_grad;
  auto f = open(GetParam());
  EXPECT_TRUE(is_encoder(f.model->config()));
  const Tensor y = f.model->forward(f.ids, f.mask, f.types);
  ASSERT_EQ(y.sizes(), f.hidden.sizes());
  EXPECT_EQ(y.scalar_type(), torch::kFloat32);
  // Only real tokens: what a padded one attends to differs between transformers' own attention kernels.
  const Tensor real = f.mask.unsqueeze(-1);
  EXPECT_LT(distance(y * real, f.hidden * real), 1e-5);
  if (f.pooled.defined()) {
    EXPECT_LT(distance(f.model->pooled(y), f.pooled), 1e-5);
  }
}

TEST_P(Family, PaddedBatchEqualsSingle) {
  torch::NoGradGuard no_grad;
  auto f = open(GetParam());
  const Tensor right = f.model->forward(f.ids, f.mask, f.types);
  const int64_t width = f.ids.size(1);
  for (int64_t row = 0; row < f.ids.size(0); ++row) {
    const int64_t length = f.mask[row].sum().item<int64_t>();
    const auto cut = [&](const Tensor& t) { return t.defined() ? t[row].narrow(0, 0, length).unsqueeze(0) : t; };
    const Tensor single = f.model->forward(cut(f.ids), {}, cut(f.types));
    EXPECT_LT(distance(single[0], right[row].narrow(0, 0, length)), 1e-6 * 4) << "row " << row;
    // The same row padded on the left, with an id that is not the padding token.
    const auto shift = [&](const Tensor& t, int64_t fill) {
      return t.defined() ? torch::cat({torch::full({1, width - length}, fill, torch::kInt64), cut(t)}, 1) : t;
    };
    const Tensor mask = torch::arange(width).ge(width - length).unsqueeze(0);
    const Tensor left = f.model->forward(shift(f.ids, 5), mask, shift(f.types, 0));
    EXPECT_LT(distance(single[0], left[0].narrow(0, width - length, length)), 1e-6 * 4)
        << "row " << row << " padded on the left";
  }
}

TEST_P(Family, Bf16IsClose) {
  torch::NoGradGuard no_grad;
  auto f = open(GetParam(), "bf16");
  const Tensor real = f.mask.unsqueeze(-1);
  const Tensor y = f.model->forward(f.ids, f.mask, f.types) * real, expected = f.hidden * real;
  // bf16 keeps 8 bits: about 1/256 for each of some ten roundings in a row, on values of unit scale.
  EXPECT_LT(((y - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item<double>(), 0.05);
  EXPECT_GT(distance(y, expected), 1e-4) << "this was not computed in bf16";
}

TEST_P(Family, GradientsReachEveryParameter) {
  auto f = open(GetParam(), "f32", true);
  const Tensor probe = torch::randn_like(f.hidden) * f.mask.unsqueeze(-1);
  const auto loss = [&] { return (f.model->forward(f.ids, f.mask, f.types) * probe).sum(); };
  loss().backward();
  int64_t reached = 0;
  for (const auto& item : f.model->named_parameters()) {
    if (item.key().find("pooler") != std::string::npos) continue;
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    // A key's bias shifts all scores of a query alike: softmax does not see it.
    if (item.key().ends_with("bias") &&
        (item.key().find("key") != std::string::npos || item.key().find(".k") != std::string::npos))
      continue;
    EXPECT_GT(item.value().grad().abs().max().item<double>(), 0.0) << item.key();
    ++reached;
  }
  EXPECT_GT(reached, 10);
  // Along the gradient itself the loss must rise by |g|^2 per unit step.
  torch::NoGradGuard no_grad;
  double squared = 0.0;
  std::vector<Tensor> parameters;
  for (auto& p : f.model->parameters())
    if (p.grad().defined()) {
      squared += p.grad().square().sum().item<double>();
      parameters.push_back(p);
    }
  const double step = 2e-3 / std::sqrt(squared);
  for (auto& p : parameters) p.add_(p.grad(), step);
  const double up = loss().item<double>();
  for (auto& p : parameters) p.add_(p.grad(), -2 * step);
  const double down = loss().item<double>();
  EXPECT_NEAR((up - down) / (2 * step) / squared, 1.0, 0.02);
}

INSTANTIATE_TEST_SUITE_P(Encoders, Family,
                         testing::Values("bert", "bert_mlm", "bert_old", "bert_bf16", "roberta", "xlm_roberta",
                                         "camembert", "distilbert", "distilbert_mlm", "electra", "mpnet", "nomic_bert",
                                         "modernbert", "modernbert_mlm"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Encoder, StoredDtypeIsKept) {
  auto f = open("bert_bf16", "auto");
  EXPECT_EQ(f.model->parameters().front().scalar_type(), torch::kBFloat16);
  EXPECT_EQ(open("bert", "auto").model->parameters().front().scalar_type(), torch::kFloat32);
}

TEST(Encoder, ParametersKeepTheirNames) {
  auto f = open("bert_mlm");
  const auto parameters = f.model->named_parameters();
  for (const char* name : {"embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.query.bias",
                           "encoder.layer.0.output.LayerNorm.weight"})
    EXPECT_TRUE(parameters.contains(name)) << name;
}

TEST(Encoder, RowOfPaddingStaysFinite) {
  torch::NoGradGuard no_grad;
  for (const char* name : {"bert", "mpnet", "modernbert"}) {
    auto f = open(name);
    Tensor mask = f.mask.clone();
    mask[1].fill_(false);
    EXPECT_TRUE(f.model->forward(f.ids, mask, f.types).isfinite().all().item<bool>()) << name;
    EXPECT_TRUE(f.model->embed(f.ids, mask).isfinite().all().item<bool>()) << name;
  }
}

std::string message(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

/// A copy of a fixture with another config.json.
fs::path copy_with(const std::string& name, const std::function<void(nlohmann::json&)>& edit) {
  const fs::path folder = fs::path(testing::TempDir()) / ("moiety_encoder_" + name);
  fs::remove_all(folder);
  fs::create_directories(folder);
  fs::copy(kData / name / "model.safetensors", folder / "model.safetensors");
  std::ifstream in(kData / name / "config.json");
  auto config = nlohmann::json::parse(in);
  edit(config);
  std::ofstream(folder / "config.json") << config.dump();
  return folder;
}

TEST(Encoder, BadInputIsNamed) {
  auto f = open("bert");
  Tensor ids = f.ids.clone();
  ids[0][2] = 80;
  EXPECT_EQ(message([&] { f.model->forward(ids, f.mask); }), "token id 80 is outside 0 .. 79");
  EXPECT_EQ(message([&] {
              f.model->forward(torch::zeros({1, 41}, torch::kInt64), {});
            }),
            "a sequence of 41 tokens is longer than the 40 positions of this encoder");
  EXPECT_EQ(open("roberta").model->max_length(), 38);
  EXPECT_NE(message([&] { open("electra").model->pooled(f.hidden); }).find("has no pooler"), std::string::npos);

  const auto load = [&](const std::function<void(nlohmann::json&)>& edit) {
    const auto folder = copy_with("bert", edit);
    return message([&] { load_encoder(*Checkpoint::open(folder.string())); });
  };
  EXPECT_NE(load([](auto& c) { c["model_type"] = "llama"; }).find("`llama` is not an encoder"), std::string::npos);
  EXPECT_NE(load([](auto& c) {
              c["num_hidden_layers"] = 3;
            }).find("needs tensor 'encoder.layer.2.attention.self.query.weight'"),
            std::string::npos);
  EXPECT_NE(load([](auto& c) { c["intermediate_size"] = 41; }).find("has shape [40], the config asks for [41]"),
            std::string::npos);
  EXPECT_NE(load([](auto& c) { c["hidden_act"] = "gloo"; }).find("unknown activation 'gloo'"), std::string::npos);
  EXPECT_NE(load([](auto& c) { c["vocab_size"] = "many"; }).find("vocab_size must be a whole number"),
            std::string::npos);
  EXPECT_NE(load([](auto& c) { c["num_attention_heads"] = 5; }).find("positive multiple"), std::string::npos);
  EXPECT_NE(
      load([](auto& c) { c["position_embedding_type"] = "relative_key"; }).find("'relative_key' is not supported"),
      std::string::npos);
}

}  // namespace
}  // namespace moiety
