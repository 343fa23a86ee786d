#pragma once
// One file per verb: it registers itself here and main.cpp finds it.
#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

namespace moiety::cli {

struct Verb {
  std::string name;
  std::string summary;  ///< one line for `moiety --help`
  std::string
      examples;  ///< commands, one a line, shown under EXAMPLES in the verb's help; the first also in `moiety --help`
  /// Called only for the verb that runs. Declares the options on `app` and returns what runs after parsing; its value
  /// is the exit code (0 ok, 1 failed, 2 usage).
  std::function<std::function<int()>(CLI::App& app)> setup;
};

std::vector<Verb>& verbs();

struct Register {
  explicit Register(Verb verb) { verbs().push_back(std::move(verb)); }
};

/// Options that every verb over a model has.
struct Common {
  std::string model;
  std::string device = "cpu";
  std::string dtype = "auto";  ///< auto, f32, bf16
  int threads = 0;             ///< 0: all cores
  bool json = false;
  bool quiet = false;
  bool verbose = false;
  std::vector<std::string> adapters, scaled_adapters;  ///< for verbs that ask: folders, folders with ":STRENGTH"
  int64_t active_experts = 0;                          ///< of every mixture, for verbs that ask; 0: as the model has it
};
/// Adds MODEL, --device, --dtype, --threads, --json, --quiet, --verbose, and applies threads and log level once parsed.
/// `common` must outlive `app`'s parsing and is read by what the verb's setup returns: hold it in a shared_ptr.
void add_common(CLI::App& app, Common& common, bool model = true);
/// Adds --adapter and --adapter-scaled, which open_checkpoint applies.
void add_adapters(CLI::App& app, Common& common);
/// Adds --active-experts, which open_causal applies.
CLI::Option* add_active_experts(CLI::App& app, Common& common);

}  // namespace moiety::cli
