// LoRA-Mixer: do LoRAs of single kinds of text, trained apart, mix by a router that learns from little data?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "moiety/base/error.h"
#include "moiety/io/checkpoint.h"
#include "moiety/io/peft.h"
#include "moiety/models/model.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kRank = 8, kTopK = 3;
constexpr double kScale = 2.0;
constexpr int64_t kFewSteps = 12, kSteps = 50, kManySteps = 200;  // of the router: 96, 400 and 1600 windows
constexpr int64_t kShortSteps = 16;

std::vector<std::string> kinds() {
  return {"python", "perl", "manual-de", "manual-ja"};
}

int64_t experts() {
  return static_cast<int64_t>(kinds().size());
}

// What an arm is about: its name without the front that says that its base has state-space layers.
struct Arm {
  explicit Arm(const std::string& name) : ssm(name.rfind("ssm-", 0) == 0), what(ssm ? name.substr(4) : name) {}
  bool ssm;
  std::string what;

  json targets() const {
    return ssm ? json{"in_proj", "x_proj", "dt_proj", "out_proj"} : json{"q_proj", "k_proj", "v_proj", "o_proj"};
  }
  std::string front() const { return ssm ? "ssm-" : ""; }
  fs::path base(const StudyCell& cell, int64_t seed) const {
    json parts;
    if (ssm) parts = json::array({{{"slug", "mamba"}}});
    return adapter_base(cell, seed, parts);
  }
  json mixer(const json& settings) const {
    json part = {{"slug", "lora-mixer"}, {"target", targets()}, {"experts", experts()},
                 {"rank", kRank},        {"top_k", kTopK},      {"alpha", kScale * static_cast<double>(kRank)}};
    part.update(settings);
    return json::array({part});
  }
  json soft() const {
    return mixer({{"stage", "soft"},
                  {"freeze_experts", true},
                  {"sbl_lambda", what == "balance" ? 0.0 : 0.1},
                  {"entropy_sign", what == "specialize" ? "specialize" : "published"}});
  }
};

// One expert for every row, or all alike.
class Fixed : public Edit {
 public:
  explicit Fixed(int64_t expert) : expert_(expert) {}
  void logits(const Site&, const Pass&, torch::Tensor& logits) override {
    logits = torch::zeros_like(logits);
    if (expert_ >= 0) logits.select(1, expert_).fill_(1e4);
  }

 private:
  int64_t expert_;
};

std::map<std::string, HeldOut> labelled(Half half) {
  auto text = adapter_text(kinds(), half);
  for (size_t i = 0; i < kinds().size(); ++i)
    for (auto& b : text.at(kinds()[i]).batches)
      b.labels = torch::full({b.ids.size(0)}, static_cast<int64_t>(i), torch::kInt64);
  return text;
}

Adaptation hard(const StudyCell& cell, int64_t base) {
  const Arm arm(cell.arm);
  Adaptation run;
  run.model = arm.base(cell, base);
  run.parts = arm.mixer({{"stage", "hard"}});
  run.kinds = kinds();
  for (int64_t i = 0; i < experts(); ++i) run.labels.push_back(i);
  return run;
}

// One LoRA a kind: the first stage, each row trains the expert of its kind.
fs::path apart(const StudyCell& cell, int64_t seed) {
  const std::string front = Arm(cell.arm).front();
  const json tuned = tuned_rate(cell, front + "experts", [&](const StudyCell& half, double rate) {
    auto run = hard(cell, 0);
    run.rate = rate;
    run.steps = half.budget.steps;
    run.seed = 1000;
    return measure_bits(adapt(half, run)->model(), labelled(Half::tuning))["bits"].get<double>();
  });
  const auto folder = cell.once(fmt::format("{}experts-{}", front, seed), [&](const fs::path& to) {
    StudyCell own = cell;
    own.folder = to;
    auto run = hard(cell, seed);
    run.rate = tuned.at("rate");
    run.seed = seed;
    adapt(own, run);
  });
  return folder / "run" / "last";
}

std::shared_ptr<CausalModel> opened(const fs::path& model, const json& parts) {
  const auto checkpoint = Checkpoint::open(model.string());
  json config = checkpoint->config();
  config["moiety"]["parts"] = parts_beside(config, parts);
  auto out = load_causal(*checkpoint, config, {});
  out->eval();
  return out;
}

// The gate of the kind's own expert and the entropy of the distribution, means over matrices.
void describe_routing(CausalModel& model, const std::map<std::string, HeldOut>& text, json& out) {
  double own = 0, entropy = 0, rows = 0;
  trace_language(model, text, [&](const std::string& source, const Trace::Record& r) {
    int64_t expert = 0;
    for (size_t i = 0; i < kinds().size(); ++i)
      if (kinds()[i] == source) expert = static_cast<int64_t>(i);
    own += (r.routing.gates * (r.routing.experts == expert)).sum().item<double>();
    entropy -= torch::xlogy(r.routing.scores, r.routing.scores).sum().item<double>();
    rows += static_cast<double>(r.routing.scores.size(0));
  });
  out["own"] = own / rows;
  out["entropy"] = entropy / rows;
}

json measure(const StudyCell& cell) {
  const auto text = labelled(Half::test);
  const Arm arm(cell.arm);
  if (arm.what == "base") return measure_bits(*open_base_model(arm.base(cell, cell.seed)), text);
  if (arm.what == "lora") {
    Adaptation run;
    const int64_t rank = experts() * kRank;
    run.parts = json::array(
        {{{"slug", "lora"}, {"target", arm.targets()}, {"rank", rank}, {"alpha", kScale * static_cast<double>(rank)}}});
    run.kinds = kinds();
    return adapted_arm(cell, run).values;
  }
  const auto folder = apart(cell, cell.seed);
  if (arm.what == "oracle") return measure_bits(*opened(folder, arm.mixer({{"stage", "hard"}})), text);
  if (arm.what == "uniform")
    return measure_bits(*opened(folder, arm.mixer({{"top_k", experts()}})), text, {std::make_shared<Fixed>(-1)});
  if (arm.what == "single") {
    const auto model = opened(folder, arm.mixer(json::object()));
    json best, all = json::array();
    for (int64_t e = 0; e < experts(); ++e) {
      const json now = measure_bits(*model, text, {std::make_shared<Fixed>(e)});
      all.push_back(now["bits"]);
      if (best.is_null() || now["bits"].get<double>() < best["bits"].get<double>()) best = now;
    }
    best["each"] = all;
    return best;
  }
  if (arm.what == "merged") {
    const auto from = opened(folder, arm.mixer(json::object()));
    const auto model = open_base_model(arm.base(cell, cell.seed));
    const auto into = matrices_of(*model);
    for (const auto& [name, m] : matrices_of(*from)) {
      if (m->attached().empty()) continue;
      const auto& at = m->attached()[0];
      const std::string last = at.beside->matrices == 1 ? "" : std::to_string(at.place);
      const auto a = adapter_tensor(*m, "lora_A" + last).mean(0), b = adapter_tensor(*m, "lora_B" + last).mean(0);
      into.at(name)->attach(std::make_shared<Added>(
          [a, b](const torch::Tensor& x) { return torch::matmul(torch::matmul(x, a.t()), b.t()) * kScale; }));
    }
    return measure_bits(*model, text);
  }
  const json tuned = tuned_rate(cell, cell.arm, [&](const StudyCell& half, double rate) {
    Adaptation run;
    run.model = apart(cell, 0);
    run.parts = arm.soft();
    run.kinds = kinds();
    run.rate = rate;
    run.steps = (cell.budget.full() ? kSteps : kShortSteps) / 2;
    run.seed = 1000;
    return measure_bits(adapt(half, run)->model(), labelled(Half::tuning))["bits"].get<double>();
  });
  json out, curve = json::array();
  const auto sizes =
      cell.budget.full() ? std::vector<int64_t>{kFewSteps, kManySteps, kSteps} : std::vector<int64_t>{kShortSteps};
  for (const int64_t steps : sizes) {
    Adaptation run;
    run.model = folder;
    run.parts = arm.soft();
    run.kinds = kinds();
    run.rate = tuned.at("rate");
    run.steps = steps;
    run.seed = cell.seed;
    const auto trainer = adapt(cell, run, fmt::format("run-{}", steps));
    out = measure_bits(trainer->model(), text);
    describe_routing(trainer->model(), text, out);
    out["trained"] = thousand_trained(trainer->model());
    curve.push_back({{"windows", 8 * steps}, {"bits", out["bits"]}, {"own", out["own"]}, {"entropy", out["entropy"]}});
  }
  if (cell.budget.full()) {
    out["few"] = curve[0]["bits"];
    out["many"] = curve[1]["bits"];
  }
  out["curve"] = curve;
  out["rate"] = tuned.at("rate");
  out["tried"] = tuned.at("tried");
  return out;
}

// Of what experts chosen by the true kind gain over the base, percent, seed by seed.
std::vector<double> recovered_by(const StudyTable& t, const std::string& front) {
  const auto base = t.values(front + "base", "bits"), oracle = t.values(front + "oracle", "bits");
  auto out = t.values(front + "published", "bits");
  for (size_t i = 0; i < out.size(); ++i) out[i] = 100.0 * (base.at(i) - out[i]) / (base.at(i) - oracle.at(i));
  return out;
}

// Reported, and no part of the verdict.
std::string ssm_clause(const StudyTable& t) {
  if (!t.has("ssm-published") || !t.has("ssm-oracle") || !t.has("ssm-base")) return "";
  const auto shares = recovered_by(t, "ssm-");
  if (shares.empty()) return "";
  const auto [least, most] = std::minmax_element(shares.begin(), shares.end());
  std::string text = fmt::format(
      " On a base of state-space layers, beside in_proj, x_proj, dt_proj and out_proj, it recovers {}{:.0f} % "
      "({:.3f} to {:.3f} bits a byte), {}",
      shares.size() > 1 ? fmt::format("{:.0f} to ", *least) : "", *most, t.mean("ssm-base", "bits"),
      t.mean("ssm-oracle", "bits"),
      *least >= 70.0  ? "70 % or more there, too"
      : *most >= 70.0 ? "70 % or more on some seeds only"
                      : "less than 70 % there");
  if (t.has("ssm-uniform"))
    text += fmt::format("; against all experts alike: {}", t.difference("ssm-published", "ssm-uniform", "bits").text());
  return text + ".";
}

StudyOutcome judge(const StudyTable& t) {
  const auto mixed = recovered_by(t, "");
  const auto merged = t.difference("published", "merged", "bits"),
             uniform = t.difference("published", "uniform", "bits"),
             balance = t.difference("published", "balance", "bits"), few = t.difference("published", "balance", "few"),
             sharp = t.difference("specialize", "balance", "bits"), lora = t.difference("published", "lora", "bits");
  bool most = !mixed.empty(), least = !mixed.empty();
  double recovered = 0;
  for (const double own : mixed) {
    recovered += own / static_cast<double>(mixed.size());
    most = most && own >= 70.0;
    least = least && own < 70.0;
  }
  StudyOutcome o;
  o.verdict = mixed.size() < 2                               ? StudyOutcome::inconclusive
              : most && merged.lower() && uniform.lower()    ? StudyOutcome::reproduced
              : least || merged.higher() || uniform.higher() ? StudyOutcome::not_reproduced
                                                             : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "The mixture recovers {:.0f} % of what experts chosen by the true kind gain over the base ({:.3f} to {:.3f} bits "
      "a "
      "byte). Against means of A and B: {}; against all experts alike: {}; against one LoRA of all ranks trained on "
      "the "
      "mixture: {}. The entropy term as published against the balance loss alone: {} ({} with 96 windows); with its "
      "sign "
      "turned: {}. The gate of the kind's own expert is {:.2f} as published, {:.2f} with the sign turned.{}{}",
      recovered, t.mean("base", "bits"), t.mean("oracle", "bits"), merged.text(), uniform.text(), lora.text(),
      balance.text(), few.text(), sharp.text(), t.mean("published", "own"), t.mean("specialize", "own"), ssm_clause(t),
      mixed.size() < 2 ? " One seed decides nothing." : "");
  o.headline =
      fmt::format("{:.0f} % of the gain of the right experts with 400 windows; {:+.2f} % bits a byte against merging",
                  recovered, merged.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "LLaMA-3-8B with LoRAs of several tasks and a router trained on 2000 samples: GSM8K 57.92 to 65.53, HumanEval "
      "52.44 "
      "to 57.32, ARC-C 78.65 to 83.24, with 48 % of the parameters of other mixtures of LoRAs.";
  s.setup =
      adapter_setup() +
      ". Beside the matrices of attention one LoRA of rank 8 each learns Python, Perl's manual, the German and the "
      "Japanese manual (every row trains the expert of its kind); then the experts are frozen and routers learn "
      "from 400 windows of 128 bytes, without kinds (96 and 1600 besides). Three experts a token when measured. The "
      "same on a base that "
      "learned the same with Mamba's layers in place of attention: there the LoRAs stand beside in_proj, x_proj, "
      "dt_proj "
      "and out_proj.";
  s.arms = {{"base", "the base alone"},
            {"oracle", "the expert of the true kind"},
            {"single", "the best one expert for everything", false},
            {"merged", "one LoRA from the means of A and of B"},
            {"uniform", "all experts alike: the mean of what they add"},
            {"lora", "one LoRA of rank 32, trained on the mixture as long as the experts together"},
            {"balance", "a router with the balance loss alone"},
            {"published", "LoRA-Mixer: balance 1.0, entropy 0.1 with the published sign"},
            {"specialize", "the same with the sign that makes routers decisive", false},
            {"ssm-base", "the base of state-space layers alone"},
            {"ssm-oracle", "beside state-space layers: the expert of the true kind"},
            {"ssm-uniform", "beside state-space layers: all experts alike"},
            {"ssm-published", "beside state-space layers: LoRA-Mixer as published"}};
  s.metrics = {{"bits", "bits a byte", 4},      {"few", "96 windows", 4},        {"many", "1600 windows", 4},
               {"own", "own expert's gate", 3}, {"entropy", "entropy, nats", 3}, {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: on every seed the mixture as published recovers 70 % or more of what experts chosen by the true "
      "kind "
      "gain over the base, and its bits a byte are clearly below those of merged and of uniform experts. Not "
      "reproduced: "
      "less than 70 % on every seed, or clearly above either. Else, and with one seed, inconclusive. The gain of the "
      "entropy term over the balance loss alone is reported; at most 1 % is expected. What "
      "the mixture recovers beside state-space layers is reported against the same 70 %.";
  s.full = {.seeds = 3, .steps = 200};
  s.brief = {.seeds = 1, .steps = 32};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("lora-mixer", "LoRA-Mixer: LoRAs trained apart, mixed by a router",
                               "how much of the right experts' gain a router finds from little data", study);

}  // namespace
}  // namespace moiety
