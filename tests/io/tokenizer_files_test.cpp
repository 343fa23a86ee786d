#include "moiety/io/tokenizer_files.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <fstream>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/tokenizer.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

fs::path fixtures() {
  return fs::path(MOIETY_SOURCE_DIR) / "tests/data/vocabularies";
}

class OldFiles : public testing::TestWithParam<std::string> {};

// Expected ids and texts are those of transformers (tools/make_vocabulary_fixtures.py).
TEST_P(OldFiles, EqualTransformers) {
  const auto tokenizer = Tokenizer::open((fixtures() / GetParam()).string());
  std::ifstream lines(fixtures() / GetParam() / "expected.jsonl");
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const json want = json::parse(line);
    const auto ids = tokenizer->encode(want["text"].get<std::string>());
    ASSERT_EQ(ids, want["ids"].get<std::vector<int64_t>>()) << want["text"];
    EXPECT_EQ(tokenizer->decode(ids), want["decoded"].get<std::string>());
    EXPECT_EQ(tokenizer->decode(ids, true), want["skip"].get<std::string>());
  }
  EXPECT_GE(count, 70);
}
INSTANTIATE_TEST_SUITE_P(Vocabularies, OldFiles,
                         testing::Values("gpt2", "gpt2-added", "roberta", "qwen2", "bert", "bert-cased"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(OldFiles, SpecialTokensOfTheConfig) {
  const auto added = Tokenizer::open((fixtures() / "gpt2-added").string());
  EXPECT_EQ(added->bos(), added->id("<|im_start|>"));
  EXPECT_EQ(added->eos(), added->id("<|im_end|>"));
  EXPECT_EQ(added->pad(), 602);
  const auto roberta = Tokenizer::open((fixtures() / "roberta").string());
  EXPECT_EQ(roberta->bos(), roberta->id("<s>"));
  EXPECT_EQ(roberta->unk(), roberta->id("<unk>"));
  EXPECT_FALSE(Tokenizer::open((fixtures() / "bert").string())->bos());
}

class OldFolder : public testing::Test {
 protected:
  void copy(const std::string& name) {
    for (const auto& entry : fs::directory_iterator(fixtures() / name))
      fs::copy_file(entry.path(), folder / entry.path().filename(), fs::copy_options::overwrite_existing);
  }
  std::string error() {
    return message_of([&] { Tokenizer::open(folder.path().string()); });
  }
  bool refuses(const std::string& file, const std::string& text, const std::string& why) {
    const std::string before = fs::exists(folder / file) ? read_text(folder / file) : "";
    write_file(folder / file, text);
    const std::string message = error();
    write_file(folder / file, before.empty() ? "{}" : before);
    EXPECT_NE(message.find(why), std::string::npos) << file << ": " << message;
    return message.find(why) != std::string::npos;
  }
  TemporaryFolder folder;
};

TEST_F(OldFolder, WhatIsNotReadSaysSo) {
  write_file(folder / "config.json", R"({"model_type": "llama"})");
  write_file(folder / "tokenizer.model", "x");
  EXPECT_NE(error().find("only tokenizer.model"), std::string::npos) << error();
  copy("gpt2");
  EXPECT_EQ(error(), "");
  refuses("config.json", R"({"model_type": "clip"})", "not of 'clip'");
  refuses("config.json", R"({"model_type": "bert"})", "vocab.json and merges.txt");
  refuses("tokenizer_config.json", R"({"tokenizer_class": "CLIPTokenizer"})", "not of 'CLIP'");
  EXPECT_EQ(error(), "");
}

TEST_F(OldFolder, DamageNamesThePlace) {
  copy("gpt2");
  refuses("vocab.json", "[]", "vocab.json");
  refuses("vocab.json", "{\"a\": ", "vocab.json");
  refuses("vocab.json", R"({"a": "b"})", "vocab");
  refuses("merges.txt", "#version: 0.2\nonepiece\n", "merges[0]");
  refuses("merges.txt", "no such\n", "not in the vocabulary");
  refuses("tokenizer_config.json", "[]", "object");
  refuses("tokenizer_config.json", R"({"bos_token": 7})", "bos_token");
  refuses("tokenizer_config.json", R"({"bos_token": {"text": "x"}})", "bos_token");
  refuses("tokenizer_config.json", R"({"add_prefix_space": "yes"})", "add_prefix_space");
  refuses("tokenizer_config.json", R"({"added_tokens_decoder": {"x1": {"content": "y"}}})", "x1");
  refuses("added_tokens.json", R"({"x": "y"})", "added_tokens.json");
  EXPECT_EQ(error(), "");
}

// Merges that begin with the sign of a comment are merges.
TEST_F(OldFolder, HashesAreMerged) {
  write_file(folder / "config.json", R"({"model_type": "gpt2"})");
  write_file(folder / "vocab.json", R"({"<|endoftext|>": 0, "#": 1, "##": 2, "a": 3})");
  write_file(folder / "merges.txt", "#version: 0.2\n# #\n");
  EXPECT_EQ(Tokenizer::open(folder.path().string())->encode("###a"), (std::vector<int64_t>{2, 1, 3}));
}

RC_GTEST_PROP(OldFilesProperty, AnyTextsEndInATokenizerOrError, (std::string vocabulary, const std::string& merges)) {
  const auto kind = *rc::gen::element<std::string>("GPT2", "Roberta", "Qwen2", "Bert");
  if (kind != "Bert") vocabulary = json({{"a", 0}, {"b", 1}, {"ab", 2}}).dump();
  const std::string message = message_of([&] {
    const HfTokenizer made = from_vocabulary({kind, vocabulary, merges, {}, {}, {}}, "vocab");
    Tokenizer::from_json(made.tokenizer, made.config)->encode("ab [CLS]");
  });
  if (kind != "Bert" && merges.empty()) RC_ASSERT(message == "");
  RC_ASSERT(message.size() < 2000);
}

}  // namespace
}  // namespace moiety
