// DynMoLE: does the entropy rule, with its loss, find how many LoRA experts a token needs?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/adapt/dynmole.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kExperts = 6, kRank = 4;
constexpr double kScale = 2.0;
// Of LoRA with at least the trained parameters of six experts and their router.
constexpr int64_t kLoraRank = 28;

json parts_of(const std::string& arm) {
  json part = {{"experts", kExperts}, {"rank", kRank}, {"alpha", kScale * static_cast<double>(kRank)}};
  if (arm == "lora") {
    part = {{"slug", "lora"}, {"rank", kLoraRank}, {"alpha", kScale * static_cast<double>(kLoraRank)}};
  } else if (arm == "top-2") {
    part["slug"] = "mola";
    part["coef"] = 0.001;
  } else if (arm == "soft") {
    part["slug"] = "loramoe";
  } else {
    part["slug"] = "dynmole";
    if (arm == "no-entropy") part["entropy_coef"] = 0.0;
    // Without the rule for unsure tokens, without a least number and without the loss.
    if (arm == "top-p") part.update({{"entropy_coef", 0.0}, {"entropy_threshold", 1.0}, {"keep_top_k", 1}});
  }
  part["target"] = "all";
  part["dropout"] = 0.05;
  return json::array({part});
}

struct Routed {
  double active = 0, entropy = 0;
};
// Experts a token and the normalized Tsallis entropy of the distributions, means over matrices and tokens.
Routed routed(CausalModel& model, const std::map<std::string, HeldOut>& text) {
  const DynMoleRule rule;
  double active = 0, h = 0, rows = 0;
  trace_language(model, text, [&](const std::string&, const Trace::Record& r) {
    active += ((r.routing.experts >= 0) & (r.routing.gates > 0)).sum().item<double>();
    h += entropy(r.routing.scores.to(torch::kFloat32), rule.entropy_index, rule.entropy_eps, true, rule.entropy_type)
             .sum()
             .item<double>();
    rows += static_cast<double>(r.routing.scores.size(0));
  });
  return rows > 0 ? Routed{active / rows, h / rows} : Routed{};
}

json measure(const StudyCell& cell) {
  json curve = json::array();
  auto few = adapter_text({"python"}, Half::tuning);
  few.at("python").batches.resize(1);
  Adaptation run{.parts = parts_of(cell.arm), .kinds = adapter_kinds()};
  if (cell.arm != "lora")
    run.watch = [&](CausalModel& model, int64_t step, int64_t steps) {
      if (step % std::max<int64_t>(1, steps / 5) != 0) return;
      const auto now = routed(model, few);
      curve.push_back({{"step", step}, {"active", now.active}, {"entropy", now.entropy}});
    };
  const auto arm = adapted_arm(cell, run);
  json out = arm.values;
  if (cell.arm == "lora") return out;
  const auto now = routed(arm.trainer->model(), arm.text);
  out["active"] = now.active;
  out["entropy"] = now.entropy;
  out["curve"] = curve;
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto lora = t.difference("dynmole", "lora", "bits"), two = t.difference("dynmole", "top-2", "bits"),
             soft = t.difference("dynmole", "soft", "bits"), none = t.difference("dynmole", "no-entropy", "bits"),
             p = t.difference("dynmole", "top-p", "bits"), h = t.difference("dynmole", "no-entropy", "entropy");
  const auto active = t.values("dynmole", "active");
  const bool between = !active.empty() && std::all_of(active.begin(), active.end(), [](double n) {
    return n > 2.0 && n < static_cast<double>(kExperts) - 0.1;
  });
  StudyOutcome o;
  o.verdict = two.lower() && lora.lower() && h.lower() && between ? StudyOutcome::reproduced
              : two.higher() || lora.higher() || h.higher()       ? StudyOutcome::not_reproduced
                                                                  : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Bits a byte against LoRA of equal trained parameters: {}; against two experts a token: {}; against all experts: "
      "{}; against top-p alone: {}; against itself without the entropy loss: {}. A token takes {:.2f} of {} experts "
      "({:.2f} without the loss); the entropy of its distribution is {:.3f} of the largest, {:.3f} without the loss.",
      lora.text(), two.text(), soft.text(), p.text(), none.text(), t.mean("dynmole", "active"), kExperts,
      t.mean("no-entropy", "active"), t.mean("dynmole", "entropy"), t.mean("no-entropy", "entropy"));
  o.headline = fmt::format("bits a byte {:+.2f} % against LoRA, {:+.2f} % against top-2; {:.1f} of {} experts a token",
                           lora.mean, two.mean, t.mean("dynmole", "active"), kExperts);
  return o;
}

Study study() {
  Study s;
  s.claim = "Llama-2-7B on commonsense reasoning: 9.6 % above LoRA and 2.3 % above MoLA.";
  s.setup =
      adapter_setup() +
      ". Six experts of rank 4 beside all matrices learn five kinds at once: Python, Perl's manual, and the manual "
      "in German, French and Japanese. Entropy threshold 0.9, index 1.1, top-p 0.75, at least two experts; dropout "
      "0.05 in all arms.";
  s.arms = {{"dynmole", "DynMoLE: balance loss 0.001, entropy loss 0.01"},
            {"lora", "LoRA of rank 28: the trained parameters of all experts and routers"},
            {"top-2", "two experts a token, gates over their sum, balance loss 0.001: MoLA"},
            {"soft", "all experts by their probabilities", false},
            {"top-p", "experts while their probabilities sum up to 0.75, at least one, no entropy rule or loss", false},
            {"no-entropy", "DynMoLE without the entropy loss"}};
  s.metrics = {{"bits", "bits a byte", 4},
               {"active", "experts a token", 3},
               {"entropy", "entropy", 3},
               {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: bits a byte are clearly lower than of LoRA of equal trained parameters and than with two experts a "
      "token, the entropy is clearly lower than without its loss, and on every seed a token takes more than two "
      "experts "
      "and fewer than all. Not reproduced: clearly more bits than either, or a clearly higher entropy. Else "
      "inconclusive.";
  s.full = {.seeds = 3, .steps = 150};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("dynmole", "DynMoLE: as many LoRA experts as a token is unsure",
                               "experts a token and bits a byte against fixed numbers", study);

}  // namespace
}  // namespace moiety
