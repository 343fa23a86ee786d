#include "moiety/models/sentence.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>

#include "moiety/base/error.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

const fs::path kSentence = fs::path(MOIETY_SOURCE_DIR) / "tests/data/encoders/sentence";

Tensor rows(const nlohmann::json& list) {
  std::vector<Tensor> out;
  for (const auto& row : list) out.push_back(torch::tensor(row.get<std::vector<float>>()));
  return torch::stack(out);
}

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(Pool, EveryMode) {
  // Two rows: three real tokens then padding; padding, then one real token.
  const Tensor x = torch::tensor(
      {{{1.f, -2.f}, {3.f, 4.f}, {8.f, 0.f}, {99.f, 99.f}}, {{99.f, 99.f}, {99.f, 99.f}, {99.f, 99.f}, {5.f, 6.f}}});
  const Tensor mask = torch::tensor({{true, true, true, false}, {false, false, false, true}});
  const auto expect = [&](const char* mode, std::vector<float> first, int64_t prompt = 0) {
    const Tensor y = pool(x, mask, {mode}, prompt);
    EXPECT_LT(distance(y[0], torch::tensor(first)), 1e-6) << mode;
    if (prompt == 0) {
      EXPECT_LT(distance(y[1], torch::tensor({5.f, 6.f})), 1e-6) << mode;
    }
    if (prompt > 0) {
      EXPECT_EQ(y[1].abs().sum().item<float>(), 0.f) << mode;  // all of the row was prompt
    }
  };
  expect("cls", {1, -2});
  expect("last", {8, 0});
  expect("max", {8, 4});
  expect("mean", {4, 2.f / 3});
  expect("mean_sqrt_len", {12 / std::sqrt(3.f), 2 / std::sqrt(3.f)});
  expect("weighted_mean", {(1 + 6 + 24) / 6.f, (-2 + 8) / 6.f});
  expect("cls", {3, 4}, 1);
  expect("mean", {5.5, 2}, 1);
  expect("weightedmean", {(6 + 24) / 5.f, 8 / 5.f}, 1);
  EXPECT_EQ(pool(x, mask, {"cls", "mean"}).size(1), 4);
  EXPECT_LT(distance(pool(x.narrow(1, 0, 3), {}, {"mean"})[0], torch::tensor({4.f, 2.f / 3})), 1e-6);
  EXPECT_THROW(pool(x, mask, {"median"}), Error);
}

TEST(Sentence, MatchesSentenceTransformers) {
  SentenceModel model(kSentence.string(), {.dtype = "f32"});
  std::ifstream in(kSentence / "expected.json");
  const auto expected = nlohmann::json::parse(in);
  const auto texts = expected["texts"].get<std::vector<std::string>>();
  EXPECT_EQ(model.max_length(), 16);
  EXPECT_EQ(model.settings().similarity, "dot");
  EXPECT_EQ(model.settings().pooling, (std::vector<std::string>{"cls", "mean"}));
  EXPECT_FALSE(model.settings().include_prompt);
  for (const int64_t batch : {1, 2, 32}) {
    EmbedOptions options;
    options.batch_size = batch;
    EXPECT_LT(distance(model.embed(texts, options), rows(expected["embeddings"])), 1e-5) << "batch " << batch;
    options.prompt_name = "query";
    EXPECT_LT(distance(model.embed(texts, options), rows(expected["query_embeddings"])), 1e-5) << "batch " << batch;
  }
}

TEST(Sentence, OptionsReplaceTheCheckpointsOwn) {
  SentenceModel model(kSentence.string(), {.dtype = "f32"});
  EmbedOptions options;
  options.pooling = {"mean"};
  Tensor y = model.embed({"the cat sat"}, options);
  EXPECT_EQ(y.size(1), 32);
  EXPECT_NEAR(y.norm().item<double>(), 1.0, 1e-5);
  options.normalize = false;
  EXPECT_GT(std::abs(model.embed({"the cat sat"}, options).norm().item<double>() - 1.0), 1e-3);
  options.prompt_name = "passage";
  EXPECT_THROW(model.embed({"x"}, options), Error);
  options.prompt_name = "";
  options.max_length = 41;
  EXPECT_THROW(model.embed({"x"}, options), Error);
  EXPECT_EQ(model.embed({}, {}).size(0), 0);
}

TEST(Sentence, TruncationKeepsSpecialTokens) {
  SentenceModel model(kSentence.string(), {.dtype = "f32"});
  const auto full = model.encode("the cat sat on the mat", 40), cut = model.encode("the cat sat on the mat", 5);
  ASSERT_EQ(full.size(), 8u);
  ASSERT_EQ(cut.size(), 5u);
  EXPECT_EQ(cut.front(), full.front());
  EXPECT_EQ(cut.back(), full.back());
  EXPECT_TRUE(std::equal(cut.begin(), cut.end() - 1, full.begin()));
}

TEST(Sentence, FoldersOfTheFirstReleasesLoad) {
  // The model in 0_Transformer, beside the other modules.
  const TemporaryFolder root;
  fs::create_directories(root / "0_Transformer");
  for (const char* name :
       {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"})
    fs::copy(kSentence / name, root / "0_Transformer" / name);
  fs::copy(kSentence / "2_Dense", root / "2_Dense");
  fs::create_directories(root / "1_Pooling");
  write_file(root / "1_Pooling" / "config.json",
             R"({"word_embedding_dimension": 32, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true})");
  write_file(root / "modules.json", R"([
    {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}])");
  SentenceModel old(root.path().string(), {.dtype = "f32"}), current(kSentence.string(), {.dtype = "f32"});
  const std::vector<std::string> texts = {"the cat sat", "A dog ran on the mat."};
  EXPECT_EQ(old.max_length(), 16);
  EXPECT_TRUE(old.embed(texts).equal(current.embed(texts)));
}

TEST(Sentence, BadModulesAreNamed) {
  const TemporaryFolder root;
  for (const char* name : {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"})
    fs::copy(kSentence / name, root / name);
  const auto message = [&](const std::string& modules) -> std::string {
    write_file(root / "modules.json", modules);
    try {
      SentenceModel model(root.path().string());
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_NE(message(R"([{"type": "x.CNN", "path": ""}])").find("module type 'x.CNN' is not supported"),
            std::string::npos);
  EXPECT_NE(message(R"([{"type": "x.Dense", "path": "../../etc"}])").find("leads out of"), std::string::npos);
  EXPECT_NE(message(R"([{"type": "x.Dense", "path": "2_Dense"}])").find("config.json is missing"), std::string::npos);
  EXPECT_NE(message("{").find("is not valid JSON"), std::string::npos);
  EXPECT_NE(message("[3]").find("must hold a JSON object"), std::string::npos);
}

TEST(Similarity, Kinds) {
  const Tensor a = torch::tensor({{3.f, 4.f}}), b = torch::tensor({{6.f, 8.f}, {4.f, -3.f}});
  EXPECT_LT(distance(similarity(a, b, "cosine"), torch::tensor({{1.f, 0.f}})), 1e-6);
  EXPECT_LT(distance(similarity(a, b, "dot"), torch::tensor({{50.f, 0.f}})), 1e-5);
  EXPECT_LT(distance(similarity(a, b, "euclidean"), torch::tensor({{-5.f, -std::sqrt(50.f)}})), 1e-5);
  EXPECT_LT(distance(similarity(a, b, "manhattan"), torch::tensor({{-7.f, -8.f}})), 1e-5);
  EXPECT_THROW(similarity(a, b, "jaccard"), Error);
}

}  // namespace
}  // namespace moiety
