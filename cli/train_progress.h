#pragma once
// The bar of a run: steps, loss, speed.
#include <chrono>
#include <optional>
#include <string>

#include "moiety/base/progress.h"
#include "moiety/train/trainer.h"

namespace moiety::cli {

class TrainProgress {
 public:
  /// Has to be what the run is opened with; this outlives it.
  void watch(TrainOptions& options);
  /// Before the run: `name` stands before the bar.
  void begin(const Trainer& trainer, const std::string& name = "train");
  void end() { progress_.reset(); }

 private:
  std::optional<Progress> progress_;
  std::chrono::steady_clock::time_point start_;
  int64_t count_ = 0;
  std::string unit_;
};

}  // namespace moiety::cli
