#pragma once
// Ways to make a model smaller: each is one file that registers itself here, declares its own options and is asked for
// by one of them.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "verb.h"

namespace moiety::cli {

/// Options that all ways share.
struct CompressArguments : Common {
  std::string method;  ///< --method, "" when it is not given
  std::string prune;   ///< --prune, the same
  std::string out;
  std::vector<std::string> calibration;  ///< text files, or images, of what the model has to do
  int64_t context = 0, batch_size = 8, limit_tokens = 0;
  bool dry_run = false, overwrite = false;
};

struct CompressWay {
  std::string flag;  ///< what asks for it, as a user writes it: "--prune", "--method edgemoe"
  std::function<bool()> asked;
  std::function<int()> run;
};
/// Declares the options of a way; `arguments` are filled when it runs.
using CompressSetup = std::function<CompressWay(CLI::App& app, std::shared_ptr<const CompressArguments> arguments)>;

struct RegisterCompress {
  /// `method`: the name that --method takes, "" for a way with a flag of its own.
  RegisterCompress(std::string method, CompressSetup setup);
};

/// Ways of --prune: what is taken out of a model.
using PruneSetup =
    std::function<std::function<int()>(CLI::App& app, std::shared_ptr<const CompressArguments> arguments)>;

struct RegisterPrune {
  /// `names`: what --prune takes for it.
  RegisterPrune(std::vector<std::string> names, PruneSetup setup);
};

}  // namespace moiety::cli
