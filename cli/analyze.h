#pragma once
// Analyses that are a file of their own: each registers itself here and is `moiety analyze NAME`.
#include <CLI/CLI.hpp>
#include <functional>

namespace moiety::cli {

struct AnalyzeWay {
  CLI::App* app = nullptr;  ///< its subcommand
  std::function<int()> run;
};
/// Adds a subcommand to `analyze` with its options.
using AnalyzeSetup = std::function<AnalyzeWay(CLI::App& analyze)>;

struct RegisterAnalyze {
  explicit RegisterAnalyze(AnalyzeSetup setup);
};

}  // namespace moiety::cli
