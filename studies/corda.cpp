// CorDA: does a decomposition under the second moment of the inputs find which directions can go, which keep knowledge,
// and which a task needs?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "moiety/adapt/corda.h"
#include "moiety/base/error.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kRank = 8;
constexpr const char* kKnown = "prose";  // what is compressed on, and what is not to be forgotten
constexpr const char* kTask = "python";
// More than the paper's 10 to 40 %: matrices as small as these have more to spare.
const std::vector<double> kDrops{0.4, 0.6, 0.8, 0.9};

std::map<std::string, HeldOut> learned(const std::string& kind) {
  auto r = adapter_recipe();
  r.sources = {kind};
  return learned_text(r);  // 16384 tokens: 128 samples
}

// Second moments of every matrix's inputs on text of a kind, or mean sizes.
std::map<std::string, torch::Tensor> watched(const fs::path& base, const std::string& kind, bool sizes) {
  const auto model = open_base_model(base);
  std::map<std::string, std::shared_ptr<CordaWatch>> moments;
  for (const auto& [name, m] : matrices_of(*model)) m->attach(moments[name] = std::make_shared<CordaWatch>(name));
  measure_bits(*model, learned(kind));
  std::map<std::string, torch::Tensor> out;
  for (const auto& [name, w] : moments)
    out[name] =
        sizes ? w->covariance.mean_sizes() / static_cast<double>(w->covariance.samples()) : w->covariance.value();
  return out;
}

json compressed(const StudyCell& cell, const fs::path& base) {
  const auto text = adapter_text({kKnown}, Half::test);
  json out, curve = json::array();
  const double whole = measure_bits(*open_base_model(base), text)["bits"];
  out["whole"] = whole;
  std::map<std::string, torch::Tensor> by;
  if (cell.arm != "svd") by = watched(base, kKnown, cell.arm == "asvd");
  for (const double share : kDrops) {
    const auto model = open_base_model(base);
    for (const auto& [name, m] : matrices_of(*model)) {
      const auto w = m->dense(torch::kFloat32);
      const auto drop = std::llround(share * static_cast<double>(std::min(w.size(0), w.size(1))));
      const auto delta = corda_compress(w, cell.arm, by.empty() ? torch::Tensor() : by.at(name), drop) - w;
      m->attach(std::make_shared<Added>([delta](const torch::Tensor& x) { return torch::matmul(x, delta.t()); }));
    }
    const double bits = measure_bits(*model, text)["bits"];
    curve.push_back({{"dropped", share}, {"bits", bits}, {"rise", bits - whole}});
    out[fmt::format("rise_{:.0f}", 100.0 * share)] = bits - whole;
  }
  out["curve"] = curve;
  return out;
}

json lora_parts() {
  return json::array({{{"slug", "lora"}, {"target", "all"}, {"rank", kRank}, {"alpha", kRank}}});
}

// The base with an adapter decomposed from its matrices: the residual in their place.
fs::path decomposed(const StudyCell& cell, const std::string& arm, int64_t seed) {
  const auto base = adapter_base(cell, seed);
  if (arm == "lora") return base;
  return cell.once(fmt::format("{}-{}", arm, seed), [&](const fs::path& to) {
    std::map<std::string, torch::Tensor> by;
    if (arm != "pissa") by = watched(base, arm == "kpm" ? kKnown : kTask, false);
    const auto model = open_base_model(base);
    write_changed(*model, base, to / "model", lora_parts(), [&](std::map<std::string, torch::Tensor>& all) {
      for (const auto& [name, m] : matrices_of(*model)) {
        const std::string stored = "model." + name + ".weight";
        check(all.count(stored) == 1, "the base has no {}", stored);
        const auto w = m->dense(torch::kFloat32);
        const auto moment = by.empty() ? torch::eye(w.size(1)) : by.at(name);
        const auto parts = corda_decompose(w, moment, arm == "kpm" ? "kpm" : "ipm", kRank, kRank, name);
        all[stored] = parts.residual;
        const std::string site =
            "model." + name.substr(0, name.find('.', 7)) + ".adapters." + name.substr(name.rfind('.') + 1);
        all[site + ".lora_A"] = parts.a;
        all[site + ".lora_B"] = parts.b;
      }
    });
  }) / "model";
}

json measure(const StudyCell& cell) {
  const auto base = adapter_base(cell, cell.seed);
  if (cell.arm == "svd" || cell.arm == "asvd" || cell.arm == "corda") return compressed(cell, base);
  const auto run_of = [&](int64_t seed) {
    Adaptation run;
    run.model = decomposed(cell, cell.arm, seed);
    run.parts = lora_parts();
    run.kinds = {kTask};
    run.seed = seed;
    return run;
  };
  const json tuned = tuned_rate(cell, cell.arm, [&](const StudyCell& half, double rate) {
    auto run = run_of(0);
    run.rate = rate;
    run.seed = 1000;
    run.steps = half.budget.steps;
    return measure_bits(adapt(half, run)->model(), adapter_text({kTask}, Half::tuning))["bits"].get<double>();
  });
  const auto known = adapter_text({kKnown}, Half::test);
  const double before = measure_bits(*open_base_model(base), known)["bits"];
  auto run = run_of(cell.seed);
  run.rate = tuned.at("rate");
  json out;
  run.watch = [&](CausalModel& model, int64_t step, int64_t) {
    if (step == 0) out["changed"] = measure_bits(model, known)["bits"].get<double>() - before;
  };
  const auto trainer = adapt(cell, run);
  out["task"] = measure_bits(trainer->model(), adapter_text({kTask}, Half::test))["bits"];
  out["probe"] = measure_bits(trainer->model(), known)["bits"].get<double>() - before;
  out["trained"] = thousand_trained(trainer->model());
  out["rate"] = run.rate;
  out["tried"] = tuned.at("tried");
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  bool lower = true, higher = true, known = true;
  for (const double share : kDrops) {
    const std::string metric = fmt::format("rise_{:.0f}", 100.0 * share);
    const auto plain = t.values("svd", metric), scaled = t.values("asvd", metric), own = t.values("corda", metric);
    known = known && !own.empty();
    for (size_t i = 0; i < own.size(); ++i) {
      lower = lower && own[i] < plain.at(i) && own[i] < scaled.at(i);
      higher = higher && own[i] >= plain.at(i);
    }
  }
  const auto ipm = t.difference("ipm", "lora", "task"), kpm = t.difference("kpm", "lora", "task"),
             probe = t.difference("kpm", "lora", "probe"), pissa = t.difference("ipm", "pissa", "task");
  const bool enough = t.values("corda", "rise_40").size() >= 2;
  StudyOutcome o;
  o.verdict = !enough || !known                                         ? StudyOutcome::inconclusive
              : lower && ipm.lower() && probe.lower() && kpm.mean < 1.0 ? StudyOutcome::reproduced
              : higher || (ipm.higher() && probe.higher())              ? StudyOutcome::not_reproduced
                                                                        : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Without the smallest 40, 60, 80 and 90 % of all components bits a byte of prose rise by {:.3f}, {:.3f}, {:.3f} "
      "and "
      "{:.3f} with CorDA, {:.3f}, {:.3f}, {:.3f} and {:.3f} with ASVD, {:.3f}, {:.3f}, {:.3f} and {:.3f} with plain "
      "SVD. "
      "Adapted to Python, bits a byte against LoRA: the largest components (IPM) {}, the smallest (KPM) {}; IPM "
      "against "
      "PiSSA {}. On prose they rise by {:.3f} (LoRA), {:.3f} (KPM), {:.3f} (IPM) and {:.3f} (PiSSA).{}",
      t.mean("corda", "rise_40"), t.mean("corda", "rise_60"), t.mean("corda", "rise_80"), t.mean("corda", "rise_90"),
      t.mean("asvd", "rise_40"), t.mean("asvd", "rise_60"), t.mean("asvd", "rise_80"), t.mean("asvd", "rise_90"),
      t.mean("svd", "rise_40"), t.mean("svd", "rise_60"), t.mean("svd", "rise_80"), t.mean("svd", "rise_90"),
      ipm.text(), kpm.text(), pissa.text(), t.mean("lora", "probe"), t.mean("kpm", "probe"), t.mean("ipm", "probe"),
      t.mean("pissa", "probe"), enough ? "" : " One seed decides nothing.");
  o.headline = fmt::format(
      "80 % of components dropped: {:+.3f} bits a byte, ASVD {:+.3f}, SVD {:+.3f}; IPM {:+.2f} % against LoRA",
      t.mean("corda", "rise_80"), t.mean("asvd", "rise_80"), t.mean("svd", "rise_80"), ipm.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Dropping the smallest components of Llama-2-7B costs far less perplexity than with SVD and ASVD. At rank 128 "
      "the "
      "knowledge-preserved mode gets TriviaQA 45.23 and GSM8K 45.64 (LoRA 44.17 and 42.68), the instruction-previewed "
      "one "
      "GSM8K 54.59.";
  s.setup =
      adapter_setup() +
      ". Compression: the smallest components of all matrices of the base are dropped, its loss is measured on "
      "prose (shares go beyond the paper's 10 to 40 %: matrices this small have more to spare); second moments and "
      "mean sizes come from 128 rows of prose that it may have learned. Adaptation: rank "
      "8 beside all matrices learns Python; KPM is calibrated on prose, IPM on Python, and prose is measured again "
      "afterwards.";
  s.arms = {{"svd", "the smallest components of plain SVD go"},
            {"asvd", "those of ASVD: columns scaled by the root of mean sizes"},
            {"corda", "those of CorDA: under the second moment of the inputs"},
            {"lora", "LoRA of rank 8 on Python"},
            {"kpm", "the 8 smallest components under prose learn: knowledge-preserved"},
            {"ipm", "the 8 largest under Python learn: instruction-previewed"},
            {"pissa", "the 8 largest of plain SVD learn: PiSSA", false}};
  s.metrics = {{"rise_40", "40 % dropped, bits", 4},
               {"rise_60", "60 %", 4},
               {"rise_80", "80 %", 4},
               {"rise_90", "90 %", 4},
               {"task", "Python, bits", 4},
               {"probe", "prose, rise", 4},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: on every seed and with 40, 60, 80 and 90 % dropped CorDA's loss rises less than with ASVD and plain "
      "SVD, "
      "bits a byte on Python are clearly lower with IPM than with LoRA, and with KPM the loss on prose clearly rises "
      "less than with LoRA, for on average less than 1 % more bits on Python. Not reproduced: with none of these "
      "shares "
      "and on no seed does CorDA's loss rise less than plain SVD's, or both modes are clearly worse than LoRA. Else, "
      "and with one seed, inconclusive.";
  s.full = {.seeds = 3, .steps = 100};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("corda", "CorDA: decomposing matrices under their inputs",
                               "compression curves, and what tuning learns and forgets", study);

}  // namespace
}  // namespace moiety
