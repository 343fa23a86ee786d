// moiety compress: a smaller model out of one that has more than a task needs.
#include <fmt/ranges.h>

#include <algorithm>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "compress.h"
#include "compress_experts.h"
#include "moiety/base/error.h"
#include "moiety/base/progress.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/offload/low_experts.h"

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

struct RegisteredPrune {
  std::vector<std::string> names;
  PruneSetup setup;
};
std::vector<RegisteredPrune>& registered_prunes() {
  static std::vector<RegisteredPrune> all;
  return all;
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

CompressWay setup_prune(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto runs = std::make_shared<std::map<std::string, std::function<int()>>>();
  for (const auto& way : registered_prunes()) {
    const auto run = way.setup(app, a);
    for (const auto& name : way.names) (*runs)[name] = run;
  }
  return {"--prune", [a] { return !a->prune.empty(); }, [a, runs] { return runs->at(a->prune)(); }};
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
    "A smaller model: take out or merge experts that a text does not need, prune weights, compress what an expert "
    "adds, "
    "give every expert its own bit width",
    "moiety compress mixture/ --method reap --keep 0.5 --calibration text.txt -o half\n"
    "moiety compress mixture/ --method reap --keep 0.5 --across --calibration text.txt --save-plan plan.json --dry-run "
    "-o half\n"
    "moiety compress mixture/ --plan plan.json -o half\n"
    "moiety compress tuned/last --prune moduleformer --calibration task.txt -o small\n"
    "moiety compress model.gguf --method edgemoe --tolerance 0.02 --eval val.txt -o model.edge.gguf\n"
    "moiety compress tuned/last --prune moduleformer --tau 0.05 --keep-at-least 2 --calibration task.txt -o small\n"
    "moiety compress tuned/last --prune moduleformer --calibration task.txt -o small --dry-run --json\n"
    "moiety compress ./my-model --prune rd --sparsity 0.5 --calibration task.txt -o sparse\n"
    "moiety compress ./my-lora --method compeft --density 0.2 -o my-lora.tv\n"
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
      std::vector<std::string> prunes;
      for (const auto& way : registered_prunes()) prunes.insert(prunes.end(), way.names.begin(), way.names.end());
      app.add_option(
             "--prune", a->prune,
             fmt::format("What is taken out: modules of mixtures (moduleformer), or weights, by what shares them "
                         "out among layers: {}",
                         fmt::join(prunes, ", ")))
          ->check(CLI::IsMember(prunes));
      app.add_option("--calibration", a->calibration,
                     "Text files, or images, of what the model has to do (--prune, and methods over experts)");
      app.add_option("-o,--output", a->out, "The new model: a folder, or a GGUF file where the way can write one")
          ->required();
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

RegisterPrune::RegisterPrune(std::vector<std::string> names, PruneSetup setup) {
  registered_prunes().push_back({std::move(names), std::move(setup)});
}

}  // namespace moiety::cli
