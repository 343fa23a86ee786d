#pragma once
// The options of verbs that can run a model whose experts stay on disk.
#include <CLI/CLI.hpp>
#include <map>
#include <memory>
#include <string>

#include "moiety/offload/offload.h"

namespace moiety::cli {

struct OffloadArguments {
  std::string policy;  ///< "": none unless there is a budget
  std::string memory, io = "async", read_rate;
  int64_t capacity_high = 0, capacity_low = 0;
  bool skip_renormalize = false, no_direct = false, no_uring = false;
  std::map<std::string, std::string> settings;  ///< of policies, by the name of the field, as given

  /// Adds --memory, --offload, --capacity-high and -low, --io, --read-rate, and an option for every setting of every
  /// policy.
  void add(CLI::App& app);
  /// Whether experts stay on disk.
  bool on() const;
  /// Error: a setting that the chosen policy does not have, a size or rate that is none.
  OffloadOptions options() const;
};

}  // namespace moiety::cli
