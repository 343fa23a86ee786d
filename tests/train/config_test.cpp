#include "moiety/train/config.h"

#include <gtest/gtest.h>

#include "moiety/base/error.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

const char* const kRun = R"(
model: {config: {model_type: llama}, tokenizer: bytes}
data: book.txt
train: {steps: 10}
output: runs/a
)";

std::string message(const std::string& yaml, const std::vector<std::string>& set = {}) {
  try {
    read_train_config(yaml, "run.yaml", set);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(TrainConfig, ShortForms) {
  const auto c = read_train_config(kRun, "run.yaml");
  EXPECT_EQ(c.data.sources.at(0).path, "book.txt");
  EXPECT_EQ(c.output.folder, "runs/a");
  EXPECT_EQ(c.model.tokenizer, "bytes");
  const auto d = read_train_config("model: pip:x\ndata: [a.txt, {path: b.txt}]\ntrain: {epochs: 2}\noutput: o\n", "r");
  EXPECT_EQ(d.model.checkpoint, "pip:x");
  EXPECT_EQ(d.data.sources.size(), 2u);
  EXPECT_EQ(d.data.sources[1].path, "b.txt");
}

TEST(TrainConfig, Overrides) {
  const auto c = read_train_config(kRun, "run.yaml",
                                   {"optimizer.lr=5e-4", "output=runs/b", "data.sources=[x.txt]",
                                    "train.freeze=[embed]", "model.config.hidden_size=64", "optimizer.name=lion"});
  EXPECT_DOUBLE_EQ(c.optimizer.lr, 5e-4);
  EXPECT_EQ(c.optimizer.name, "lion");
  EXPECT_EQ(c.output.folder, "runs/b");
  EXPECT_EQ(c.train.freeze.at(0), "embed");
  EXPECT_EQ(c.model.config.at("hidden_size"), 64);
  const auto d = read_train_config(kRun, "run.yaml", {"output.every=5", "output=runs/c", "output.keep=3"});
  EXPECT_EQ(d.output.folder, "runs/c");
  EXPECT_EQ(d.output.every, 5);
  EXPECT_EQ(d.output.keep, 3);
  EXPECT_TRUE(has(message(kRun, {"optimizer.lr"}), "KEY=VALUE"));
  EXPECT_TRUE(has(message(kRun, {"train.steps.x=1"}), "train.steps.x"));
  EXPECT_TRUE(has(message(kRun, {"optimizer.lrr=1"}), "lr"));
}

TEST(TrainConfig, ErrorsNameKeyLineAndWhatIsAllowed) {
  const std::string typo =
      message("model: pip:x\ndata: a.txt\ntrain: {steps: 1}\noutput: o\nschedule: {name: cosin}\n");
  EXPECT_TRUE(has(typo, "run.yaml:5") && has(typo, "schedule.name") && has(typo, "wsd")) << typo;
  const std::string unknown = message("model: pip:x\ndata: a.txt\ntrain:\n  stepz: 1\noutput: o\n");
  EXPECT_TRUE(has(unknown, "run.yaml:4") && has(unknown, "did you mean `steps`")) << unknown;
  EXPECT_TRUE(has(message("data: a.txt\ntrain: {steps: 1}\noutput: o\n"), "model"));
  EXPECT_TRUE(has(message("model: pip:x\ndata: a.txt\ntrain: {}\noutput: o\n"), "steps or epochs"));
  EXPECT_TRUE(has(message("model: {config: {}}\ndata: a.txt\ntrain: {steps: 1}\noutput: o\n"), "tokenizer"));
  EXPECT_TRUE(
      has(message("model: pip:x\ndata: a\ntrain: {steps: 1}\noutput: o\nevaluation: {every: 5}\n"), "held_out"));
  EXPECT_TRUE(has(message("model: pip:x\ndata: {sources: [{path: a, weight: 1}, b]}\ntrain: {steps: 1}\noutput: o\n"),
                  "weight"));
}

TEST(TrainConfig, WhatMayChangeBetweenSittings) {
  auto a = read_train_config(kRun, "run.yaml");
  const auto before = dump(a);
  EXPECT_TRUE(changed_keys(before, dump(a)).empty());
  a.train.steps = 20;
  a.output.every = 5;
  a.evaluation.tokens = 100;
  EXPECT_TRUE(changed_keys(before, dump(a)).empty());
  a.optimizer.lr = 1;
  a.data.sources[0].path = "other.txt";
  const auto changed = changed_keys(before, dump(a));
  ASSERT_EQ(changed.size(), 2u);
  EXPECT_TRUE(has(changed[0], "data.sources"));
  EXPECT_TRUE(has(changed[1], "optimizer.lr (was 0.001, is 1"));
}

TEST(TrainConfig, ARunOfAnOlderProgramGoesOn) {
  const auto now = dump(read_train_config(kRun, "run.yaml"));
  auto before = now;
  before.erase("routing");  // a section that came later
  EXPECT_TRUE(changed_keys(before, now).empty());
  auto other = now;
  other["routing"]["z_coef"] = 0.1;
  EXPECT_EQ(changed_keys(before, other).size(), 1u);
}

// Names of all fields, sections inside too.
void collect(const std::vector<FieldInfo>& fields, std::vector<std::string>& out) {
  for (const auto& f : fields) {
    out.push_back(f.name);
    collect(f.fields, out);
  }
}

TEST(TrainConfig, TheGuideNamesEveryKey) {
  const std::string guide = read_text(std::filesystem::path(MOIETY_SOURCE_DIR) / "docs" / "train.md");
  std::vector<std::string> names;
  collect(describe<TrainConfig>(), names);
  EXPECT_GT(names.size(), 60u);
  for (const auto& name : names)
    EXPECT_TRUE(has(guide, "`" + name + "`") || has(guide, "." + name + "`") || has(guide, "`" + name + ".") ||
                has(guide, name + ":"))
        << name;
}

TEST(TrainConfig, TheExampleIsARun) {
  const auto file = std::filesystem::path(MOIETY_SOURCE_DIR) / "examples" / "train-tiny.yaml";
  const auto c = read_train_config(read_text(file), file.string());
  EXPECT_EQ(c.model.config.at("model_type"), "llama");
  EXPECT_GT(c.train.steps, 0);
}

}  // namespace
}  // namespace moiety
