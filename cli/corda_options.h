#pragma once
// What both uses of CorDA ask for: which matrices, and the text that says what they read.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moiety/adapt/corda_model.h"

namespace moiety::cli {

struct CordaArguments {
  CordaOptions options;
  std::vector<std::string> calibration;
  std::string covariance, save_covariance;
  int64_t samples = 256, length = 256;

  /// Token ids of the calibration texts in pieces of `length`, as many as `samples`, from all files in turn. Throws
  /// Error.
  std::vector<std::vector<int64_t>> read(const Checkpoint& checkpoint) const;
  /// Second moments of what the matrices of `model` read: from --covariance, or over those texts, and then kept as
  /// --save-covariance unless this is a dry run. Throws Error.
  CordaMoments moments(const Checkpoint& checkpoint, const std::string& model, bool dry_run) const;
};

/// Declares them; `marked` stands behind every help text: "(corda)".
void add_corda(CLI::App& app, CordaArguments& arguments, const std::string& marked);
/// Shows how far it is: "calibration" or "decompose", done, of all.
std::function<void(const char*, int64_t, int64_t)> corda_progress();

}  // namespace moiety::cli
