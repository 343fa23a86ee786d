// MoLA: do higher layers need more LoRA experts?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>

#include "moiety/adapt/routed_lora.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kRank = 4;
constexpr double kScale = 2.0;
// Of LoRA with at least the trained parameters of 20 experts of rank 4 over four layers and their routers.
constexpr int64_t kLoraRank = 23;

json parts_of(const std::string& arm) {
  json part;
  if (arm == "lora") {
    part = {{"slug", "lora"}, {"rank", kLoraRank}, {"alpha", kScale * static_cast<double>(kLoraRank)}};
  } else {
    std::vector<int64_t> pattern;
    for (const char c : arm.substr(1)) pattern.push_back(c - '0');
    part = {{"slug", "mola"},
            {"pattern", pattern},
            {"rank", kRank},
            {"alpha", kScale * static_cast<double>(kRank)},
            {"coef", 0.001}};
  }
  part["target"] = "all";
  part["dropout"] = 0.05;
  return json::array({part});
}

json measure(const StudyCell& cell) {
  const auto arm = adapted_arm(cell, {.parts = parts_of(cell.arm), .kinds = adapter_kinds()});
  json out = arm.values;
  if (cell.arm == "lora") return out;
  // How unlike the experts of a layer are, against how much they add.
  const int64_t layers = adapter_recipe().layers;
  std::vector<double> distance(static_cast<size_t>(layers)), matrices(static_cast<size_t>(layers));
  for (const auto& [name, m] : matrices_of(arm.trainer->model())) {
    const auto layer = static_cast<size_t>(std::stoll(name.substr(7)));
    distance[layer] += expert_distance(adapter_tensor(*m, "lora_A"), adapter_tensor(*m, "lora_B")).relative;
    matrices[layer] += 1.0;
  }
  for (size_t i = 0; i < distance.size(); ++i) distance[i] /= matrices[i];
  out["distances"] = distance;
  out["lowest"] = distance.front();
  out["highest"] = distance.back();
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto even = t.difference("n2468", "n5555", "bits"), inverted = t.difference("n2468", "n8642", "bits"),
             ends = t.difference("n2468", "n8228", "bits"), full = t.difference("n2468", "n8888", "bits"),
             lora = t.difference("n2468", "lora", "bits");
  StudyOutcome o;
  o.verdict = even.lower() && inverted.lower()     ? StudyOutcome::reproduced
              : even.higher() || inverted.higher() ? StudyOutcome::not_reproduced
                                                   : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Bits a byte with 2, 4, 6 and 8 experts from below, against 5 in every layer: {}; against 8, 6, 4, 2: {}; "
      "against "
      "8, 2, 2, 8: {}; against 8 everywhere: {}; against LoRA of equal trained parameters: {}. With 5 in every layer "
      "two "
      "experts differ by {:.2f} of what one adds in the lowest layer and by {:.2f} in the highest.",
      even.text(), inverted.text(), ends.text(), full.text(), lora.text(), t.mean("n5555", "lowest"),
      t.mean("n5555", "highest"));
  o.headline =
      fmt::format("2-4-6-8 against 5-5-5-5 {:+.2f} %, against 8-6-4-2 {:+.2f} % bits a byte", even.mean, inverted.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "On six benchmarks with Llama-2-7B 2-4-6-8 experts beat 5-5-5-5 of the same total, and 8-8-8-8 with about 40 % "
      "fewer experts; experts of lower layers are more alike.";
  s.setup =
      adapter_setup() +
      ". Experts of rank 4 beside all matrices, two a token, learn five kinds at once: Python, Perl's manual, and "
      "the manual in German, French and Japanese. Each of the four layers is a group of its own; balance loss "
      "0.001, dropout 0.05 in all arms.";
  s.arms = {{"n2468", "2, 4, 6, 8 experts from below: MoLA"},
            {"n5555", "5 in every layer"},
            {"n8642", "8, 6, 4, 2"},
            {"n8228", "8, 2, 2, 8", false},
            {"n8888", "8 in every layer: more parameters", false},
            {"lora", "LoRA of rank 23: the trained parameters of 20 experts and their routers"}};
  s.metrics = {{"bits", "bits a byte", 4},
               {"lowest", "distance, lowest layer", 3},
               {"highest", "distance, highest", 3},
               {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: bits a byte with 2-4-6-8 are clearly lower than with 5-5-5-5 and with 8-6-4-2. Not reproduced: "
      "clearly "
      "higher than either. Else inconclusive. The expected difference is half a percent to two.";
  s.full = {.seeds = 3, .steps = 150};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("mola", "MoLA: more LoRA experts in higher layers",
                               "how experts should be spread over layers", study);

}  // namespace
}  // namespace moiety
