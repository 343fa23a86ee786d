// ModuleFormer: does the mutual-information loss serve a mixture of modules as well as Switch's, can half of the
// modules go after fine-tuning with the concentration loss, and does stick-breaking attention bear longer texts?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "moiety/study/language.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kModules = 8, kTopK = 2;

LanguageRecipe recipe() {
  return {};  // 256 active hidden units: 2 of 8 modules of 128
}

LanguageRecipe python() {
  LanguageRecipe r;
  r.sources = {"python"};
  r.held_out_tokens = 24576;
  return r;
}

json module(const std::string& slug, const std::string& loss, double weight) {
  return {{"slug", slug},       {"modules", kModules}, {"top_k", kTopK},           {"gating_size", 64},
          {"gate_type", "mlp"}, {"aux_loss", loss},    {"aux_loss_weight", weight}};
}

// Feed-forward modules; the attention is the family's, softmax over rotary positions.
json feed_forward(const std::string& loss, double weight) {
  return json::array({module("moduleformer", loss, weight)});
}

// Both halves of every block are mixtures.
json whole(const std::string& loss, double weight) {
  json attention = module("moduleformer-attention", loss, weight);
  attention["width"] = 32;
  attention["heads"] = 2;
  return json::array({module("moduleformer", loss, weight), attention});
}

// One module of four heads: stick-breaking attention without a choice.
json stick_breaking() {
  json attention = module("moduleformer-attention", "mi", 0.0);
  attention.update({{"modules", 1}, {"top_k", 1}, {"width", 64}, {"heads", 4}, {"gate_type", "linear"}});
  return json::array({module("moduleformer", "mi", 1e-3), attention});
}

json parts_of(const std::string& arm) {
  if (arm == "switch") return feed_forward("switch", 1e-2);
  if (arm == "no-loss") return feed_forward("mi", 0.0);
  return arm == "stick-breaking" ? stick_breaking() : feed_forward("mi", 1e-3);
}

// How often modules are chosen, by mixture and by source of the text.
class Usage {
 public:
  void add(const std::string& source, const Trace::Record& r) {
    auto& n = counts_[r.site][source];
    const auto now = torch::bincount(r.routing.experts.reshape({-1}), {}, r.experts);
    n = n.defined() ? n + now : now;
  }
  // Bits that a chosen module tells about the kind of text, mean over the mixtures.
  double information() const {
    double sum = 0;
    for (const auto& [site, by_source] : counts_) {
      std::vector<torch::Tensor> rows;
      for (const auto& [source, n] : by_source) rows.push_back(n.to(torch::kFloat64));
      const auto joint = torch::stack(rows) / torch::stack(rows).sum();
      const auto apart = joint.sum(0, true) * joint.sum(1, true);
      sum += torch::xlogy(joint, joint / apart.clamp_min(1e-300)).sum().item<double>() / std::log(2.0);
    }
    return sum / static_cast<double>(counts_.size());
  }
  // Which modules stay when `share` of all go, the most frequent ones; never fewer than a token chooses.
  std::map<Site, torch::Tensor> keep(double share) const {
    std::map<Site, torch::Tensor> out;
    std::vector<torch::Tensor> all;
    for (const auto& [site, by_source] : counts_) {
      torch::Tensor total;
      for (const auto& [source, n] : by_source) total = total.defined() ? total + n : n;
      all.push_back(total);
      out[site] = total;
    }
    const auto sorted = std::get<0>(torch::cat(all).sort(/*dim=*/0, /*descending=*/true));
    const auto last = std::max<int64_t>(1, std::llround((1.0 - share) * static_cast<double>(sorted.numel())));
    const auto least = sorted[last - 1];
    for (auto& [site, n] : out) {
      const auto best = std::get<1>(n.topk(kTopK));
      n = (n >= least).scatter(0, best, true);
    }
    return out;
  }

 private:
  std::map<Site, std::map<std::string, torch::Tensor>> counts_;
};

// Pruned modules have no logit: the softmax runs over those that are kept.
class Without : public Edit {
 public:
  explicit Without(std::map<Site, torch::Tensor> keep) : keep_(std::move(keep)) {}
  void logits(const Site& site, const Pass&, torch::Tensor& logits) override {
    logits = logits.masked_fill(~keep_.at(site), -std::numeric_limits<float>::infinity());
  }
  int64_t kept() const {
    int64_t n = 0;
    for (const auto& [site, k] : keep_) n += k.sum().item<int64_t>();
    return n;
  }

 private:
  std::map<Site, torch::Tensor> keep_;
};

json pruned(CausalModel& model) {
  const auto r = python();
  const auto text = held_out_text(r);
  json out{{"python", measure_language(model, text)["bits_per_byte"]}};
  Usage usage;
  trace_language(model, learned_text(r),
                 [&](const std::string& source, const Trace::Record& record) { usage.add(source, record); });
  json curve = json::array();
  for (const double share : {0.25, 0.5, 0.7}) {
    const auto edit = std::make_shared<Without>(usage.keep(share));
    const double bits = measure_language(model, text, {edit})["bits_per_byte"];
    curve.push_back({{"pruned", share},
                     {"kept", edit->kept()},
                     {"bits_per_byte", bits},
                     {"rise", 100.0 * (bits / out["python"].get<double>() - 1.0)}});
  }
  out["half"] = curve[1]["bits_per_byte"];
  out["rise"] = curve[1]["rise"];
  out["curve"] = curve;
  return out;
}

json measure(const StudyCell& cell) {
  const LanguageRecipe r = recipe();
  if (cell.arm == "tuned" || cell.arm == "concentrated") {
    const auto base = cell.once(fmt::format("base-{}", cell.seed), [&](const std::filesystem::path& folder) {
      StudyCell own = cell;
      own.folder = folder;
      train_language(own, {.recipe = r, .parts = whole("mi", 1e-3)});
    });
    const bool concentrate = cell.arm == "concentrated";
    const auto trainer = train_language(cell, {.recipe = python(),
                                               .parts = concentrate ? whole("concentration", 0.1) : whole("mi", 0.0),
                                               .checkpoint = base / "run" / "last",
                                               .lr_scale = 0.25,
                                               .steps = cell.budget.steps / 2});
    return pruned(trainer->model());
  }
  const auto trainer = train_language(cell, {.recipe = r, .parts = parts_of(cell.arm)});
  CausalModel& model = trainer->model();
  const auto text = held_out_text(r);
  json out = measure_language(model, text);
  Usage usage;
  trace_language(model, text, [&](const std::string& source, const Trace::Record& record) {
    if (record.site.site == "ffn") usage.add(source, record);
  });
  out["information"] = usage.information();
  // Rows twice as long: the loss behind positions that no row of the training had, against that on the others.
  const auto on = [&](bool beyond) {
    auto rows = held_out_text(r, 2 * r.length);
    for (auto& [name, of] : rows) {
      of.learned = 0;
      for (auto& b : of.batches) {
        const auto at = b.positions.defined() ? b.positions : torch::arange(b.ids.size(1)).expand_as(b.ids);
        b.targets = b.targets.masked_fill((at >= r.length) != beyond, -100);
        of.learned += (b.targets != -100).sum().item<int64_t>();
      }
    }
    return measure_language(model, rows)["nats"].get<double>();
  };
  out["far"] = 100.0 * (on(true) / on(false) - 1.0);
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto mi = t.difference("mi", "switch", "bits_per_byte"), none = t.difference("mi", "no-loss", "bits_per_byte"),
             stick = t.difference("stick-breaking", "mi", "bits_per_byte"),
             cost = t.difference("concentrated", "tuned", "python"),
             half = t.difference("concentrated", "tuned", "half");
  const auto with = t.values("concentrated", "rise"), without = t.values("tuned", "rise"),
             broken = t.values("stick-breaking", "far"), rope = t.values("mi", "far");
  bool prunes = true, fails = true, far = true, near = true;
  for (size_t i = 0; i < with.size(); ++i) {
    const bool good = with[i] < 1.0 && with[i] < without[i] / 3.0;
    prunes = prunes && good;
    fails = fails && !good;
  }
  for (size_t i = 0; i < broken.size(); ++i) {
    far = far && broken[i] < rope[i];
    near = near && broken[i] >= rope[i];
  }
  StudyOutcome o;
  o.verdict = prunes && far && !mi.higher()  ? StudyOutcome::reproduced
              : fails || near || mi.higher() ? StudyOutcome::not_reproduced
                                             : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Bits per byte with the mutual-information loss against Switch's: {}; against none: {}. Without half of the "
      "modules, bits per byte on Python rise by {:.2f} % after the concentration loss and by {:.2f} % without it; "
      "with all modules the concentration costs {}, pruned it leaves {}. Behind the trained length the loss changes by "
      "{:+.2f} % with stick-breaking attention, by {:+.2f} % with rotary positions; stick-breaking itself: {}.",
      mi.text(), none.text(), t.mean("concentrated", "rise"), t.mean("tuned", "rise"), cost.text(), half.text(),
      t.mean("stick-breaking", "far"), t.mean("mi", "far"), stick.text());
  o.headline = fmt::format(
      "half of the modules gone: {:+.2f} % (without concentration {:+.2f} %); mi against Switch's loss {:+.2f} %",
      t.mean("concentrated", "rise"), t.mean("tuned", "rise"), mi.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "MoLM-350M-4B is about as good as Pythia 1.4B at twice the throughput; after fine-tuning with a concentration "
      "loss half of the modules and more can be pruned with little loss on the task.";
  s.setup = recipe().text() +
            "; feed-forward layers are 2 of 8 modules of 128. The last two arms fine-tune one model, whose attention "
            "is a mixture of 8 modules too, on Python alone for half as many steps, then the modules that Python "
            "chooses least are masked.";
  s.arms = {{"mi", "mutual-information loss at 1e-3, softmax attention over rotary positions"},
            {"switch", "Switch's balance and z loss at 1e-2"},
            {"no-loss", "no loss of the gate", false},
            {"stick-breaking", "as mi, with one stick-breaking attention module of 4 heads"},
            {"tuned", "all mixtures, fine-tuned on Python without a loss of the gate"},
            {"concentrated", "the same with the concentration loss at 0.1"}};
  s.metrics = {{"bits_per_byte", "bits a byte", 4},
               {"information", "bits module tells of kind", 4},
               {"far", "behind trained length, %", 2},
               {"python", "Python, bits a byte", 4},
               {"half", "half pruned", 4},
               {"rise", "rise, %", 2}};
  s.rule =
      "Reproduced: on every seed half of the modules go for less than 1 % more bits per byte on Python after the "
      "concentration loss, and for less than a third of the rise without it; the mutual-information loss is not "
      "clearly "
      "worse than Switch's; and on every seed the loss behind the trained length, against that within it, is lower "
      "with "
      "stick-breaking attention than with rotary positions. Not reproduced: the first or the third fails on every "
      "seed, or the mutual-information loss is clearly worse. Else inconclusive.";
  s.full = {.seeds = 3, .steps = 400};
  s.brief = {.seeds = 1, .steps = 100};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] { return recipe().settings(); };
  return s;
}

const RegisterStudy registered("moduleformer",
                               "ModuleFormer: modules that specialise and can be pruned, and stick-breaking attention",
                               "losses that make modules specialise, pruning them, and stick-breaking attention",
                               study);

}  // namespace
}  // namespace moiety
