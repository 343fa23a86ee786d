// MoRA: over a stream of tasks, do self-activated ranks keep what earlier tasks taught and leave the rest as it was?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>

#include "moiety/adapt/mora.h"
#include "moiety/base/error.h"
#include "moiety/study/adapters.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kRank = 16, kTuningSeed = 1000;
constexpr double kScale = 2.0, kScaling = 1.0;

std::vector<std::string> tasks() {
  return {"python", "manual-de", "perl", "manual-ja", "manual-fr"};
}

// Percent of bytes that are the likeliest ones.
double accuracy(CausalModel& model, const HeldOut& rows) {
  double right = 0;
  for (const double n :
       score_batches(model, rows, torch::kCPU, nullptr, [&](const MicroBatch&m, bool) -> std::vector<double> {
         Pass pass;
         pass.mask = m.mask;
         pass.segments = m.segments;
         pass.positions = m.positions;
         const auto best = model.forward(m.ids, pass).argmax(-1);
         return {((best == m.targets) & (m.targets != -100)).sum().item<double>()};
       }))
    right += n;
  return 100.0 * right / static_cast<double>(rows.learned);
}

json mora(int64_t old_ranks) {
  return json::array({{{"slug", "mora"},
                       {"target", "all"},
                       {"rank", kRank},
                       {"top_k", kRank},
                       {"old_ranks", old_ranks},
                       {"scaling", kScaling}}});
}

json lora() {
  return json::array({{{"slug", "lora"}, {"target", "all"}, {"rank", kRank}, {"alpha", kScale * kRank}}});
}

json mixture() {
  return json::array({{{"slug", "mola"},
                       {"target", "all"},
                       {"experts", static_cast<int64_t>(tasks().size())},
                       {"rank", kRank},
                       {"alpha", kScale * kRank},
                       {"top_k", 2},
                       {"coef", 0.001},
                       {"dropout", 0.0}}});
}

bool ends(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The model in folder `to`, its new ranks as old ones. The next run names the part: what it lacks then starts anew.
void consolidate(CausalModel& model, const fs::path& base, const fs::path& to) {
  write_changed(model, base, to, nullptr, [](std::map<std::string, torch::Tensor>& all) {
    std::vector<std::string> sites;
    for (const auto& [name, t] : all)
      if (ends(name, ".lora_A")) sites.push_back(name.substr(0, name.size() - 7));
    check(!sites.empty(), "the model has no adapters to consolidate");
    for (const auto& site : sites) {
      const bool first = all.count(site + ".old_A") == 0;
      const auto blocks = mora_consolidate(first ? torch::Tensor() : all.at(site + ".old_A"),
                                           first ? torch::Tensor() : all.at(site + ".old_B"), all.at(site + ".lora_A"),
                                           all.at(site + ".lora_B"), kScaling);
      all[site + ".old_A"] = blocks.a;
      all[site + ".old_B"] = blocks.b;
      all.erase(site + ".lora_A");
      all.erase(site + ".lora_B");
    }
  });
}

// Row t: after task t, on each of the tasks.
torch::Tensor stream(const StudyCell& cell, const std::string& arm, const fs::path& base,
                     const std::vector<std::string>& of, Half half, double rate, int64_t steps, int64_t seed) {
  const auto n = static_cast<int64_t>(of.size());
  const auto text = adapter_text(of, half);
  auto acc = torch::zeros({n, n}, torch::kFloat64);
  const auto score = [&](CausalModel& model, int64_t row) {
    for (int64_t j = 0; j < n; ++j) acc[row][j] = accuracy(model, text.at(of[static_cast<size_t>(j)]));
  };
  if (arm == "base") {
    const auto model = open_base_model(base);
    for (int64_t t = 0; t < n; ++t) score(*model, t);
    return acc;
  }
  fs::path now = base;
  std::map<std::string, std::vector<std::pair<torch::Tensor, torch::Tensor>>> learned;  // A and B of LoRA by matrix
  for (int64_t t = 0; t < n; ++t) {
    Adaptation run;
    run.model = arm == "sum" ? base : now;
    run.parts = arm == "mora" ? mora(t * kRank) : arm == "mixture" ? mixture() : lora();
    run.kinds = {of[static_cast<size_t>(t)]};
    run.rate = rate;
    run.steps = steps;
    run.seed = seed + t;
    const std::string name = fmt::format("task-{}", t);
    const auto trainer = adapt(cell, run, name);
    CausalModel& model = trainer->model();
    if (arm == "sum") {
      for (const auto& [path, m] : matrices_of(model))
        learned[path].emplace_back(adapter_tensor(*m, "lora_A"), adapter_tensor(*m, "lora_B"));
      const auto all = open_base_model(base);
      for (const auto& [path, m] : matrices_of(*all))
        m->attach(std::make_shared<Added>([&, path = path](const torch::Tensor& x) {
          torch::Tensor y;
          for (const auto& [a, b] : learned.at(path)) {
            const auto one = torch::matmul(torch::matmul(x, a.t()), b.t());
            y = y.defined() ? y + one : one;
          }
          return y * kScale;
        }));
      score(*all, t);
      continue;
    }
    score(model, t);
    if (arm == "mora") {
      now = cell.folder / fmt::format("after-{}", t);
      consolidate(model, base, now);
    } else {
      now = cell.folder / name / "last";
    }
  }
  return acc;
}

json measure(const StudyCell& cell) {
  json out;
  double rate = 0;
  if (cell.arm != "base") {
    const json tuned = tuned_rate(cell, cell.arm, [&](const StudyCell& half, double at) {
      const std::vector<std::string> two{tasks()[0], tasks()[1]};
      return -stream_metrics(
                  stream(half, cell.arm, adapter_base(cell, 0), two, Half::tuning, at, half.budget.steps, kTuningSeed))
                  .last;
    });
    rate = tuned.at("rate");
    out["rate"] = rate;
    out["tried"] = tuned.at("tried");
  }
  const auto acc = stream(cell, cell.arm, adapter_base(cell, cell.seed), tasks(), Half::test, rate, cell.budget.steps,
                          cell.seed * 100);
  const StreamMetrics m = stream_metrics(acc);
  out["transfer"] = m.transfer;
  out["average"] = m.average;
  out["last"] = m.last;
  out["forgetting"] = -m.bwt;
  for (int64_t t = 0; t < acc.size(0); ++t) {
    const auto row = acc[t].contiguous();
    out["accuracy"].push_back(std::vector<double>(row.data_ptr<double>(), row.data_ptr<double>() + row.numel()));
  }
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  StudyOutcome o;
  const auto mora = t.values("mora", "last"), frozen = t.values("base", "transfer");
  std::vector<std::string> others;
  for (const char* arm : {"sequential", "sum", "mixture"})
    if (t.has(arm)) others.emplace_back(arm);
  bool best = true, worst = true, near = true;
  for (size_t i = 0; i < mora.size(); ++i) {
    bool above = true;
    for (const auto& arm : others)
      above = above && mora[i] > t.values(arm, "last").at(i) &&
              t.values("mora", "average").at(i) > t.values(arm, "average").at(i);
    best = best && above;
    worst = worst && mora[i] <= t.values("sequential", "last").at(i);
    near = near && t.values("mora", "transfer").at(i) >= frozen.at(i) - 2.0;
  }
  o.verdict = mora.size() < 2                                                          ? StudyOutcome::inconclusive
              : best && near                                                           ? StudyOutcome::reproduced
              : worst || (!best && t.difference("mora", "sequential", "last").lower()) ? StudyOutcome::not_reproduced
                                                                                       : StudyOutcome::inconclusive;
  const auto of = [&](const char* arm) {
    return fmt::format("{:.2f} / {:.2f} / {:.2f} / {:.2f}", t.mean(arm, "transfer"), t.mean(arm, "average"),
                       t.mean(arm, "last"), t.mean(arm, "forgetting"));
  };
  o.reason = fmt::format(
      "Transfer / average / last / forgetting, percent of bytes: MoRA {}; one LoRA after another {}; the sum of one "
      "LoRA "
      "a task {}; a routed mixture of LoRA {}; the base {}.{}",
      of("mora"), of("sequential"), of("sum"), of("mixture"), of("base"),
      mora.size() < 2 ? " One seed decides nothing." : "");
  o.headline = fmt::format("last {:.1f} % (one LoRA {:.1f} %, base {:.1f} %), forgetting {:.1f} points against {:.1f}",
                           t.mean("mora", "last"), t.mean("sequential", "last"), t.mean("base", "last"),
                           t.mean("mora", "forgetting"), t.mean("sequential", "forgetting"));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "X-TAIL: transfer 63.3, average 72.7, last 80.9 (MoE-Adapter 56.0, 63.0, 70.5); on TRACE Llama-2-7B-Chat 44.54 "
      "with "
      "a backward transfer of 1.37 (O-LoRA 42.78 and 7.16).";
  s.setup =
      adapter_setup() +
      ". A stream of five tasks, one kind of text each: Python, the German manual, Perl's manual, the Japanese and "
      "the French manual, rank 16 a task beside all matrices; measured is how many bytes are the likeliest ones. "
      "Rates are tuned by what a stream of the first two tasks leaves. The text form of the claim: no images.";
  s.arms = {{"mora", "MoRA: self-activated ranks, temperature 0.01, threshold 0.2"},
            {"sequential", "one LoRA of rank 16, one task after another"},
            {"sum", "a LoRA of rank 16 a task, trained apart; what they add is summed up", false},
            {"mixture", "five LoRA experts of rank 16, two a token by a learned router, one task after another", false},
            {"base", "the frozen base"}};
  s.metrics = {{"transfer", "transfer, %", 2},
               {"average", "average, %", 2},
               {"last", "last, %", 2},
               {"forgetting", "forgetting, points", 2},
               {"rate", "learning rate", 4}};
  s.rule =
      "Reproduced: on every seed MoRA's last and average are above those of all other trained arms, and its transfer "
      "at "
      "most 2 points below the frozen base. Not reproduced: its last is not above one LoRA's on any seed, or clearly "
      "below. Else, and with one seed, inconclusive.";
  s.full = {.seeds = 3, .steps = 60};
  s.brief = {.seeds = 1, .steps = 16};
  s.measure = measure;
  s.judge = judge;
  s.settings = adapter_settings;
  return s;
}

const RegisterStudy registered("mora", "MoRA: ranks that choose themselves, over a stream of tasks",
                               "what a stream of tasks leaves of earlier ones and of the base", study);

}  // namespace
}  // namespace moiety
