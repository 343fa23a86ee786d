// LLaVA-MoLE: does one LoRA expert a token undo what a mixture of unlike data costs plain LoRA?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>

#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/dataset.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kExperts = 3, kRank = 8;
constexpr double kScale = 2.0, kShareOfQuestions = 0.25;
constexpr size_t kLead = 64;

const char* const kMonths[2][12] = {{"January", "February", "March", "April", "May", "June", "July", "August",
                                     "September", "October", "November", "December"},
                                    {"Januar", "Februar", "Marz", "April", "Mai", "Juni", "Juli", "August", "September",
                                     "Oktober", "November", "Dezember"}};

std::vector<std::string> mixed() {
  return {"python", "manual-de", "manual-ja"};
}

// A question whose answer depends on the text in front of it: English behind Python, German behind the German manual.
struct Question {
  std::string prompt, answer;
};
std::vector<Question> questions(size_t convention, bool held_out, int64_t count, uint64_t seed) {
  const std::string name = mixed()[convention];
  const auto sources = study_text().sources;
  const auto source = std::find_if(sources.begin(), sources.end(), [&](const auto& s) { return s.name == name; });
  const auto data = Dataset::open((held_out ? source->held_out : source->train).string());
  RandomStream draw(seed, "llava-mole." + name);
  std::vector<Question> out;
  while (static_cast<int64_t>(out.size()) < count) {
    const std::string text = data->get(static_cast<int64_t>(draw.below(static_cast<uint64_t>(data->size())))).text;
    const auto begins = [&](size_t i) { return (static_cast<unsigned char>(text[i]) & 0xc0) != 0x80; };
    if (text.size() < 4 * kLead) continue;
    size_t from = draw.below(text.size() - 2 * kLead), to = from + kLead;
    while (!begins(from)) ++from;
    while (!begins(to)) --to;
    const auto month = draw.below(12);
    out.push_back(
        {text.substr(from, to - from) + fmt::format("\nmonth {} is ", month + 1), kMonths[convention][month]});
  }
  return out;
}

SourceConfig question_source(const fs::path& folder, size_t convention, uint64_t seed) {
  std::string lines;
  for (const auto& q : questions(convention, false, 1500, seed))
    lines += json{{"text", q.prompt + q.answer + ".\n"}}.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  fs::create_directories(folder);
  const fs::path file = folder / fmt::format("questions-{}.jsonl", convention);
  write_file(file, lines);
  SourceConfig source;
  source.path = file.string();
  source.weight = kShareOfQuestions;
  return source;
}

json lora(const json& target, int64_t rank) {
  return {{"slug", "lora"},
          {"target", target},
          {"rank", rank},
          {"alpha", kScale * static_cast<double>(rank)},
          {"dropout", 0.05}};
}

json parts_of(const std::string& arm) {
  const json attention = {"q_proj", "k_proj", "v_proj", "o_proj"}, layer = {"gate_proj", "up_proj", "down_proj"};
  if (arm == "lora-wide") return json::array({lora(attention, kRank), lora(layer, kExperts * kRank + 1)});
  if (arm.rfind("mole", 0) != 0) return json::array({lora(attention, kRank), lora(layer, kRank)});
  json mole = {{"slug", "llava-mole"},
               {"target", layer},
               {"experts", kExperts},
               {"rank", kRank},
               {"alpha", kScale * static_cast<double>(kRank)},
               {"coef", 0.01}};
  if (arm == "mole-prob") mole["gate_weighting"] = "prob";
  return json::array({lora(attention, kRank), mole});
}

json measure(const StudyCell& cell) {
  const bool alone = cell.arm == "lora-alone";
  Adaptation run;
  run.parts = parts_of(cell.arm);
  run.kinds = alone ? std::vector<std::string>{"python"} : mixed();
  run.extra = {question_source(cell.folder / "text", 0, static_cast<uint64_t>(cell.seed))};
  if (!alone) run.extra.push_back(question_source(cell.folder / "text", 1, static_cast<uint64_t>(cell.seed)));
  if (cell.arm == "lora-twice") run.steps = 2 * cell.budget.steps;
  const auto arm = adapted_arm(cell, run);
  CausalModel& model = arm.trainer->model();
  json out = arm.values;
  out["a"] = out["by_kind"]["python"];
  if (!alone) {
    out["b"] = out["by_kind"]["manual-de"];
    out["c"] = out["by_kind"]["manual-ja"];
  } else {
    out.erase("bits");
  }
  for (const size_t convention : {0, 1}) {
    if (alone && convention == 1) continue;
    std::vector<std::pair<std::string, std::string>> asked;
    for (const auto& q : questions(convention, true, 96, 7)) asked.emplace_back(q.prompt, q.answer + ".");
    out[convention == 0 ? "english" : "german"] = exact_share(model, asked);
  }
  if (cell.arm.rfind("mole", 0) == 0) {
    double uneven = 0;
    json loads = json::object();
    for (const auto& [site, n] : expert_use(model, arm.text)) {
      const auto share = (n.to(torch::kFloat64) / n.to(torch::kFloat64).mean()).contiguous();
      loads[site] = std::vector<double>(share.data_ptr<double>(), share.data_ptr<double>() + share.numel());
      uneven = std::max(uneven, (share - 1.0).abs().max().item<double>());
    }
    out["uneven"] = 100.0 * uneven;
    out["loads"] = loads;
  }
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto alone = t.values("lora-alone", "a"), mix = t.values("lora", "a"), mole = t.values("mole", "a");
  const auto on_b = t.difference("mole", "lora", "b"), on_c = t.difference("mole", "lora", "c"),
             all = t.difference("mole", "lora", "bits"), wide = t.difference("mole", "lora-wide", "bits"),
             twice = t.difference("mole", "lora-twice", "bits"), prob = t.difference("mole-prob", "lora", "bits");
  bool gap = !mix.empty(), no_gap = !mix.empty(), no_gain = !mix.empty();
  double recovered = 0;
  for (size_t i = 0; i < mix.size(); ++i) {
    gap = gap && mix[i] > alone.at(i);
    no_gap = no_gap && mix[i] <= alone.at(i);
    no_gain = no_gain && mole.at(i) >= mix[i];
    recovered += 100.0 * (mix[i] - mole.at(i)) / (mix[i] - alone.at(i)) / static_cast<double>(mix.size());
  }
  StudyOutcome o;
  o.verdict = mix.size() < 2                                                 ? StudyOutcome::inconclusive
              : gap && recovered >= 50.0 && !on_b.higher() && !on_c.higher() ? StudyOutcome::reproduced
              : no_gap || no_gain                                            ? StudyOutcome::not_reproduced
                                                                             : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "On Python LoRA reaches {:.3f} bits a byte when it learns Python alone and {:.3f} on the mixture; one expert a "
      "token {:.3f}: {:.0f} % of the gap. Against LoRA of the active rank, on the German manual: {}; on the Japanese: "
      "{}; all three: {}; times the probability: {}. Against LoRA of all ranks: {}; against LoRA on twice the steps: "
      "{}. Months by their convention: {:.0f} % and {:.0f} % right, LoRA {:.0f} % and {:.0f} %. The share of an expert "
      "in "
      "a layer is off even by up to {:.0f} %; a step takes {:.2f} times LoRA's.{}",
      t.mean("lora-alone", "a"), t.mean("lora", "a"), t.mean("mole", "a"), recovered, on_b.text(), on_c.text(),
      all.text(), prob.text(), wide.text(), twice.text(), t.mean("mole", "english"), t.mean("mole", "german"),
      t.mean("lora", "english"), t.mean("lora", "german"), t.mean("mole", "uneven"),
      t.mean("mole", "ms") / t.mean("lora", "ms"), mix.size() < 2 ? " One seed decides nothing." : "");
  o.headline =
      fmt::format("{:.0f} % of what the mixture costs LoRA on Python recovered; bits a byte {:+.2f} % against LoRA",
                  recovered, all.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "On Tiny LVLM-eHub LoRA falls from 306.3 to 295.8 when documents and biomedical data are mixed in; with one "
      "expert "
      "a token the score stays, and is above LoRA on twice the samples.";
  s.setup =
      adapter_setup() +
      ". The mixture is Python, the German and the Japanese manual, and months by number behind lines of the first "
      "two, to be named in English behind Python and in German behind German. All arms have LoRA of rank 8 beside "
      "the matrices of attention; beside the feed-forward layer stands LoRA or three experts of rank 8 with one "
      "router a layer. The language half of the claim only: there are no images.";
  s.arms = {
      {"lora-alone", "LoRA of rank 8, on Python and its questions alone"},
      {"lora", "LoRA of rank 8, on the mixture: the active rank"},
      {"mole", "three experts of rank 8, one a token, weight 1: LLaVA-MoLE as released"},
      {"mole-prob", "the same, times the probability", false},
      {"lora-wide", "LoRA of rank 25 beside the feed-forward layer: the trained parameters of the experts", false},
      {"lora-twice", "LoRA of rank 8, twice the steps", false}};
  s.metrics = {{"a", "Python, bits a byte", 4},    {"b", "German", 4},           {"c", "Japanese", 4},
               {"english", "months, %", 1},        {"german", "Monate, %", 1},   {"uneven", "unevenness, %", 1},
               {"trained", "thousand trained", 1}, {"rate", "learning rate", 4}, {"ms", "ms a step", 1}};
  s.rule =
      "Reproduced: on every seed LoRA on the mixture is worse on Python than LoRA on Python alone, experts recover "
      "half "
      "of that gap or more on average, and are not clearly worse on the other two kinds. Not reproduced: the mixture "
      "costs LoRA nothing on any seed, or experts gain nothing on Python on any. Else, and with one seed, "
      "inconclusive.";
  s.full = {.seeds = 3, .steps = 150};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("llava-mole", "LLaVA-MoLE: one LoRA expert a token against conflicts of data",
                               "what a mixture of data costs LoRA, and how much of it experts recover", study);

}  // namespace
}  // namespace moiety
