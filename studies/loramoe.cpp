// LoRAMoE: does a mixture of LoRA experts, half of them kept for knowledge, forget fewer facts than LoRA and full
// fine-tuning?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <regex>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kExperts = 6, kRank = 4;
constexpr double kScale = 8.0;  // the paper's alpha of 32 over a rank of 4
// Of LoRA with at least the trained parameters of six experts and their router.
constexpr int64_t kLoraRank = 28;
constexpr size_t kFacts = 48, kAsked = 3;  // every third fact is in the tuning, too
constexpr int64_t kFactSteps = 300, kShortFactSteps = 100;

std::vector<std::string> tasks() {
  return {"python", "perl", "manual-de"};
}

struct Fact {
  std::string prompt, answer;
};

// Names and code points of characters, as Python's library has them for HTML.
std::vector<Fact> facts() {
  fs::path newest;
  for (const auto& entry : fs::directory_iterator("/usr/lib"))
    if (std::regex_match(entry.path().filename().string(), std::regex("python3\\.[0-9]+")) &&
        fs::exists(entry.path() / "html" / "entities.py"))
      newest = std::max(newest, entry.path());
  check(!newest.empty(), "there is no table of HTML's characters: apt-get install libpython3-stdlib");
  std::string text = read_text(newest / "html" / "entities.py");
  const size_t begin = text.find("name2codepoint = {");
  check(begin != std::string::npos, "{} has no table of names", (newest / "html" / "entities.py").string());
  text = text.substr(begin, text.find("\n}", begin) - begin);
  std::vector<Fact> all;
  const std::regex line("'([A-Za-z0-9]+)':\\s*0x([0-9a-f]{4})");
  for (auto it = std::sregex_iterator(text.begin(), text.end(), line); it != std::sregex_iterator(); ++it)
    all.push_back({"entity " + it->str(1) + " is ", it->str(2)});
  check(all.size() >= kFacts, "the table of HTML's characters has {} names, {} are needed", all.size(), kFacts);
  std::vector<Fact> out;
  for (size_t i = 0; i < kFacts; ++i) out.push_back(all[i * all.size() / kFacts]);
  return out;
}

bool is_tuned(size_t fact) {
  return fact % kAsked == 0;
}

// Documents of all those facts in changing orders.
SourceConfig fact_source(const fs::path& file, bool tuned_only, uint64_t seed, double weight) {
  std::vector<Fact> chosen;
  const auto all = facts();
  for (size_t i = 0; i < all.size(); ++i)
    if (!tuned_only || is_tuned(i)) chosen.push_back(all[i]);
  RandomStream draw(seed, "loramoe.facts");
  std::string lines;
  for (int document = 0; document < 60; ++document) {
    draw.shuffle(chosen);
    std::string text;
    for (const auto& f : chosen) text += f.prompt + f.answer + ".\n";
    lines += json{{"text", text}}.dump() + "\n";
  }
  write_file(file, lines);
  SourceConfig source;
  source.path = file.string();
  source.weight = weight;
  return source;
}

// Percent of the facts outside of the tuning that are recalled, each behind one of those inside.
double recall(CausalModel& model) {
  const auto all = facts();
  std::vector<std::pair<std::string, std::string>> questions;
  for (size_t i = 0; i < all.size(); ++i) {
    if (is_tuned(i)) continue;
    const Fact& before = all[i - i % kAsked];
    questions.emplace_back(before.prompt + before.answer + ".\n" + all[i].prompt, all[i].answer);
  }
  return exact_share(model, questions);
}

// The base, after it has learned the facts beside its own text.
fs::path knowing_base(const StudyCell& cell, int64_t seed) {
  const auto folder = cell.once(fmt::format("knowing-{}", seed), [&](const fs::path& to) {
    StudyCell own = cell;
    own.folder = to;
    Adaptation run;
    run.model = adapter_base(cell, seed);
    run.kinds = adapter_recipe().sources;
    run.shares = {0.15, 0.15};
    run.extra = {fact_source(to / "facts.jsonl", false, static_cast<uint64_t>(seed), 0.7)};
    run.rate = adapter_recipe().lr;
    run.steps = cell.budget.full() ? kFactSteps : kShortFactSteps;
    run.seed = seed;
    adapt(own, run);
  });
  return folder / "run" / "last";
}

json parts_of(const std::string& arm) {
  if (arm == "full") return nullptr;
  json part;
  if (arm == "lora")
    part = {{"slug", "lora"}, {"rank", kLoraRank}, {"alpha", kScale * static_cast<double>(kLoraRank)}};
  else
    part = {{"slug", "loramoe"},
            {"experts", kExperts},
            {"rank", kRank},
            {"alpha", kScale * static_cast<double>(kRank)},
            {"coef", arm == "constraint" ? 0.1 : 0.0},
            {"delta", 0.1}};
  part["target"] = {"gate_proj", "up_proj", "down_proj"};
  part["dropout"] = 0.05;
  return json::array({part});
}

// Of the gates of the first half of the experts, the share on that text, mean over matrices.
double first_half(CausalModel& model, const std::map<std::string, HeldOut>& text) {
  double mass = 0, rows = 0;
  trace_language(model, text, [&](const std::string&, const Trace::Record& r) {
    mass += r.routing.scores.narrow(1, 0, r.routing.scores.size(1) / 2).sum().item<double>();
    rows += static_cast<double>(r.routing.scores.size(0));
  });
  return rows > 0 ? mass / rows : 0.0;
}

std::map<std::string, HeldOut> fact_rows() {
  HeldOut rows;
  const auto all = facts();
  std::string text;
  for (size_t i = 0; i < all.size(); ++i)
    if (!is_tuned(i)) text += all[i].prompt + all[i].answer + ".\n";
  const int64_t length = adapter_recipe().length, n = static_cast<int64_t>(text.size()) / length;
  MicroBatch batch;
  batch.ids = torch::zeros({n, length}, torch::kInt64);
  for (int64_t i = 0; i < n * length; ++i)
    batch.ids.data_ptr<int64_t>()[i] = static_cast<unsigned char>(text[static_cast<size_t>(i)]);
  batch.targets = batch.ids.clone();
  batch.learned = batch.tokens = rows.learned = n * length;
  rows.batches.push_back(batch);
  return {{"facts", rows}};
}

Adaptation tuning_of(const StudyCell& cell, const StudyCell& in, int64_t base) {
  Adaptation run;
  run.model = knowing_base(cell, base);
  run.parts = parts_of(cell.arm);
  run.kinds = tasks();
  run.shares = {0.3, 0.3, 0.3};
  run.labels = {0, 0, 0};
  fs::create_directories(in.folder);
  run.extra = {fact_source(in.folder / "facts.jsonl", true, static_cast<uint64_t>(base), 0.1)};
  run.extra[0].label = 1;
  return run;
}

json measure(const StudyCell& cell) {
  if (cell.arm == "base") {
    const auto model = open_base_model(knowing_base(cell, cell.seed));
    json out = measure_bits(*model, adapter_text(tasks(), Half::test));
    out["recall"] = recall(*model);
    return out;
  }
  const json tuned = tuned_rate(cell, cell.arm, [&](const StudyCell& half, double rate) {
    auto run = tuning_of(cell, half, 0);
    run.rate = rate;
    run.seed = 1000;
    run.steps = half.budget.steps;
    return measure_bits(adapt(half, run)->model(), adapter_text(tasks(), Half::tuning))["bits"].get<double>();
  });
  auto run = tuning_of(cell, cell, cell.seed);
  run.rate = tuned.at("rate");
  run.seed = cell.seed;
  json curve = json::array();
  run.watch = [&](CausalModel& model, int64_t step, int64_t steps) {
    if (step % std::max<int64_t>(1, steps / 6) == 0) curve.push_back({{"step", step}, {"recall", recall(model)}});
  };
  const auto trainer = adapt(cell, run);
  CausalModel& model = trainer->model();
  const auto text = adapter_text(tasks(), Half::test);
  json out = measure_bits(model, text);
  out["recall"] = recall(model);
  out["curve"] = curve;
  out["trained"] = thousand_trained(model);
  out["rate"] = run.rate;
  out["tried"] = tuned.at("tried");
  if (cell.arm == "loramoe" || cell.arm == "constraint")
    out["apart"] = first_half(model, fact_rows()) - first_half(model, text);
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto bits = t.difference("constraint", "lora", "bits");
  const auto kept = t.values("constraint", "recall"), lora = t.values("lora", "recall"),
             full = t.values("full", "recall"), with = t.values("constraint", "apart"),
             without = t.values("loramoe", "apart");
  bool more = !kept.empty(), less = !kept.empty(), apart = !kept.empty();
  for (size_t i = 0; i < kept.size(); ++i) {
    more = more && kept[i] > lora.at(i) && kept[i] > full.at(i);
    less = less && (kept[i] <= lora.at(i) || kept[i] <= full.at(i));
    apart = apart && with.at(i) > without.at(i) + 0.1;
  }
  StudyOutcome o;
  o.verdict = kept.size() < 2                    ? StudyOutcome::inconclusive
              : more && apart && bits.mean < 2.0 ? StudyOutcome::reproduced
              : less || bits.higher(2.0)         ? StudyOutcome::not_reproduced
                                                 : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Of facts that were not in the tuning the base recalls {:.1f} %; after it full fine-tuning keeps {:.1f} %, LoRA "
      "{:.1f} %, LoRAMoE {:.1f} % without and {:.1f} % with the constraint. Bits a byte on the tasks with it against "
      "LoRA: {}. The first half of the experts has {:+.3f} more of the gates on facts than on tasks, {:+.3f} without "
      "the "
      "constraint.{}",
      t.mean("base", "recall"), t.mean("full", "recall"), t.mean("lora", "recall"), t.mean("loramoe", "recall"),
      t.mean("constraint", "recall"), bits.text(), t.mean("constraint", "apart"), t.mean("loramoe", "apart"),
      kept.size() < 2 ? " One seed decides nothing." : "");
  o.headline = fmt::format("facts recalled {:.0f} % with LoRAMoE, {:.0f} % with LoRA, {:.0f} % after full fine-tuning",
                           t.mean("constraint", "recall"), t.mean("lora", "recall"), t.mean("full", "recall"));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "After fine-tuning Llama-2-7B on 5 million samples closed-book answers get much worse; with LoRAMoE they stay or "
      "improve, and downstream tasks are as good or better.";
  s.setup = adapter_setup() +
            fmt::format(
                ". Before, the base also learns {} facts (names of HTML's characters and their code points, from "
                "Python's library) in {} steps ({} in a short run). Then it is tuned on Python, Perl's manual and the "
                "German manual, with a tenth of the rows from a third of the facts; the others are asked for. Experts "
                "and LoRA stand beside the feed-forward matrices.",
                kFacts, kFactSteps, kShortFactSteps);
  s.arms = {{"base", "before the tuning"},
            {"full", "every parameter learns"},
            {"lora", "LoRA of rank 28: the trained parameters of all experts and routers"},
            {"loramoe", "six experts of rank 4, without the constraint"},
            {"constraint", "LoRAMoE: the same with the localized balancing constraint, delta and beta 0.1"}};
  s.metrics = {{"recall", "facts recalled, %", 1},
               {"bits", "bits a byte on tasks", 4},
               {"apart", "gates apart", 3},
               {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: on every seed LoRAMoE with the constraint recalls more facts than LoRA and than full fine-tuning, "
      "its "
      "gates are apart by 0.1 more than without the constraint, and its bits a byte on the tasks are on average less "
      "than 2 % above LoRA's. Not reproduced: on every seed it recalls no more than one of them, or its bits are "
      "clearly "
      "more than 2 % above LoRA's. Else, and with one seed, inconclusive.";
  s.full = {.seeds = 3, .steps = 150};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("loramoe", "LoRAMoE: fine-tuning that keeps what was known",
                               "facts recalled after tuning, against LoRA and full fine-tuning", study);

}  // namespace
}  // namespace moiety
