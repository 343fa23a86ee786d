#include "train_progress.h"

#include <fmt/format.h>

#include <algorithm>

namespace moiety::cli {

void TrainProgress::watch(TrainOptions& options) {
  options.on_step = [this](int64_t step, int64_t, double loss, int64_t count) {
    count_ += count;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    progress_->note(
        fmt::format("loss {:.4f}, {:.0f} {}s/s", loss, static_cast<double>(count_) / std::max(seconds, 1e-9), unit_));
    progress_->set(step);
  };
}

void TrainProgress::begin(const Trainer& trainer, const std::string& name) {
  unit_ = trainer.unit();
  count_ = 0;
  start_ = std::chrono::steady_clock::now();
  progress_.emplace(name, trainer.steps(), "step");
  if (trainer.step() > 0) progress_->set(trainer.step());
}

}  // namespace moiety::cli
