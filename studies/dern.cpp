// DERN: do neurons of dropped experts that move into those left give back some of what dropping costs?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <map>

#include "moiety/compress/expert_plans.h"
#include "moiety/study/experts.h"
#include "moiety/tasks/scoring.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

const std::vector<double> kThresholds{0.0, 0.2, 0.4, 0.6};
constexpr int64_t kTuningBytes = 14336;
const std::vector<std::string> kOthers{"drop", "frequency", "reap", "random", "m-smoe"};

struct Setting {
  std::string name, text;
  MixtureBase base;
  int64_t keep;
};
const std::vector<Setting> kSettings{{"copies_6", "6 of 8 copies", {8, true}, 6},
                                     {"copies_4", "4 of 8 copies", {8, true}, 4},
                                     {"grown_12", "12 of 16 grown", {16, false}, 12},
                                     {"grown_8", "8 of 16 grown", {16, false}, 8}};
constexpr const char* kJudged = "copies_4";

MixturePlan dern(int64_t keep, double threshold, const std::string& init = "own") {
  return [=](const ExpertLayers& layers, const Calibration& calibration) {
    DernConfig c;
    c.threshold = threshold;
    c.init = init;
    return plan_dern(layers, calibration, {static_cast<double>(keep), false}, {}, c).layers;
  };
}

MixturePlan plan_of(const std::string& arm, int64_t keep, uint64_t seed) {
  if (arm == "drop") return dern(keep, 1.0);  // nothing is above 1: plain dropping by the same importance
  if (arm == "dern-paper") return dern(keep, 0.6);
  if (arm == "dern-all") return dern(keep, 0.0);
  if (arm == "m-smoe")
    return [=](const ExpertLayers& layers, const Calibration& calibration) {
      MSmoeConfig c;
      c.groups = keep;
      return plan_m_smoe(layers, calibration, c).layers;
    };
  return kept_by(arm, keep, seed);
}

// The share of dropped neurons that move.
double moved_share(const fs::path& base, const Calibration& calibration, int64_t keep, double threshold) {
  DernConfig c;
  c.threshold = threshold;
  const auto planned =
      plan_dern(ExpertLayers(Checkpoint::open(base.string())), calibration, {static_cast<double>(keep), false}, {}, c);
  double moved = 0, all = 0;
  for (const auto& layer : planned.report) {
    moved += layer["moved"].get<double>();
    all += layer["moved"].get<double>() + layer["lost"].get<double>();
  }
  return 100.0 * moved / std::max(1.0, all);
}

// Nats a byte of learned documents that the calibration has not seen.
double learned_loss(const fs::path& model) {
  const auto loaded = load_causal(*Checkpoint::open(model.string()));
  loaded->eval();
  double sum = 0, count = 0;
  for (const auto& ids : learned_documents({}, kTuningBytes, 1)) {
    const auto n = static_cast<int64_t>(ids.size());
    const auto scores = score_tokens(*loaded, torch::tensor(ids, torch::kInt64).unsqueeze(0));
    sum -= scores.logprob.sum().item<double>();
    count += static_cast<double>(n - 1);
  }
  return sum / count;
}

json measure(const StudyCell& cell) {
  const MixtureText text = mixture_text();
  json out, details = json::array();
  std::map<std::string, Calibration> calibrations;
  for (const auto& s : kSettings) {
    const fs::path base = mixture_base(cell, s.base);
    fs::path model = base;
    json detail{{"setting", s.name}};
    if (cell.arm != "whole") {
      if (calibrations.count(base.string()) == 0) calibrations[base.string()] = mixture_calibration(base);
      const Calibration& calibration = calibrations.at(base.string());
      if (cell.arm == "dern") {
        double best = std::numeric_limits<double>::infinity(), threshold = 0;
        for (const double t : kThresholds) {
          const auto tried = with_plan(cell, base, calibration, dern(s.keep, t), fmt::format("{}-{}", s.name, t));
          const double loss = learned_loss(tried);
          detail["tried"].push_back({t, loss});
          if (loss < best) best = loss, threshold = t, model = tried;
        }
        detail["threshold"] = threshold;
        detail["moved"] = moved_share(base, calibration, s.keep, threshold);
        out["moved_" + s.name] = detail["moved"];
      } else {
        model = with_plan(cell, base, calibration, plan_of(cell.arm, s.keep, static_cast<uint64_t>(cell.seed)), s.name);
      }
    }
    const json got = measure_mixture(model, text);
    out["bits_" + s.name] = got["bits_per_byte"];
    out["choice_" + s.name] = got["choice"];
    detail.update({{"by_source", got["by_source"]}, {"left", experts_left(model, base)}});
    details.push_back(detail);
  }
  out["details"] = details;
  return out;
}

// What a setting says: DERN against the others, and the best of these.
std::string setting_text(const StudyTable& t, const Setting& s) {
  const std::string bits = "bits_" + s.name, choice = "choice_" + s.name;
  std::string best;
  for (const auto& arm : kOthers)
    if (t.has(arm) && (best.empty() || t.mean(arm, bits) < t.mean(best, bits))) best = arm;
  return fmt::format(
      "{}: {:.4f} bits a byte (whole {:.4f}); against plain dropping {}, against the best other one, {}, {}; {:.1f} % "
      "of questions right (whole {:.1f} %, {} {:.1f} %); {:.0f} % of the dropped neurons moved.",
      s.text, t.mean("dern", bits), t.mean("whole", bits), t.difference("dern", "drop", bits).text(), best,
      t.difference("dern", best, bits).text(), t.mean("dern", choice), t.mean("whole", choice), best,
      t.mean(best, choice), t.mean("dern", "moved_" + s.name));
}

StudyOutcome judge(const StudyTable& t) {
  const std::string bits = std::string("bits_") + kJudged;
  const auto gain = t.difference("dern", "drop", bits);
  bool best = gain.lower(), worse = gain.higher();
  for (const auto& arm : kOthers) {
    if (!t.has(arm)) continue;
    const auto d = t.difference("dern", arm, bits);
    best = best && d.lower();
    worse = worse || d.higher();
  }
  const bool never = gain.percent.size() > 1 && *std::min_element(gain.percent.begin(), gain.percent.end()) >= 0;
  StudyOutcome o;
  o.verdict = best             ? StudyOutcome::reproduced
              : worse || never ? StudyOutcome::not_reproduced
                               : StudyOutcome::inconclusive;
  for (const auto& s : kSettings) o.reason += (o.reason.empty() ? "" : " ") + setting_text(t, s);
  o.headline = fmt::format("half of 8 copied experts: bits a byte {:+.2f} % against dropping, {:+.2f} % against REAP",
                           gain.mean, t.difference("dern", "reap", bits).mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Without training, Mixtral-8x7B keeps an average of 80.04 of 80.88 with 6 experts of 8 and 70.79 with 4, where "
      "NAEE keeps 65.69 and M-SMoE 42.49; Qwen2-57B 83.56 of 86.14 with 32 of 64 (NAEE 70.71).";
  s.setup = fmt::format(
      "{}. Two bases a seed: 8 experts of 256 that were copies of one dense model at half of the steps, as those of "
      "Mixtral and Qwen2 probably were, and 16 of 128 that grew apart. The threshold of DERN is the one of 0, 0.2, 0.4 "
      "and 0.6 with the least loss on {} bytes of other learned documents. M-SMoE merges to the same number of "
      "experts in all.",
      mixture_setup(), kTuningBytes);
  s.arms = {{"whole", "all experts"},
            {"dern", "DERN, threshold tuned"},
            {"drop", "the same experts dropped, nothing moved"},
            {"frequency", "those chosen least often dropped"},
            {"reap", "those that write least dropped: REAP"},
            {"random", "experts drawn by chance dropped"},
            {"m-smoe", "M-SMoE: merged by router logits"},
            {"dern-paper", "DERN with the paper's threshold of 0.6", false},
            {"dern-all", "DERN with a threshold of 0", false}};
  for (const auto& setting : kSettings) s.metrics.push_back({"bits_" + setting.name, setting.text + ", bits", 4});
  for (const auto& setting : kSettings) s.metrics.push_back({"choice_" + setting.name, setting.text + ", right %", 1});
  s.rule =
      "Reproduced: with 4 of 8 copied experts DERN has fewer bits a byte than dropping the same experts, frequency, "
      "REAP, random pruning and M-SMoE on every seed, each difference beyond twice its standard error. Not "
      "reproduced: "
      "there one of these is clearly better than DERN, or DERN is on no seed better than dropping. Else, and with one "
      "seed, inconclusive.";
  s.full = {.seeds = 3};
  s.brief = {.seeds = 1};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    json out = mixture_settings();
    out["thresholds"] = kThresholds;
    return out;
  };
  return s;
}

const RegisterStudy registered("dern", "DERN: neurons of dropped experts move into those left",
                               "a quarter and half of the experts dropped, with and without moving their neurons",
                               study);

}  // namespace
}  // namespace moiety
