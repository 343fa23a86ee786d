#pragma once
// Ways to make one model of a base and its experts: each is one file that registers itself here and declares its own
// options; --method asks for it.
#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "verb.h"

namespace moiety::cli {

struct MergeArguments {
  Common common;  ///< common.model: the base
  std::string method;
  std::vector<std::string> experts;
  std::string out, type, dtype;
  bool dry_run = false, overwrite = false;
};

/// Declares the options of a way and returns what runs it; `arguments` are filled by then.
using MergeSetup = std::function<std::function<int()>(CLI::App& app, std::shared_ptr<const MergeArguments> arguments)>;

struct RegisterMerge {
  /// `methods`: the names that --method takes for it.
  RegisterMerge(std::vector<std::string> methods, MergeSetup setup);
};

/// Writes the model and says what was written. Error: options that do not go with the kind of output.
int write_merged(const Checkpoint& merged, const MergeArguments& arguments);

}  // namespace moiety::cli
