// FlyLoRA: is a frozen sparse random A that routes as good as LoRA with twice the trained parameters, and do adapters
// of several kinds of text survive being averaged?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <set>

#include "moiety/adapt/flylora.h"
#include "moiety/adapt/lora.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kRank = 32, kTopK = 8, kSeedOfA = 23;
constexpr double kScale = 2.0;

std::vector<std::string> kinds() {
  return {"python", "perl", "manual-de", "manual-fr"};
}

bool is_lora(const std::string& arm) {
  return arm == "lora-8" || arm == "lora-32";
}

json parts_of(const std::string& arm, int64_t seed_of_a) {
  json part;
  if (is_lora(arm)) {
    const int64_t rank = arm == "lora-8" ? kTopK : kRank;
    part = {{"slug", "lora"}, {"rank", rank}, {"alpha", kScale * static_cast<double>(rank)}};
  } else if (arm == "split") {
    // Of 4 experts of rank 8 the likeliest one, times its probability: DynMoLE's rule with one expert a token.
    part = {{"slug", "dynmole"},
            {"experts", kRank / kTopK},
            {"rank", kTopK},
            {"keep_top_k", 1},
            {"top_p", 1e-3},
            {"entropy_threshold", 1.0},
            {"entropy_coef", 0.0},
            {"balance_coef", 0.01},
            {"alpha", kScale * static_cast<double>(kTopK)},
            {"dropout", 0.0}};
  } else {
    const int64_t rank = arm == "frozen-8" ? kTopK : kRank, k = arm == "frozen-32" ? kRank : kTopK;
    part = {{"slug", "flylora"},
            {"rank", rank},
            {"top_k", k},
            {"alpha", kScale * static_cast<double>(rank)},
            {"seed", seed_of_a}};
    if (arm == "no-bias") part["bias_rate"] = 0.0;
  }
  part["target"] = "all";
  return json::array({part});
}

using FlyAdapters = std::map<std::string, std::vector<FlyAdapter>>;  // by matrix, one of every kind

FlyAdapter fly_of(const LinearImpl& m) {
  return {adapter_tensor(m, "lora_A"), adapter_tensor(m, "lora_B"), adapter_tensor(m, "bias")};
}

// The base with something beside every matrix.
json measured(const std::filesystem::path& base, const std::map<std::string, HeldOut>& text,
              const std::function<Added::Delta(const std::string& matrix)>& delta) {
  const auto model = open_base_model(base);
  for (const auto& [name, m] : matrices_of(*model)) m->attach(std::make_shared<Added>(delta(name)));
  return measure_bits(*model, text);
}

json measure(const StudyCell& cell) {
  const auto base = adapter_base(cell, cell.seed);
  // Ablations of the bias and of a common A take the method's rate.
  const std::string rated = cell.arm == "no-bias" || cell.arm == "stack" ? "fly" : cell.arm;
  Adaptation run;
  run.model = base;
  run.parts = parts_of(rated, kSeedOfA);
  run.kinds = {"python", "manual-de"};
  const json tuned = tuned_rate(cell, rated, run);
  run.rate = tuned.at("rate");
  const auto text = adapter_text(kinds(), Half::test);
  json out{{"rate", run.rate}, {"tried", tuned.at("tried")}, {"own", json::object()}};
  FlyAdapters fly;
  std::map<std::string, std::vector<std::pair<torch::Tensor, torch::Tensor>>> lora;  // A and B by matrix
  double own = 0;
  for (size_t i = 0; i < kinds().size(); ++i) {
    const std::string kind = kinds()[i];
    run.kinds = {kind};
    run.seed = cell.seed;
    run.parts = parts_of(cell.arm, cell.arm == "stack" ? kSeedOfA + static_cast<int64_t>(i) : kSeedOfA);
    const auto trainer = adapt(cell, run, "run-" + kind);
    CausalModel& model = trainer->model();
    const double bits = measure_bits(model, {{kind, text.at(kind)}})["bits"];
    out["own"][kind] = bits;
    own += bits / static_cast<double>(kinds().size());
    out["trained"] = thousand_trained(model);
    for (const auto& [name, m] : matrices_of(model)) {
      if (is_lora(cell.arm)) lora[name].emplace_back(adapter_tensor(*m, "lora_A"), adapter_tensor(*m, "lora_B"));
      if (cell.arm == "fly" || cell.arm == "no-bias" || cell.arm == "stack") fly[name].push_back(fly_of(*m));
    }
  }
  out["bits"] = own;
  const auto drop = [&](const json& merged) {
    double sum = 0;
    for (const auto& kind : kinds())
      sum += 100.0 * (merged["by_kind"][kind].get<double>() / out["own"][kind].get<double>() - 1.0) /
             static_cast<double>(kinds().size());
    return sum;
  };
  if (!lora.empty()) {
    // The mean of what they add, and what the means of A and of B add: the better one counts.
    const json updates = measured(base, text, [&](const std::string& name) -> Added::Delta {
      return [&, name](const torch::Tensor& x) {
        torch::Tensor sum;
        for (const auto& [a, b] : lora.at(name)) {
          const auto own = torch::matmul(torch::matmul(x, a.t()), b.t());
          sum = sum.defined() ? sum + own : own;
        }
        return sum * (kScale / static_cast<double>(kinds().size()));
      };
    });
    const json tensors = measured(base, text, [&](const std::string& name) -> Added::Delta {
      torch::Tensor a, b;
      for (const auto& [own_a, own_b] : lora.at(name)) {
        a = a.defined() ? a + own_a : own_a;
        b = b.defined() ? b + own_b : own_b;
      }
      const auto n = static_cast<double>(kinds().size());
      return [a, b, n](const torch::Tensor& x) {
        return torch::matmul(torch::matmul(x, (a / n).t()), (b / n).t()) * kScale;
      };
    });
    const bool first = updates["bits"].get<double>() < tensors["bits"].get<double>();
    out["merged_updates"] = updates["bits"];
    out["merged_tensors"] = tensors["bits"];
    out["merged"] = (first ? updates : tensors)["bits"];
    out["drop"] = drop(first ? updates : tensors);
  } else if (!fly.empty()) {
    const json merged = measured(base, text, [&](const std::string& name) -> Added::Delta {
      if (cell.arm == "stack")
        return [&, name](const torch::Tensor& x) { return fly_stack(x, fly.at(name), kTopK, kScale, "signed"); };
      const FlyAdapter one = fly_average(fly.at(name));
      return [one](const torch::Tensor& x) { return fly_delta(x, one, kTopK, kScale, "signed"); };
    });
    out["merged"] = merged["bits"];
    out["drop"] = drop(merged);
  }
  out["base"] = measure_bits(*open_base_model(base), text)["bits"];
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto wide = t.difference("fly", "lora-32", "bits"), narrow = t.difference("fly", "lora-8", "bits"),
             frozen = t.difference("fly", "frozen-8", "bits");
  const auto fly = t.values("fly", "drop"), lora = t.values("lora-32", "drop"), small = t.values("lora-8", "drop");
  bool near = !fly.empty(), far = !fly.empty(), less = !fly.empty(), more = !fly.empty();
  for (size_t i = 0; i < fly.size(); ++i) {
    near = near && wide.percent.at(i) < 2.0;
    far = far && wide.percent.at(i) >= 2.0;
    const double other = std::min(lora.at(i), small.at(i));
    less = less && fly[i] <= 0.5 * other;
    more = more && fly[i] >= other;
  }
  StudyOutcome o;
  o.verdict = fly.size() < 2                   ? StudyOutcome::inconclusive
              : near && less && frozen.lower() ? StudyOutcome::reproduced
              : far || more || frozen.higher() ? StudyOutcome::not_reproduced
                                               : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Bits a byte of FlyLoRA against LoRA of rank 32, with {:.0f} instead of {:.0f} thousand trained parameters: {}; "
      "against LoRA of rank 8: {}; against rank 8 with a frozen A: {}. Averaged over four kinds of text, its adapters "
      "lose {:.1f} % against each on its own kind, those of LoRA {:.1f} % (rank 32) and {:.1f} % (rank 8); the "
      "averages "
      "reach {:.3f}, {:.3f} and {:.3f} bits, the base {:.3f}.{}",
      t.mean("fly", "trained"), t.mean("lora-32", "trained"), wide.text(), narrow.text(), frozen.text(),
      t.mean("fly", "drop"), t.mean("lora-32", "drop"), t.mean("lora-8", "drop"), t.mean("fly", "merged"),
      t.mean("lora-32", "merged"), t.mean("lora-8", "merged"), t.mean("fly", "base"),
      fly.size() < 2 ? " One seed decides nothing." : "");
  o.headline =
      fmt::format("bits a byte {:+.2f} % against LoRA of rank 32; averaged adapters lose {:.1f} %, LoRA's {:.1f} %",
                  wide.mean, t.mean("fly", "drop"), std::min(t.mean("lora-32", "drop"), t.mean("lora-8", "drop")));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "FlyLoRA (8 of 32 ranks) is above LoRA of ranks 8 and 32 and above split LoRA on four benchmarks with half of "
      "the "
      "trained parameters, and keeps most of it when adapters of several tasks are merged.";
  s.setup = adapter_setup() +
            ". One adapter is trained for each of four kinds of text (Python, Perl's manual, the manual in German and "
            "French) beside all matrices, then the four are merged: FlyLoRA's by the mean of B, LoRA's by the mean of "
            "what they add or by the means of A and B, whichever is better.";
  s.arms = {{"fly", "FlyLoRA: 8 of 32 ranks, one frozen sparse A for all kinds"},
            {"lora-8", "LoRA of rank 8: the active rank"},
            {"lora-32", "LoRA of rank 32: all ranks, twice the trained parameters"},
            {"frozen-8", "LoRA of rank 8 with a frozen dense random A"},
            {"split", "4 experts of rank 8, a token takes one by a learned router, times its probability", false},
            {"frozen-32", "FlyLoRA without the choice: 32 ranks, dense frozen A", false},
            {"no-bias", "FlyLoRA without the balancing bias", false},
            {"stack", "FlyLoRA with another A for every kind, outputs averaged", false}};
  s.metrics = {{"bits", "bits a byte", 4},
               {"merged", "merged, bits", 4},
               {"drop", "loss by merging, %", 2},
               {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: on every seed bits a byte are less than 2 % above LoRA of rank 32 and the loss by merging is at "
      "most "
      "half of LoRA's (rank 8 or 32, the smaller one), and bits a byte are clearly below those of rank 8 with a frozen "
      "A. Not reproduced: 2 % or more above on every seed, a loss by merging that is not smaller on any, or clearly "
      "above the frozen A. Else, and with one seed, inconclusive.";
  s.full = {.seeds = 3, .steps = 60};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("flylora", "FlyLoRA: a frozen sparse projection that routes, and merging",
                               "half of LoRA's trained parameters, and adapters that can be averaged", study);

}  // namespace
}  // namespace moiety
