// moiety analyze super-experts: the few experts that a model cannot do without.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "analyze.h"
#include "moiety/analyze/super_experts.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/base/random.h"
#include "moiety/compress/prune_experts.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"
#include "read_texts.h"

namespace moiety::cli {
namespace {

using nlohmann::json;
using Windows = std::vector<std::vector<int64_t>>;

struct Options {
  Common common;
  std::vector<std::string> texts;
  std::string out, experts;
  int64_t length = 0, windows = 256, draws = 5;
  uint64_t seed = 83;
  SuperExpertRule rule;
  bool growing = false, evaluate = false;
};

// A bar that is there from the first step on.
std::function<void(int64_t, int64_t)> bar(const std::string& what, const std::string& unit) {
  const auto held = std::make_shared<std::optional<Progress>>();
  return [held, what, unit](int64_t done, int64_t all) {
    if (!*held) held->emplace(what, all, unit);
    (*held)->set(done);
  };
}

// Whole windows; every one begins as a text does.
Windows windows_of(const Options& o, const OpenModel& open) {
  const int64_t limit = open.model->context_length(), length = o.length > 0 ? o.length : std::min<int64_t>(2048, limit);
  check(length <= limit, "--length {} is more than the model's {}", length, limit);
  const int64_t bos = adds_bos(*open.tokenizer) ? *open.tokenizer->bos() : -1, fresh = length - (bos >= 0 ? 1 : 0);
  check(fresh >= 1, "--length {} has no room for a token behind BOS", length);
  std::vector<int64_t> ids;
  for (const auto& text : read_texts(*open.tokenizer, o.texts, 0)) ids.insert(ids.end(), text.begin(), text.end());
  const int64_t there = static_cast<int64_t>(ids.size()) / fresh;
  check(there >= 1, "the text has {} tokens, fewer than one window of {}: give more, or a smaller --length", ids.size(),
        length);
  Windows out;
  for (int64_t w = 0; w < std::min(there, o.windows); ++w) {
    out.emplace_back();
    if (bos >= 0) out.back().push_back(bos);
    out.back().insert(out.back().end(), ids.begin() + w * fresh, ids.begin() + (w + 1) * fresh);
  }
  return out;
}

struct Measured {
  double perplexity = 0;
  torch::Tensor sinks;  // [layers, heads]
};

Measured measure(const Options& o, const Checkpoint& checkpoint, const Windows& windows, const std::string& name,
                 bool sinks) {
  const auto model = load_causal(checkpoint, {.dtype = o.common.dtype, .device = torch::Device(o.common.device)});
  model->eval();
  Measured m;
  m.perplexity = window_perplexity(*model, windows, bar(name, "window"));
  if (sinks) m.sinks = model_sinks(*model, windows, {0}, bar(name + ", sinks", "step"));
  return m;
}

// As many other experts of the same layers.
std::vector<ExpertAt> random_experts(const ModelMaxima& maxima, const std::vector<ExpertAt>& instead_of,
                                     RandomStream& random) {
  std::map<int64_t, std::vector<int64_t>> taken;
  for (const ExpertAt& e : instead_of) taken[e.layer].push_back(e.expert);
  std::vector<ExpertAt> out;
  for (const auto& [layer, experts] : taken) {
    std::vector<int64_t> others;
    for (int64_t e = 0; e < maxima.mixtures.at(layer).experts; ++e)
      if (std::find(experts.begin(), experts.end(), e) == experts.end()) others.push_back(e);
    random.shuffle(others);
    for (size_t i = 0; i < std::min(experts.size(), others.size()); ++i) out.push_back({layer, others[i]});
  }
  return out;
}

json pairs(const std::vector<ExpertAt>& experts) {
  json out = json::array();
  for (const ExpertAt& e : experts) out.push_back({e.layer, e.expert});
  return out;
}

json evaluate(const Options& o, const std::shared_ptr<const Checkpoint>& checkpoint, const Windows& windows,
              const ModelMaxima& maxima, const std::vector<ExpertAt>& experts) {
  const Measured whole = measure(o, *checkpoint, windows, "whole", true),
                 without = measure(o, *prune_experts(checkpoint, experts), windows, "pruned", true);
  json layers = json::array();
  double sum = 0;
  int64_t counted = 0;
  for (int64_t l = 0; l < whole.sinks.size(0); ++l) {
    const double mean = sink_decay(whole.sinks[l], without.sinks[l]).mean;
    layers.push_back(std::isfinite(mean) ? json(mean) : json());
    if (std::isfinite(mean)) sum += mean, ++counted;
  }
  json draws = json::array();
  for (int64_t d = 0; d < o.draws; ++d) {
    RandomStream random(o.seed, fmt::format("super-experts.random.{}", d));
    const auto others = random_experts(maxima, experts, random);
    const Measured m = measure(o, *prune_experts(checkpoint, others), windows, fmt::format("random {}", d + 1), false);
    draws.push_back({{"experts", pairs(others)}, {"perplexity", m.perplexity}});
  }
  const auto mean_score = [](const torch::Tensor& t) { return t.nanmean().item<double>(); };
  return {{"experts", pairs(experts)},
          {"perplexity", whole.perplexity},
          {"perplexity_pruned", without.perplexity},
          {"sink_score", mean_score(whole.sinks)},
          {"sink_score_pruned", mean_score(without.sinks)},
          {"sink_decay", counted > 0 ? json(sum / static_cast<double>(counted)) : json()},
          {"sink_decay_by_layer", std::move(layers)},
          {"random", std::move(draws)}};
}

void print(const json& report) {
  const auto& found = report["super_experts"];
  fmt::print("{} windows, {} tokens; layers looked at: {}\n", report["windows"].get<int64_t>(),
             report["tokens"].get<int64_t>(), fmt::join(report["included_layers"].get<std::vector<int64_t>>(), " "));
  fmt::print("above {:.4g} (percentile) and {:.4g} (largest over times): {} super expert{}\n\n",
             report["percentile"].get<double>(), report["limit"].get<double>(), found.size(),
             found.size() == 1 ? "" : "s");
  fmt::print("{:>5} {:>6} {:>12} {:>12} {:>8} {:>8} {:>10}\n", "layer", "expert", "largest", "read", "channel",
             "tokens", "at first");
  const auto row = [](const json& e, const char* mark) {
    const auto expert = e["expert_index"].get<int64_t>();
    fmt::print("{:>5} {:>6} {:>12.4g} {:>12.4g} {:>8} {:>8} {:>8.0f} %{}\n", e["layer_index"].get<int64_t>(),
               expert < 0 ? "shared" : std::to_string(expert), e["output_max"].get<double>(),
               e["input_max"].get<double>(), e["output_channel"].get<int64_t>(), e["tokens"].get<int64_t>(),
               100.0 * e["first_position_share"].get<double>(), mark);
  };
  for (const auto& e : found) row(e, "  *");
  int64_t shown = 0;
  for (const auto& e : report["experts"]) {
    const bool super = std::any_of(found.begin(), found.end(), [&](const json& f) {
      return f["layer_index"] == e["layer_index"] && f["expert_index"] == e["expert_index"];
    });
    if (!super && shown++ < 5) row(e, "");
  }
  if (!report.contains("pruning")) return;
  const json& p = report["pruning"];
  fmt::print("\nwithout them perplexity is {:.4g} instead of {:.4g}", p["perplexity_pruned"].get<double>(),
             p["perplexity"].get<double>());
  std::vector<double> random;
  for (const auto& d : p["random"]) random.push_back(d["perplexity"].get<double>());
  if (!random.empty())
    fmt::print(", without as many others of the same layers {:.4g} to {:.4g}",
               *std::min_element(random.begin(), random.end()), *std::max_element(random.begin(), random.end()));
  fmt::print("; position 0 gets {:.1f} % of attention instead of {:.1f} %\n",
             100.0 * p["sink_score_pruned"].get<double>(), 100.0 * p["sink_score"].get<double>());
}

int run(const Options& o) {
  const OpenModel open = open_causal(o.common);
  const Windows windows = windows_of(o, open);
  const ModelMaxima maxima = profile_experts(*open.model, windows, bar("super-experts", "step"));
  const auto mixtures = maxima.layers_with_experts();
  const auto layers = o.growing ? growing_layers(maxima.hidden_max, mixtures)
                                : included_layers(maxima.layers, o.rule.include_layers, mixtures);
  check(!layers.empty(), "no layer with experts is looked at: {}",
        o.growing ? "the residual stream grows fivefold at none" : "raise --include-layers");
  const SuperExperts found = find_super_experts(maxima.table(), layers, o.rule, maxima.shared());
  json report = super_experts_report(maxima, found, layers);
  report["model"] = o.common.model;
  report["family"] = open.checkpoint->config().value("model_type", "");
  report["config_hash"] = config_hash(open.checkpoint->config());
  report["texts"] = o.texts;
  report["settings"] = dump(o.rule);
  report["settings"].update({{"length", windows[0].size()}, {"growing_layers", o.growing}, {"dtype", o.common.dtype}});
  if (o.evaluate) {
    std::vector<ExpertAt> experts;
    if (o.experts.empty())
      for (const SuperExpert& e : found.found) experts.push_back({e.layer, e.expert});
    else
      experts = parse_experts(o.experts);
    check(!experts.empty(), "there is no super expert to evaluate the model without; --experts names others");
    report["pruning"] = evaluate(o, open.checkpoint, windows, maxima, experts);
  }
  const std::string text = report.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  if (!o.out.empty()) write_file(o.out, text);
  if (o.common.json)
    std::cout << text;
  else
    print(report);
  return 0;
}

const RegisterAnalyze super_experts([](CLI::App& analyze) -> AnalyzeWay {
  auto o = std::make_shared<Options>();
  CLI::App& app = *analyze.add_subcommand(
      "super-experts", "The few experts that write enormous values, and what the model is without them");
  add_common(app, o->common);
  app.add_option("--text", o->texts, "Text files to read")->required();
  app.add_option("-o,--output", o->out, "Write the report (JSON) to this file");
  app.add_option("--length", o->length, "Tokens of a window (default: 2048, or the model's limit)")
      ->check(CLI::Range(2, 1 << 30));
  app.add_option("--windows", o->windows, "Use only the first windows of the text")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--quantile", o->rule.quantile, "Percentile of all maxima that a super expert's is above")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--times", o->rule.times, "A super expert's maximum is above the largest one over this")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--include-layers", o->rule.include_layers, "Share of the layers, from the first, that are looked at")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_flag("--growing-layers", o->growing, "Look at the layers where the residual stream grows fivefold instead");
  app.add_option("--scope", o->rule.scope, "Take percentile and largest over the layers looked at, or the model")
      ->check(CLI::IsMember({"included", "model"}))
      ->capture_default_str();
  app.add_flag("--floor", o->rule.floor, "Round the largest over --times down, as the authors' code does");
  auto* evaluate = app.add_flag("--evaluate", o->evaluate,
                                "Also measure perplexity and attention sinks without the super experts, and perplexity "
                                "without others");
  app.add_option("--experts", o->experts, "Evaluate without these instead: LAYER,EXPERT;... (-1: the shared expert)")
      ->needs(evaluate);
  app.add_option("--random-draws", o->draws, "How often as many other experts of the same layers are taken out")
      ->check(CLI::Range(0, 1000))
      ->needs(evaluate)
      ->capture_default_str();
  app.add_option("--seed", o->seed, "Of these draws")->needs(evaluate)->capture_default_str();
  return {&app, [o] { return run(*o); }};
});

}  // namespace
}  // namespace moiety::cli
