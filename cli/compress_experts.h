#pragma once
// Methods that take out or merge whole experts: each says what becomes of the layers, and shares everything else:
// --keep, the calibration and its file, protected experts, plans, --dry-run, what is written and reported.
#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "compress.h"
#include "moiety/compress/calibration.h"
#include "moiety/compress/expert_layers.h"
#include "moiety/compress/expert_selection.h"

namespace moiety::cli {

/// What a method decides by.
struct ExpertRequest {
  const ExpertLayers& layers;
  const Calibration* calibration;  ///< null for methods that need none
  KeepRule keep;
  ProtectedExperts protect;
  uint64_t seed = 0;
};

struct ExpertPlan {
  std::vector<NewExperts> layers;
  nlohmann::json report = nlohmann::json::array();  ///< one object a layer: what a method wants to say about it
};

struct ExpertMethod {
  std::string name;     ///< what --method takes
  std::string summary;  ///< a few words
  bool calibrated = true;
  bool keeps = true;  ///< takes --keep
  /// Declares the method's own options and returns what decides.
  std::function<std::function<ExpertPlan(const ExpertRequest&)>(CLI::App& app)> setup;
};

std::vector<ExpertMethod>& expert_methods();
struct RegisterExpertMethod {
  explicit RegisterExpertMethod(ExpertMethod method) { expert_methods().push_back(std::move(method)); }
};

}  // namespace moiety::cli
