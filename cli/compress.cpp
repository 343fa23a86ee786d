// moiety compress: a smaller model out of one that has more than a task needs.
#include <torch/torch.h>

#include <fmt/ranges.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "compress.h"
#include "compress_experts.h"
#include "moiety/analyze/routing.h"
#include "moiety/base/error.h"
#include "moiety/base/progress.h"
#include "moiety/compress/module_pruning.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/offload/low_experts.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"
#include "read_texts.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct Registered {
  std::string method;
  CompressSetup setup;
};
std::vector<Registered>& registered() {
  static std::vector<Registered> all;
  return all;
}

struct PruneOptions {
  std::string prune;
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

// Copies of experts in low precision, beside the originals.
int run_low_experts(const CompressArguments& a, const std::string& format) {
  const auto checkpoint = Checkpoint::open(a.model);
  std::optional<Progress> progress;
  const auto report =
      add_low_experts(*checkpoint, find_format(format)->format, a.out, a.overwrite, [&](int64_t done, int64_t total) {
        if (!progress) progress.emplace("copies", total, "byte");
        progress->set(done);
      });
  progress.reset();
  if (a.json) {
    std::cout << json{{"output", a.out},
                      {"format", format},
                      {"copies", report.tensors},
                      {"in_q4_0", format == "q4_0" ? report.tensors : report.narrow},
                      {"bytes_before", report.bytes_before},
                      {"bytes", report.bytes}}
                     .dump(2)
              << "\n";
    return 0;
  }
  fmt::print("wrote {}: {} copies of stacked experts in {}{}, {:.1f} MiB instead of {:.1f} MiB\n", a.out,
             report.tensors, format,
             report.narrow > 0 ? fmt::format(" ({} in q4_0: their rows are no multiple of 256)", report.narrow) : "",
             static_cast<double>(report.bytes) / 1048576, static_cast<double>(report.bytes_before) / 1048576);
  return 0;
}

int run_prune(const CompressArguments& a, const PruneOptions& o) {
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

CompressWay setup_prune(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<PruneOptions>();
  app.add_option("--prune", o->prune, "What is taken out: moduleformer (modules of its mixtures)")
      ->check(CLI::IsMember({"moduleformer"}));
  app.add_option("--tau", o->tau, "Modules stay that at least this share of the tokens chooses (--prune)")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--keep-at-least", o->keep_at_least,
                 "So many modules of every mixture stay in any case, the most frequent ones (--prune)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  return {"--prune", [o] { return !o->prune.empty(); }, [a, o] { return run_prune(*a, *o); }};
}

const RegisterCompress prune("", setup_prune);

CompressWay setup_low_experts(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto format = std::make_shared<std::string>();
  app.add_option("--add-low-experts", *format,
                 "Write the GGUF file again with copies of its experts in this format beside them, which --offload "
                 "hobbit reads where an expert matters less")
      ->check(CLI::IsMember({"q4_0", "tq2_0"}));
  return {"--add-low-experts", [format] { return !format->empty(); },
          [a, format] { return run_low_experts(*a, *format); }};
}

const RegisterCompress low_experts("", setup_low_experts);

int run_compress(const std::vector<CompressWay>& ways) {
  std::vector<std::string> flags, asked;
  const CompressWay* chosen = nullptr;
  for (const auto& way : ways) {
    flags.push_back(way.flag);
    if (!way.asked()) continue;
    asked.push_back(way.flag);
    chosen = &way;
  }
  check(!asked.empty(), "say how the model is to become smaller: {}", fmt::join(flags, ", or "));
  check(asked.size() == 1, "{} do not go together: one at a time", fmt::join(asked, " and "));
  return chosen->run();
}

const Register compress({
    "compress",
    "A smaller model: take out or merge experts that a text does not need, give every expert its own bit width, or add "
    "small copies",
    "moiety compress mixture/ --method reap --keep 0.5 --calibration text.txt -o half\n"
    "moiety compress mixture/ --method reap --keep 0.5 --across --calibration text.txt --save-plan plan.json --dry-run "
    "-o half\n"
    "moiety compress mixture/ --plan plan.json -o half\n"
    "moiety compress tuned/last --prune moduleformer --calibration task.txt -o small\n"
    "moiety compress model.gguf --method edgemoe --tolerance 0.02 --eval val.txt -o model.edge.gguf\n"
    "moiety compress tuned/last --prune moduleformer --tau 0.05 --keep-at-least 2 --calibration task.txt -o small\n"
    "moiety compress tuned/last --prune moduleformer --calibration task.txt -o small --dry-run --json\n"
    "moiety compress ./my-model --method corda-svd --drop 0.2 --calibration-text val.txt -o smaller\n"
    "moiety compress mixture.gguf --add-low-experts q4_0 -o mixture.hobbit.gguf",
    [](CLI::App& app) {
      auto a = std::make_shared<CompressArguments>();
      add_common(app, *a);
      std::vector<std::string> methods;
      for (const auto& way : registered())
        if (!way.method.empty()) methods.push_back(way.method);
      for (const auto& m : expert_methods()) methods.push_back(m.name);
      std::sort(methods.begin(), methods.end());
      app.add_option("--method", a->method, fmt::format("A method by its slug: {}", fmt::join(methods, ", ")))
          ->check(CLI::IsMember(methods));
      app.add_option("-o,--output", a->out, "The new model: a folder, or a GGUF file where the way can write one")
          ->required();
      app.add_option("--calibration", a->calibration,
                     "Text files of what the model has to do (--prune, and methods over experts)");
      auto ways = std::make_shared<std::vector<CompressWay>>();
      for (const auto& way : registered()) ways->push_back(way.setup(app, a));
      app.add_option("--context", a->context, "Tokens that the model sees at a time (default: 512, or its limit)")
          ->check(CLI::Range(1, 1 << 30));
      app.add_option("--limit-tokens", a->limit_tokens, "Use only the first tokens of each text; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      app.add_option("--batch-size", a->batch_size, "Windows at a time")
          ->check(CLI::Range(1, 65536))
          ->capture_default_str();
      app.add_flag("--dry-run", a->dry_run, "Say what would be written, write nothing");
      app.add_flag("--overwrite", a->overwrite, "Replace a model that is there already");
      return [ways] { return run_compress(*ways); };
    },
});

}  // namespace

RegisterCompress::RegisterCompress(std::string method, CompressSetup setup) {
  registered().push_back({std::move(method), std::move(setup)});
}

}  // namespace moiety::cli
