#include "moiety/study/experts.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/compress/expert_selection.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/dataset.h"
#include "moiety/models/random_checkpoint.h"

namespace moiety {
namespace {

using nlohmann::json;

// The text of studies comes from packages that need not be installed.
bool there_is_text() {
  try {
    study_text();
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<std::string> texts_of(const std::filesystem::path& file) {
  const auto data = Dataset::open(file.string());
  std::vector<std::string> out;
  for (int64_t i = 0; i < data->size(); ++i) out.push_back(data->get(i).text);
  return out;
}

StudySource source(const std::string& name) {
  for (const auto& s : study_text().sources)
    if (s.name == name) return s;
  fail("no {}", name);
}

TEST(MixtureText, QuestionsHaveOneTrueAnswerThatStandsInAHeldOutDocument) {
  if (!there_is_text()) GTEST_SKIP() << "the packages of the text of studies are not installed";
  const auto text = mixture_text({"manual-ja"});  // characters of three bytes
  ASSERT_EQ(text.questions.size(), 210u);
  EXPECT_EQ(text.rows.size(), 1u);
  const auto documents = texts_of(source("manual-ja").held_out);
  std::set<int64_t> answers;
  for (const auto& q : text.questions) {
    ASSERT_EQ(q.choices.size(), 4u);
    answers.insert(q.answer);
    const std::string& truth = q.choices[static_cast<size_t>(q.answer)];
    EXPECT_TRUE(std::any_of(documents.begin(), documents.end(),
                            [&](const std::string& d) { return d.find(q.context + truth) != std::string::npos; }));
    for (size_t c = 0; c < q.choices.size(); ++c) {
      if (static_cast<int64_t>(c) != q.answer) EXPECT_NE(q.choices[c], truth);
      EXPECT_NE(static_cast<unsigned char>(q.choices[c][0]) & 0xC0, 0x80) << "a character was cut";
      EXPECT_LT(q.choices[c].size(), 24u + 3);
    }
  }
  EXPECT_EQ(answers, (std::set<int64_t>{0, 1, 2, 3}));
}

TEST(MixtureText, LearnedDocumentsKeepTheirBudgetAndAreNotHeldOut) {
  if (!there_is_text()) GTEST_SKIP() << "the packages of the text of studies are not installed";
  const std::vector<std::string> kinds{"python", "prose"};
  const auto documents = learned_documents(kinds, 8192);
  size_t bytes = 0;
  for (const auto& d : documents) bytes += d.size();
  EXPECT_LE(bytes, 8192u);
  EXPECT_GE(bytes, 8192u - 4);  // a single byte is no sequence
  EXPECT_NE(learned_documents(kinds, 8192, 1), documents);
  const std::string first(documents[0].begin(), documents[0].end());
  const auto begins = [&](const std::filesystem::path& file) {
    const auto all = texts_of(file);
    return std::any_of(all.begin(), all.end(), [&](const std::string& d) { return d.rfind(first, 0) == 0; });
  };
  EXPECT_TRUE(begins(source("python").train));
  EXPECT_FALSE(begins(source("python").held_out));
}

TEST(MixturePlans, KeepTheExpertsOfTheLargestScore) {
  const json config = {{"model_type", "mixtral"},        {"hidden_size", 32},        {"intermediate_size", 32},
                       {"num_hidden_layers", 2},         {"num_attention_heads", 2}, {"num_key_value_heads", 2},
                       {"num_local_experts", 8},         {"num_experts_per_tok", 2}, {"vocab_size", 259},
                       {"max_position_embeddings", 256}, {"initializer_range", 0.3}};
  const TemporaryFolder folder("moiety-experts-test");
  write_hf(*random_checkpoint(config, "/nowhere", 3), folder / "base");
  const ExpertLayers layers(Checkpoint::open((folder / "base").string()));
  Calibration calibration;
  for (const auto& layer : layers.layers()) {
    LayerCalibration c;
    c.block = layer.block;
    c.tokens = 100;
    c.load = torch::tensor({1, 40, 2, 30, 20, 3, 100, 4}, torch::kInt64);
    c.gates = c.pairs = c.output = torch::ones({8}, torch::kFloat64);
    c.gram = torch::eye(8, torch::kFloat64);
    calibration.layers.push_back(c);
  }
  StudyCell cell;
  cell.folder = folder / "cell";
  const auto to = with_plan(cell, folder / "base", calibration, kept_by("frequency", 4, 0), "four");
  EXPECT_EQ(experts_left(to, folder / "base"), 50.0);
  const ExpertLayers four(Checkpoint::open(to.string()));
  const auto best = torch::tensor({1, 3, 4, 6}, torch::kInt64);
  for (size_t l = 0; l < 2; ++l) EXPECT_TRUE(torch::equal(four.router(l), layers.router(l).index_select(0, best))) << l;
  EXPECT_EQ(
      experts_left(with_plan(cell, folder / "base", calibration, kept_by("random", 2, 0), "two"), folder / "base"),
      25.0);
}

}  // namespace
}  // namespace moiety
