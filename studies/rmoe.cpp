// RMoE: do routers that pass a recurrent state from layer to layer choose better experts than routers on their own, and
// does it need the gradient through the recurrence?
#include <fmt/format.h>
#include <torch/torch.h>

#include "moiety/analyze/routing.h"
#include "moiety/study/language.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kExperts = 8, kWidth = 64;
constexpr double kBalance = 0.01;

LanguageRecipe recipe() {
  LanguageRecipe r;
  r.layers = 6;
  r.width = 2 * kWidth;
  return r;
}

json parts_of(const std::string& arm) {
  if (arm == "linear-by-layer") return json::array({plain_mixture(kExperts, 2, kWidth, true, kBalance)});
  if (arm.rfind("linear", 0) == 0)
    return json::array({plain_mixture(kExperts, 2, kWidth, arm == "linear-normalized", /*balance=*/0.0)});
  return json::array({{{"slug", "rmoe"},
                       {"experts", kExperts},
                       {"expert_width", kWidth},
                       {"top_k", 2},
                       {"width", 16},
                       {"aux_coef", kBalance},
                       {"shared_cell", arm != "own-cells"},
                       {"carry", arm != "zero-state"},
                       {"detach", arm == "detached"}}});
}

json measure(const StudyCell& cell) {
  const LanguageRecipe r = recipe();
  LanguageRun run{.recipe = r, .parts = parts_of(cell.arm)};
  // The balance loss of the recurrent routers for linear ones: arms differ by the router alone.
  if (cell.arm == "linear" || cell.arm == "linear-normalized") {
    run.routing.balance = "pooled";
    run.routing.coef = kBalance;
  }
  const auto trainer = train_language(cell, run);
  CausalModel& model = trainer->model();
  const auto text = held_out_text(r);
  json out = measure_language(model, text);
  out["parameters"] = static_cast<double>(parameter_count(model)) / 1e6;
  ChoiceInformation information;
  std::map<Site, RoutingCounts> load;
  trace_language(model, text, [&](const std::string&, const Trace::Record& record) {
    information.add(record);
    load[record.site].add(record, record.real);
  });
  out["information"] = information.mean();
  json by_layer = json::array();
  for (const auto& [site, nats] : information.nats()) by_layer.push_back(nats);
  out["information_by_layer"] = by_layer;
  double entropy = 0;
  for (const auto& [site, counts] : load) entropy += counts.load_entropy() / static_cast<double>(load.size());
  out["usage_entropy"] = entropy;
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto bits = [&](const std::string& base) { return t.difference("rmoe", base, "bits_per_byte"); };
  const auto normal = bits("linear-normalized"), raw = bits("linear"), zero = bits("zero-state"),
             by_layer = bits("linear-by-layer");
  const auto shared = t.difference("rmoe", "zero-state", "information");
  StudyOutcome o;
  const bool better = normal.lower() && zero.lower() && (raw.percent.empty() || raw.lower()) &&
                      (by_layer.percent.empty() || by_layer.lower());
  o.verdict = better && shared.higher()                                               ? StudyOutcome::reproduced
              : normal.higher() || raw.higher() || by_layer.higher() || zero.higher() ? StudyOutcome::not_reproduced
                                                                                      : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Bits a byte of RMoE against a linear router with gates over their sum: {}; with raw gates: {}; balanced by "
      "layer: {}; against the same router without recurrence: {}; against one without gradient through it: {}; against "
      "a cell of its own in every layer: {}. First "
      "choices of neighbouring layers share {:.3f} nats with the recurrence, {:.3f} without it, {:.3f} behind the "
      "linear router; the entropy of usage is {:.3f}, {:.3f} and {:.3f} of {:.3f} nats.",
      normal.text(), raw.text(), by_layer.text(), zero.text(), bits("detached").text(), bits("own-cells").text(),
      t.mean("rmoe", "information"), t.mean("zero-state", "information"), t.mean("linear-normalized", "information"),
      t.mean("rmoe", "usage_entropy"), t.mean("zero-state", "usage_entropy"),
      t.mean("linear-normalized", "usage_entropy"), std::log(static_cast<double>(kExperts)));
  o.headline = fmt::format("bits a byte {:+.2f} % against a linear router, {:+.2f} % against no recurrence",
                           normal.mean, zero.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Better than linear, hash, random, cosine and other routers on enwik8 and WikiText-103: 1.141 bits a character "
      "on "
      "enwik8 against 1.150 for the same cell without passing the state and 1.159 with the state detached; choices of "
      "neighbouring layers share more information.";
  s.setup = recipe().text() +
            "; every block takes 2 of 8 experts of 64 hidden units, the recurrent state has 16 numbers. One balance "
            "loss for all arms, as the method has it: over the tokens of all layers together, weight 0.01; one linear "
            "arm has the more usual one, layer by layer.";
  s.arms = {{"linear", "linear router, raw gates", false},
            {"linear-normalized", "linear router, gates over their sum"},
            {"linear-by-layer", "the same, balanced in every layer by itself", false},
            {"rmoe", "one GRU cell over depth: RMoE"},
            {"zero-state", "the same cell, its state zero in every layer"},
            {"detached", "RMoE, no gradient through the state", false},
            {"own-cells", "a GRU cell of its own in every layer, the state passed on", false}};
  s.metrics = {{"bits_per_byte", "bits a byte", 4},
               {"information", "shared by neighbours, nats", 3},
               {"usage_entropy", "entropy of usage, nats", 3},
               {"parameters", "million parameters", 3}};
  s.rule =
      "Reproduced: bits a byte lower than with every linear router and than without recurrence, on every seed and by "
      "more than two standard errors, and neighbouring layers share clearly more information than without recurrence. "
      "Not reproduced: bits a byte clearly higher than one of these. Else inconclusive.";
  s.full = {.seeds = 3, .steps = 400};
  s.brief = {.seeds = 1, .steps = 100};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] { return recipe().settings(); };
  return s;
}

const RegisterStudy registered(
    "rmoe", "RMoE: routers that see the layers before",
    "routers with a state over depth against linear ones and against the same without recurrence", study);

}  // namespace
}  // namespace moiety
