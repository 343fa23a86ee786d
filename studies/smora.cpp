// SMoRA: at equal ranks in all and equal active ranks, is it better to route every rank alone than blocks of them?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>

#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kRank = 32, kActive = 4;
constexpr double kScale = 2.0;      // alpha over the active rank
constexpr double kBiasRate = 1e-3;  // the authors' 1e-5 moves nothing in so few steps

json parts_of(const std::string& arm) {
  json part;
  if (arm == "lora-4" || arm == "lora-32") {
    const int64_t rank = arm == "lora-4" ? kActive : kRank;
    part = {{"slug", "lora"}, {"rank", rank}, {"alpha", kScale * static_cast<double>(rank)}};
  } else if (arm == "moe-lora") {
    // The likeliest of 8 experts of rank 4, times its probability: DynMoLE's rule with one expert a token.
    part = {{"slug", "dynmole"},
            {"experts", kRank / kActive},
            {"rank", kActive},
            {"keep_top_k", 1},
            {"top_p", 1e-3},
            {"entropy_threshold", 1.0},
            {"entropy_coef", 0.0},
            {"balance_coef", 0.01},
            {"alpha", kScale * static_cast<double>(kActive)},
            {"dropout", 0.0}};
  } else {
    part = {{"slug", "smora"},
            {"rank", kRank},
            {"active", kActive},
            {"alpha", kScale * static_cast<double>(kActive)},
            {"block", arm == "block-4"   ? 4
                      : arm == "block-2" ? 2
                                         : 1},
            {"bias_rate", arm == "no-bias" ? 0.0 : kBiasRate}};
  }
  part["target"] = "all";
  return json::array({part});
}

json measure(const StudyCell& cell) {
  const auto arm = adapted_arm(cell, {.parts = parts_of(cell.arm), .kinds = adapter_kinds()},
                               cell.arm == "no-bias" ? "smora" : cell.arm);
  json out = arm.values;
  const auto use = expert_use(arm.trainer->model(), arm.text);
  if (use.empty()) return out;
  // How unevenly ranks (or experts) are used: standard deviation over mean, mean over matrices.
  double sum = 0;
  std::vector<double> histogram;
  for (const auto& [site, n] : use) {
    const auto load = n.to(torch::kFloat64) / n.to(torch::kFloat64).mean();
    sum += load.std(false).item<double>();
    const auto sorted = std::get<0>(load.sort(0, true));
    histogram.resize(static_cast<size_t>(sorted.numel()));
    for (int64_t i = 0; i < sorted.numel(); ++i)
      histogram[static_cast<size_t>(i)] += sorted[i].item<double>() / static_cast<double>(use.size());
  }
  out["uneven"] = sum / static_cast<double>(use.size());
  out["loads"] = histogram;  // of the most used one first, 1 when even
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto mixture = t.difference("smora", "moe-lora", "bits"), block = t.difference("smora", "block-4", "bits"),
             dense = t.difference("smora", "lora-32", "bits"), narrow = t.difference("smora", "lora-4", "bits"),
             two = t.difference("block-2", "block-4", "bits");
  StudyOutcome o;
  o.verdict = mixture.lower() && block.lower() && dense.mean < 1.0 ? StudyOutcome::reproduced
              : mixture.higher() || block.higher()                 ? StudyOutcome::not_reproduced
                                                                   : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Bits a byte with every rank routed alone, against blocks of 4: {}; against the likeliest of 8 experts of rank "
      "4: "
      "{}; against LoRA of all 32 ranks: {}; against LoRA of the 4 active ones: {}. Blocks of 2 against blocks of 4: "
      "{}. Ranks are used unevenly by {:.2f} of the mean with the bias and by {:.2f} without it.",
      block.text(), mixture.text(), dense.text(), narrow.text(), two.text(), t.mean("smora", "uneven"),
      t.mean("no-bias", "uneven"));
  o.headline = fmt::format("bits a byte {:+.2f} % against 8 experts of rank 4, {:+.2f} % against LoRA of all ranks",
                           mixture.mean, dense.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "With 8 of 64 ranks active SMoRA beats LoRA of rank 64 and mixtures of LoRA experts of the same ranks on "
      "mixtures "
      "of many tasks (Llama-2-7B, FLAN).";
  s.setup = adapter_setup() +
            ". One adapter beside all matrices learns five kinds at once: Python, Perl's manual, and the manual in "
            "German, French and Japanese. 32 ranks in all, 4 of them active; the bias moves by 0.001 a step (the "
            "authors' 0.00001 would move nothing in so few).";
  s.arms = {{"smora", "4 of 32 ranks, each routed alone: SMoRA"},
            {"block-2", "the same, two ranks routed together", false},
            {"block-4", "the same, four ranks routed together"},
            {"moe-lora", "8 experts of rank 4, the likeliest one times its probability"},
            {"lora-4", "LoRA of rank 4: the active ranks", false},
            {"lora-32", "LoRA of rank 32: all ranks"},
            {"no-bias", "SMoRA without the balancing bias", false}};
  s.metrics = {{"bits", "bits a byte", 4},
               {"uneven", "unevenness of use", 3},
               {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: bits a byte are clearly lower than with the likeliest of 8 experts and than with blocks of four, "
      "and "
      "on average less than 1 % above LoRA of all ranks. Not reproduced: clearly higher than either. Else "
      "inconclusive.";
  s.full = {.seeds = 3, .steps = 150};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("smora", "SMoRA: every rank an expert", "how finely ranks should be routed", study);

}  // namespace
}  // namespace moiety
