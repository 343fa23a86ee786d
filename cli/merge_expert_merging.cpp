// moiety merge --method expert-merging: coefficients learned on a few samples of each expert's task.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "merge.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/io/chat_template.h"
#include "moiety/io/examples.h"
#include "moiety/io/tokenizer.h"
#include "moiety/train/expert_merging.h"

namespace moiety::cli {
namespace {

struct Options {
  ExpertMergingConfig config;
  std::vector<std::string> data;
  int64_t length = 256;
  std::string report;
};

// The first samples of a file as token ids.
MergeTask read_task(const std::string& path, const Options& o, const Tokenizer& tokenizer,
                    const ChatTemplate* chat_template) {
  const auto data = Dataset::open(path);
  EncodeOptions encode;
  encode.max_length = o.length;
  MergeTask out;
  const int64_t wanted = o.config.samples > 0 ? std::min(o.config.samples, data->size()) : data->size();
  for (int64_t i = 0; i < wanted; ++i) {
    const Sample sample = data->get(i);
    out.push_back(encode_example(sample, tokenizer, chat_template, encode).ids);
    check(out.back().size() >= 2, "{} gives fewer than two tokens", sample.where);
  }
  check(!out.empty(), "{} holds no samples", path);
  return out;
}

// Samples of every task; a tokenizer that encodes them otherwise than the base's is another one.
std::vector<MergeTask> read_tasks(const Options& o, const Checkpoint& base,
                                  const std::vector<std::shared_ptr<const Checkpoint>>& experts) {
  const auto tokenizer = Tokenizer::load(base);
  std::optional<ChatTemplate> chat;
  if (const std::string source = tokenizer->chat_template(); !source.empty()) chat.emplace(source);
  const ChatTemplate* chat_template = chat ? &*chat : nullptr;
  std::vector<MergeTask> out;
  for (size_t k = 0; k < experts.size(); ++k) {
    out.push_back(read_task(o.data[k], o, *tokenizer, chat_template));
    const auto own = Tokenizer::load(*experts[k]);
    check(read_task(o.data[k], o, *own, chat_template) == out.back(),
          "the tokenizer of {} is another one than that of {}", experts[k]->path().string(), base.path().string());
  }
  return out;
}

int run(const MergeArguments& a, const Options& o) {
  check(o.data.size() == a.experts.size(), "{} experts need --data with as many files, one a task: there are {}",
        a.experts.size(), o.data.size());
  const auto base = Checkpoint::open(a.common.model);
  std::vector<std::shared_ptr<const Checkpoint>> experts;
  for (const auto& e : a.experts) experts.push_back(Checkpoint::open(e));
  const auto tasks = read_tasks(o, *base, experts);
  std::optional<Progress> progress;
  const auto result = learn_expert_merging(base, experts, tasks, o.config, [&](int64_t done, int64_t all) {
    if (!progress) progress.emplace("merge", all, "sample");
    progress->set(done);
  });
  progress.reset();
  if (!o.report.empty()) write_file(o.report, result.json().dump(1) + "\n");
  if (!a.common.json && !a.common.quiet) {
    std::string losses;
    for (const double l : result.losses) losses += fmt::format(" {:.4f}", l);
    fmt::print("{} tensors, mean loss of each epoch:{}\n", result.names.size(), losses);
  }
  return write_merged(*result.model, a);
}

std::function<int()> setup(CLI::App& app, std::shared_ptr<const MergeArguments> a) {
  auto o = std::make_shared<Options>();
  ExpertMergingConfig& c = o->config;
  const std::string mark = " (expert-merging)";
  app.add_option("--data", o->data, "Samples of each expert's task, a file each in their order; no labels" + mark);
  app.add_option("--samples", c.samples, "Samples of each task; 0: all" + mark)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--length", o->length, "Tokens of a sample at most" + mark)
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--init", c.init, "Coefficient that all begin at, between 0 and 1" + mark)->capture_default_str();
  app.add_option("--epochs", c.epochs, "Passes over the samples" + mark)
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--lr", c.lr, "Peak learning rate" + mark)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--temperature", c.temperature, "Of the logits" + mark)->capture_default_str();
  app.add_option("--reg-weight", c.reg_weight, "What holds coefficients where they began" + mark)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--hidden-layers", c.hidden_layers,
                 "Hidden states that are compared too: 0 the embeddings, the number of blocks the last" + mark);
  app.add_option("--hidden-weight", c.hidden_weight, "Of their loss" + mark)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--beta", c.beta, "Of each task's losses, as many as experts (default: 1)" + mark);
  app.add_flag("--plus-plus", c.plus_plus, "Then once more, with chunks of tensors by their importance" + mark);
  app.add_option("--budget", c.budget, "Coefficients an expert for each merged tensor (--plus-plus)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--kappa", c.kappa, "Power of the importance (--plus-plus)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--exclude", c.exclude, "Regular expressions from the start of a name: tensors of the base" + mark)
      ->capture_default_str();
  app.add_option("--seed", c.seed, "Of the order of samples" + mark)->capture_default_str();
  app.add_option("--report", o->report, "Write coefficients and losses to this JSON file" + mark);
  return [a, o] { return run(*a, *o); };
}

const RegisterMerge expert_merging({"expert-merging"}, setup);

}  // namespace
}  // namespace moiety::cli
