#pragma once
// The calibration pass over a text, for the verbs that decide by it.
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "moiety/compress/calibration.h"
#include "moiety/compress/expert_layers.h"
#include "verb.h"

namespace moiety::cli {

struct CalibrationArguments {
  std::vector<std::string> texts;
  std::string file;
  int64_t context = 0, batch_size = 8, limit_tokens = 0;
};

/// Declares `flag` (text files), --calibration-file, --context, --limit-tokens and --batch-size.
void add_calibration(CLI::App& app, CalibrationArguments& a, const std::string& flag);
/// Reads the texts with a progress bar, or takes the file of an earlier run. Error: neither, see calibrate.
Calibration calibration_of(const Common& common, const CalibrationArguments& a, const ExpertLayers& layers);

}  // namespace moiety::cli
