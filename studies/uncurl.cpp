// UNCURL: is a mixture of many experts, merged for one task, better than one pruned by use, and than one that had few
// experts from the start?
#include <fmt/format.h>

#include <algorithm>

#include "moiety/compress/expert_plans.h"
#include "moiety/study/experts.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kExperts = 16;
const std::vector<int64_t> kFactors{2, 4, 8};
const std::vector<std::string> kTask{"python"};
const std::vector<std::string> kPruned{"frequency", "reap", "random"};

MixturePlan uncurl(int64_t factor, const std::string& router, bool align) {
  return [=](const ExpertLayers& layers, const Calibration& calibration) {
    UncurlConfig c;
    c.factor = static_cast<double>(factor);
    c.router = router;
    c.align = align;
    return plan_uncurl(layers, calibration, {}, c).layers;
  };
}

// The model of an arm before it learns the task.
fs::path start_of(const StudyCell& cell, int64_t factor) {
  if (cell.arm == "native") return mixture_base(cell, {.experts = kExperts / factor});
  const fs::path base = mixture_base(cell, {.experts = kExperts});
  if (cell.arm == "whole") return base;
  const Calibration calibration = mixture_calibration(base, kTask);
  MixturePlan plan;
  if (cell.arm == "uncurl") plan = uncurl(factor, "map", true);
  if (cell.arm == "uncurl-average") plan = uncurl(factor, "average", true);
  if (cell.arm == "unaligned") plan = uncurl(factor, "map", false);
  if (!plan) plan = kept_by(cell.arm, kExperts / factor, static_cast<uint64_t>(cell.seed));
  return with_plan(cell, base, calibration, plan, fmt::format("start-{}", factor));
}

json measure(const StudyCell& cell) {
  const MixtureText text = mixture_text(kTask);
  json out, one;
  for (const int64_t factor : kFactors) {
    const auto put = [&](const json& from) {
      for (const auto& [name, value] : from.items()) out[fmt::format("{}_{}", name, factor)] = value;
    };
    if (!one.is_null()) {  // all experts, whatever the factor
      put(one);
      continue;
    }
    const fs::path start = start_of(cell, factor);
    const json before = measure_mixture(start, text);
    StudyCell tuned = cell;
    tuned.seed += 1000;  // other rows than the base has seen
    const auto trainer = train_language(
        tuned, {.recipe = mixture_recipe(kTask), .checkpoint = start, .lr_scale = 0.25, .routing = mixture_routing()},
        fmt::format("tuned-{}", factor));
    const json after = measure_mixture(trainer->model(), text);
    const json values{{"before", before["bits_per_byte"]},
                      {"after", after["bits_per_byte"]},
                      {"choice", before["choice"]},
                      {"choice_after", after["choice"]}};
    put(values);
    if (cell.arm == "whole") one = values;
  }
  return out;
}

std::string named(const char* what, int64_t factor) {
  return fmt::format("{}_{}", what, factor);
}

StudyOutcome judge(const StudyTable& t) {
  const auto pruned = t.difference("uncurl", "frequency", named("before", 2)),
             native = t.difference("uncurl", "native", named("after", 2)),
             far = t.difference("uncurl", "native", named("after", 8));
  // What the many experts are worth has to shrink with the factor: a threshold beyond which few from the start are
  // better.
  bool threshold = true;
  for (size_t i = 0; i < native.percent.size(); ++i) threshold = threshold && far.percent.at(i) > native.percent[i];
  const bool enough = native.percent.size() > 1;
  StudyOutcome o;
  o.verdict = enough && pruned.lower() && !native.higher() && native.mean <= 0.0 && threshold ? StudyOutcome::reproduced
              : pruned.higher() || native.higher() ? StudyOutcome::not_reproduced
                                                   : StudyOutcome::inconclusive;
  for (const int64_t f : kFactors) {
    o.reason += fmt::format(
        "{} of {} experts: bits a byte of Python {:.4f} before fine-tuning (whole {:.4f}), against frequency {}, REAP "
        "{}, random {}; after it {:.4f}, against frequency {}, against a model that had {} experts from the start {}. ",
        kExperts / f, kExperts, t.mean("uncurl", named("before", f)), t.mean("whole", named("before", f)),
        t.difference("uncurl", "frequency", named("before", f)).text(),
        t.difference("uncurl", "reap", named("before", f)).text(),
        t.difference("uncurl", "random", named("before", f)).text(), t.mean("uncurl", named("after", f)),
        t.difference("uncurl", "frequency", named("after", f)).text(), kExperts / f,
        t.difference("uncurl", "native", named("after", f)).text());
  }
  o.reason +=
      fmt::format("Questions right with {} experts before fine-tuning: {:.1f} %, frequency {:.1f} %, whole {:.1f} %.",
                  kExperts / 2, t.mean("uncurl", named("choice", 2)), t.mean("frequency", named("choice", 2)),
                  t.mean("whole", named("choice", 2)));
  o.headline = fmt::format(
      "8 of 16 experts for Python: bits a byte {:+.2f} % against frequency; tuned {:+.2f} % against 8 from the start",
      pruned.mean, native.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Mixtures of 8 to 128 experts pruned for a SuperGLUE task to half of the experts mostly keep or improve on the "
      "accuracy of a model pretrained with that few, to a quarter sometimes, beyond that they are worse: a threshold. "
      "Naive pruning by frequency hurts.";
  s.setup = fmt::format(
      "{}. The task is Python: calibration, fine-tuning (a quarter of the rate, all parameters, other rows than the "
      "base has seen) and everything that is measured. {} experts become {}, {} and {}; the native models had that "
      "many "
      "from the start and learned for as long.",
      mixture_setup(), kExperts, kExperts / 2, kExperts / 4, kExperts / 8);
  s.arms = {{"whole", "all 16 experts"},
            {"uncurl", "UNCURL: clusters by router logits, aligned, averaged by use; the router stays"},
            {"frequency", "those chosen most often stay"},
            {"reap", "those that write most stay: REAP"},
            {"random", "experts drawn by chance stay"},
            {"native", "as few experts from the start"},
            {"uncurl-average", "UNCURL, rows of the router averaged", false},
            {"unaligned", "UNCURL without alignment", false}};
  for (const int64_t f : kFactors)
    s.metrics.push_back({named("before", f), fmt::format("{} experts", kExperts / f), 4});
  for (const int64_t f : kFactors) s.metrics.push_back({named("after", f), fmt::format("{} tuned", kExperts / f), 4});
  for (const int64_t f : kFactors)
    s.metrics.push_back({named("choice", f), fmt::format("{}, right %", kExperts / f), 1});
  s.rule =
      "Reproduced: with 8 of 16 experts UNCURL has, before fine-tuning, fewer bits a byte than frequency pruning on "
      "every seed, beyond twice the standard error; after it, no more than the native model of 8 on average; and on "
      "every seed it stands worse against the native model with 2 than with 8. Not reproduced: with 8 experts "
      "frequency pruning is clearly better before fine-tuning, or the native model after it. Else, and with one seed, "
      "inconclusive.";
  s.full = {.seeds = 3, .steps = 120};
  s.brief = {.seeds = 1, .steps = 30};
  s.measure = measure;
  s.judge = judge;
  s.settings = mixture_settings;
  return s;
}

const RegisterStudy registered("uncurl", "UNCURL: experts merged for one task",
                               "experts merged and pruned for Python, against models that had few from the start",
                               study);

}  // namespace
}  // namespace moiety
