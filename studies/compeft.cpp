// ComPEFT: how much of an expert is in the signs of its largest differences and one number?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "moiety/base/config.h"
#include "moiety/base/files.h"
#include "moiety/compress/compeft_model.h"
#include "moiety/io/peft.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

const std::vector<std::string> kKinds{"python", "manual-de", "manual-fr"};
const std::vector<double> kDensities{0.05, 0.1, 0.2, 0.3, 0.5};
const std::vector<double> kAlphas{0.5, 1, 2, 3, 4, 5, 6, 8, 10};
const std::vector<double> kLambdas{0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0};
constexpr double kHeld = 0.05;  // of what the expert gained that may be lost

using DeltaPtr = std::shared_ptr<const ExpertDelta>;

// Experts of one form on the base of a seed, and what becomes of their files.
class Experts {
 public:
  Experts(const StudyCell& cell, bool lora) : cell_(cell), lora_(lora), base_(adapter_base(cell, cell.seed)) {}

  fs::path original(const std::string& kind) const { return adapter_expert(cell_, kind, lora_); }
  // A file of the expert; its bytes, and entries of the vector.
  CompeftReport compress(const std::string& kind, const CompeftConfig& config, const fs::path& to) const {
    CompeftOptions options;
    options.config = config;
    fs::remove(to);
    return lora_ ? compress_adapter(original(kind), options, to)
                 : compress_expert(*Checkpoint::open(original(kind).string()), *base(), base_.string(), options, to);
  }
  std::shared_ptr<const Checkpoint> base() const { return Checkpoint::open(base_.string()); }
  std::shared_ptr<const Checkpoint> whole(const std::string& kind) const {
    return lora_ ? with_adapters(base(), {{original(kind).string(), 1.0}}) : Checkpoint::open(original(kind).string());
  }
  std::shared_ptr<const Checkpoint> restored(const fs::path& file) const {
    const auto vector = TaskVectorFile::open(file);
    if (!lora_) return merged_experts(base(), {compressed_delta(vector, *base())}, {}, 1.0);
    const fs::path folder = cell_.folder / "restored";
    fs::remove_all(folder);
    merge_adapters({vector}, {}, 1.0, base_.string(), folder);
    return with_adapters(base(), {{folder.string(), 1.0}});
  }

 private:
  const StudyCell& cell_;
  bool lora_;
  fs::path base_;
};

using Text = std::map<std::string, HeldOut>;
double bits(const Checkpoint& checkpoint, const Text& text) {
  const auto model = load_causal(checkpoint);
  model->eval();
  return measure_bits(*model, text)["bits"];
}

// The pair of density and scale with the least loss on documents that nothing else is measured on; ties go to the
// smaller file.
CompeftConfig tuned(const StudyCell& cell, const Experts& experts, const std::string& kind,
                    const std::string& quantizer, json& tried) {
  CompeftConfig best;
  double least = std::numeric_limits<double>::infinity();
  const std::vector<double> one{1.0};
  const Text text = adapter_text({kind}, Half::tuning);
  for (const double density : kDensities)
    for (const double alpha : quantizer == "sign" ? kAlphas : one) {
      CompeftConfig c;
      c.density = density;
      c.alpha = alpha;
      c.quantizer = quantizer;
      const auto file = cell.folder / "tried.tv";
      experts.compress(kind, c, file);
      const double got = bits(*experts.restored(file), text);
      tried.push_back({density, alpha, got});
      if (got < least) least = got, best = c;
    }
  return best;
}

json cell_tuned(const StudyCell& cell, bool lora, const std::string& kind, const std::string& quantizer) {
  const auto folder = cell.once(
      fmt::format("tuned-{}-{}-{}-{}", quantizer, lora ? "lora" : "whole", kind, cell.seed), [&](const fs::path& to) {
        json tried = json::array();
        const auto c = tuned(cell, Experts(cell, lora), kind, quantizer, tried);
        write_file(to / "tuned.json",
                   json{{"density", c.density}, {"alpha", c.alpha}, {"tried", tried}}.dump(1) + "\n");
      });
  return parse_json(read_text(folder / "tuned.json"), "tuned.json");
}

CompeftConfig config_of(const StudyCell& cell, bool lora, const std::string& kind, const std::string& quantizer) {
  const json t = cell_tuned(cell, lora, kind, quantizer);
  CompeftConfig c;
  c.density = t["density"];
  c.alpha = t["alpha"];
  c.quantizer = quantizer;
  return c;
}

// The densest pruned vector that takes no more bytes than the signs do.
CompeftConfig pruned_to(const StudyCell& cell, const Experts& experts, const std::string& kind, int64_t bytes) {
  CompeftConfig c;
  c.quantizer = "prune";
  double low = 1e-4, high = 0.5;
  for (int64_t i = 0; i < 14; ++i) {
    c.density = std::round(1e6 * std::sqrt(low * high)) / 1e6;
    (experts.compress(kind, c, cell.folder / "pruned.tv").bytes <= bytes ? low : high) = c.density;
  }
  c.density = low;
  return c;
}

json measure_one(const StudyCell& cell, bool lora, const std::string& kind) {
  const Experts experts(cell, lora);
  const auto file = cell.folder / "expert.tv";
  CompeftConfig c;
  if (cell.arm == "compeft") c = config_of(cell, lora, kind, "sign");
  if (cell.arm == "stc") c = config_of(cell, lora, kind, "stc");
  if (cell.arm == "prune")
    c = pruned_to(cell, experts, kind, experts.compress(kind, config_of(cell, lora, kind, "sign"), file).bytes);
  if (cell.arm == "signs-20") c.density = 0.2, c.alpha = 1.0;
  if (cell.arm == "prune-same") c.density = config_of(cell, lora, kind, "sign").density, c.quantizer = "prune";
  const auto r = experts.compress(kind, c, file);
  const Text text = adapter_text({kind}, Half::test);
  const double stored = 2.0 * static_cast<double>(r.d);  // in 16 bits, as experts are shipped
  json out{{"kind", kind}, {"density", c.density}, {"alpha", c.alpha}, {"entries", r.d}, {"kept", r.kept}};
  if (cell.arm == "base" || cell.arm == "original") {
    out["bytes"] = cell.arm == "base" ? 0.0 : stored;
    out["bits"] = bits(cell.arm == "base" ? *experts.base() : *experts.whole(kind), text);
  } else {
    out["bytes"] = r.bytes;
    out["entropy_bytes"] = r.entropy_bits / 8.0;
    out["bits"] = bits(*experts.restored(file), text);
  }
  out["times"] = out["bytes"] > 0 ? stored / out["bytes"].get<double>() : 0.0;
  return out;
}

// All whole experts in one model: the best factor on documents that are not measured.
double merged(const StudyCell& cell, const std::string& method) {
  const Experts experts(cell, false);
  const auto base = experts.base();
  std::vector<DeltaPtr> deltas;
  for (const auto& kind : kKinds) {
    if (cell.arm == "original") {
      deltas.push_back(model_delta(experts.whole(kind), base, method == "ties" ? 0.2 : 1.0));
      continue;
    }
    const auto file = cell.folder / ("merge-" + kind + ".tv");
    experts.compress(kind, config_of(cell, false, kind, "sign"), file);
    deltas.push_back(compressed_delta(TaskVectorFile::open(file), *base));
  }
  TaskMergeConfig c;
  c.method = method;
  const Text tuning = adapter_text(kKinds, Half::tuning);
  double least = std::numeric_limits<double>::infinity(), best = 0;
  for (const double lambda : kLambdas)
    if (const double got = bits(*merged_experts(base, deltas, c, lambda), tuning); got < least)
      least = got, best = lambda;
  return bits(*merged_experts(base, deltas, c, best), adapter_text(kKinds, Half::test));
}

json measure(const StudyCell& cell) {
  json out, details = json::array();
  for (const bool lora : {false, true}) {
    const std::string form = lora ? "lora" : "whole";
    double sum = 0, times = 0;
    for (const auto& kind : kKinds) {
      json one = measure_one(cell, lora, kind);
      sum += one["bits"].get<double>() / static_cast<double>(kKinds.size());
      times += one["times"].get<double>() / static_cast<double>(kKinds.size());
      one["form"] = form;
      details.push_back(one);
    }
    out["bits_" + form] = sum;
    if (cell.arm != "base") out["times_" + form] = times;
  }
  if (cell.arm == "original" || cell.arm == "compeft") {
    out["added"] = merged(cell, "task-arithmetic");
    out["ties"] = merged(cell, "ties");
  }
  out["details"] = details;
  return out;
}

// Percent of what an expert gains over its base that is left, seed by seed.
std::vector<double> kept(const StudyTable& t, const std::string& arm, const std::string& metric,
                         const std::string& whole_metric) {
  const auto base = t.values("base", "bits_whole"), original = t.values("original", whole_metric),
             own = t.values(arm, metric);
  std::vector<double> out;
  for (size_t s = 0; s < own.size(); ++s)
    out.push_back(100.0 * (base.at(s) - own[s]) / std::max(1e-9, base.at(s) - original.at(s)));
  return out;
}

double mean(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x / static_cast<double>(v.size());
  return sum;
}

// How many times smaller the signs alone are, by Shannon: without the tables of a file, which small experts feel.
double by_entropy(const StudyTable& t, const std::string& form) {
  double sum = 0, count = 0;
  for (const auto& [seed, values] : t.cells("compeft"))
    for (const json& d : values.at("details"))
      if (d.at("form") == form)
        sum += 2.0 * d.at("entries").get<double>() / d.at("entropy_bytes").get<double>(), ++count;
  return sum / count;
}

StudyOutcome judge(const StudyTable& t) {
  bool good = true, bad = true;
  std::string reason;
  for (const std::string form : {"whole", "lora"}) {
    const std::string metric = "bits_" + form;
    const auto own = kept(t, "compeft", metric, metric);
    const auto pruned = t.difference("compeft", "prune", metric), stc = t.difference("compeft", "stc", metric);
    const auto times = t.values("compeft", "times_" + form);
    bool holds = pruned.lower(), never = true;
    for (size_t s = 0; s < own.size(); ++s) {
      holds = holds && times.at(s) >= 8.0 && own[s] >= 100.0 * (1.0 - kHeld);
      never = never && (times.at(s) < 8.0 || own[s] < 100.0 * (1.0 - kHeld));
    }
    good = good && holds;
    bad = bad && (never || pruned.higher());
    reason += fmt::format(
        "{}: {:.4f} bits a byte of their kinds (base {:.4f}, originals {:.4f}: {:.1f} % of the gain kept) in {:.1f} "
        "times fewer bytes than 16 bits an entry ({:.1f} by entropy, without tables of names and shapes); against "
        "pruned values of the same bytes {}, against STC {}.{} ",
        form == "whole" ? "Whole models" : "LoRA", t.mean("compeft", metric), t.mean("base", metric),
        t.mean("original", metric), mean(own), t.mean("compeft", "times_" + form), by_entropy(t, form), pruned.text(),
        stc.text(),
        t.has("signs-20") ? fmt::format(" Signs at density 0.2 and scale 1, untuned, keep {:.1f} %.",
                                        mean(kept(t, "signs-20", metric, metric)))
                          : "");
  }
  const auto added = kept(t, "compeft", "added", "added"), ties = kept(t, "compeft", "ties", "ties");
  reason += fmt::format(
      "Three whole experts in one: added {:.4f} (originals {:.4f}), by TIES {:.4f} ({:.4f}): {:.1f} % and {:.1f} % of "
      "what the originals gain together.",
      t.mean("compeft", "added"), t.mean("original", "added"), t.mean("compeft", "ties"), t.mean("original", "ties"),
      mean(added), mean(ties));
  const bool merges = std::min(*std::min_element(added.begin(), added.end()),
                               *std::min_element(ties.begin(), ties.end())) >= 100.0 * (1.0 - kHeld);
  StudyOutcome o;
  const bool enough = added.size() > 1;
  o.verdict = enough && good && merges ? StudyOutcome::reproduced
              : enough && bad          ? StudyOutcome::not_reproduced
                                       : StudyOutcome::inconclusive;
  o.reason = reason;
  o.headline =
      fmt::format("whole models {:.0f} times smaller keep {:.0f} % of what they learned, LoRA {:.0f} times {:.0f} %",
                  t.mean("compeft", "times_whole"), mean(kept(t, "compeft", "bits_whole", "bits_whole")),
                  t.mean("compeft", "times_lora"), mean(kept(t, "compeft", "bits_lora", "bits_lora")));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "T5-base's IA3 and LoRA experts become 8 to 50 times smaller at about their accuracy, LLaMA-65B's QLoRA 3.2 GB "
      "become 110 MB (26 times) and score 4.16 % better on MMLU; compressed experts merge as well as the originals.";
  s.setup = fmt::format(
      "{}. Kinds: Python, the manual in German and in French. Density and scale of every expert: the pair of the "
      "paper's grid with the least loss on held-out documents that are not measured. Bytes are those of files, against "
      "16 bits an entry. Merged: three whole experts, the factor of 0.1 to 2 chosen in the same way.",
      adapter_expert_setup());
  s.arms = {{"base", "the base alone"},
            {"original", "the experts as they were trained"},
            {"compeft", "ComPEFT: signs and one scale, density and scale tuned"},
            {"prune", "the largest values in half precision, as many as take the same bytes"},
            {"stc", "sparse ternary compression: the mean size as scale, density tuned"},
            {"signs-20", "signs, density 0.2, scale 1, untuned", false},
            {"prune-same", "values in half precision at the density of the signs", false}};
  s.metrics = {{"bits_whole", "whole models, bits a byte", 4},
               {"times_whole", "times smaller", 1},
               {"bits_lora", "LoRA, bits a byte", 4},
               {"times_lora", "times smaller", 1},
               {"added", "merged by adding", 4},
               {"ties", "merged by TIES", 4}};
  s.rule = fmt::format(
      "Reproduced: for whole models and for LoRA, on every seed, files are 8 or more times smaller than 16 bits an "
      "entry "
      "and keep {0:.0f} % or more of the bits a byte that experts gain over their base, pruned values of the same "
      "bytes "
      "are clearly worse; and merged compressed experts keep {0:.0f} % or more of what merged originals gain, added "
      "and "
      "by TIES. Not reproduced: for both forms, either no seed reaches the first or pruned values are clearly better. "
      "Else, and with one seed, inconclusive.",
      100.0 * (1.0 - kHeld));
  s.full = {.seeds = 3};
  s.brief = {.seeds = 1};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    json out = adapter_expert_settings();
    out["grid"] = {kDensities, kAlphas, kLambdas};
    return out;
  };
  return s;
}

const RegisterStudy registered("compeft", "ComPEFT: experts as signs and one scale",
                               "size and loss of compressed experts against pruned ones, and merging them", study);

}  // namespace
}  // namespace moiety
