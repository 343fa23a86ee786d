#pragma once
// How the learning rate changes over a run: a factor of the peak rate, a pure function of the step.
#include <cstdint>
#include <string>

#include "moiety/base/config.h"

namespace moiety {

struct ScheduleConfig {
  std::string name = "cosine";
  double warmup = 0.0;
  double decay = 0.2;
  double floor = 0.1;

  void fields(Fields& f) {
    f("name", name,
      "constant; cosine or linear: from the peak to the floor; wsd: constant, then down to the floor in the last part")
        .choices({"constant", "cosine", "linear", "wsd"});
    f("warmup", warmup, "steps in which the rate rises from 0; below 1 a share of all steps").min(0);
    f("decay", decay, "wsd: steps in which the rate falls at the end; below 1, or 1 itself, a share of all steps")
        .min(0);
    f("floor", floor, "the rate at the end, as a share of the peak").min(0).max(1);
  }
};

/// The factor for step `step` = 0 ... steps - 1. Warm-up: (step + 1) / warmup. Then, with t from 0 at the end of the
/// warm-up to 1 at the last step, floor + (1 - floor) * f with f = 1 - t (linear), (1 + cos(pi t)) / 2 (cosine); wsd
/// (Hu et al. 2024, arXiv 2404.06395) stays at 1 and then falls linearly so that the last step has the floor.
double schedule_factor(const ScheduleConfig& config, int64_t step, int64_t steps);

/// Steps of the warm-up out of `steps`.
int64_t warmup_steps(const ScheduleConfig& config, int64_t steps);

}  // namespace moiety
