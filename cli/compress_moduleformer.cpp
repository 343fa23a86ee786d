// moiety compress --prune moduleformer: modules that a text does not use.
#include <torch/torch.h>

#include <fmt/format.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "compress.h"
#include "moiety/analyze/routing.h"
#include "moiety/base/error.h"
#include "moiety/base/progress.h"
#include "moiety/compress/module_pruning.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"
#include "read_texts.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct Options {
  double tau = 0.01;
  int64_t keep_at_least = 0;
};

std::vector<ModuleUse> module_use(const CompressArguments& a, const OpenModel& open) {
  RoutingOptions options;
  options.context = a.context > 0 ? a.context : std::min<int64_t>(512, open.model->context_length());
  options.batch_size = a.batch_size;
  if (adds_bos(*open.tokenizer)) options.bos = *open.tokenizer->bos();
  std::vector<RoutingText> texts;
  auto ids = read_texts(*open.tokenizer, a.calibration, a.limit_tokens);
  for (size_t i = 0; i < ids.size(); ++i) texts.push_back({a.calibration[i], std::move(ids[i])});
  std::optional<Progress> progress;
  const auto statistics = analyze_routing(*open.model, texts, options, [&](int64_t done, int64_t windows) {
    if (!progress) progress.emplace("calibration", windows, "window");
    progress->set(done);
  });
  std::vector<ModuleUse> use;
  for (const auto& [site, s] : statistics.sites())
    use.push_back({site.block, site.site, s.slots,
                   s.load.to(torch::kFloat64) / static_cast<double>(std::max<int64_t>(1, s.tokens))});
  return use;
}

int run(const CompressArguments& a, const Options& o) {
  check(!a.calibration.empty(), "--prune looks at how a text uses the modules: give --calibration FILE");
  const OpenModel open = open_causal(a);
  const auto plan = plan_module_pruning(module_use(a, open), o.tau, o.keep_at_least);
  const auto pruned = prune_modules(open.checkpoint, plan);
  WriteOptions write;
  write.overwrite = a.overwrite;
  write.dry_run = a.dry_run;
  const WriteReport report = write_hf(*pruned, a.out, write);
  int64_t kept = 0, modules = 0, before = 0;
  for (const auto& k : plan) kept += static_cast<int64_t>(k.keep.size()), modules += k.modules;
  for (const auto& t : open.checkpoint->tensors()) before += t.elements();
  if (a.json) {
    json layers = json::array();
    for (const auto& k : plan)
      layers.push_back({{"layer", k.layer}, {"site", k.site}, {"modules", k.modules}, {"keep", k.keep}});
    std::cout << json{{"output", a.out},    {"written", !a.dry_run}, {"tau", o.tau},         {"layers", layers},
                      {"modules", modules}, {"kept", kept},          {"parameters", before}, {"left", report.elements}}
                     .dump(2, ' ', false, json::error_handler_t::replace)
              << "\n";
    return 0;
  }
  fmt::print("{:>5} {:<10} {:>8} {:>6}\n", "layer", "site", "modules", "kept");
  for (const auto& k : plan) fmt::print("{:>5} {:<10} {:>8} {:>6}\n", k.layer, k.site, k.modules, k.keep.size());
  fmt::print("\n{} {}: {} of {} modules, {} of {} parameters\n", a.dry_run ? "would write" : "wrote", a.out, kept,
             modules, report.elements, before);
  return 0;
}

std::function<int()> setup(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<Options>();
  app.add_option("--tau", o->tau, "Modules stay that at least this share of the tokens chooses (--prune moduleformer)")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--keep-at-least", o->keep_at_least,
                 "So many modules of every mixture stay in any case, the most frequent ones (--prune moduleformer)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  return [a, o] { return run(*a, *o); };
}

const RegisterPrune moduleformer({"moduleformer"}, setup);

}  // namespace
}  // namespace moiety::cli
