#include "moiety/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moiety {
namespace {

int64_t resolved(double value, int64_t steps, bool one_is_share) {
  const bool share = one_is_share ? value <= 1.0 : value < 1.0;
  const double count = share ? std::round(value * static_cast<double>(steps)) : std::round(value);
  return static_cast<int64_t>(std::min(count, static_cast<double>(steps)));
}

}  // namespace

int64_t warmup_steps(const ScheduleConfig& config, int64_t steps) {
  return resolved(config.warmup, steps, false);
}

double schedule_factor(const ScheduleConfig& c, int64_t step, int64_t steps) {
  const int64_t warmup = warmup_steps(c, steps);
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  const auto down = [&](double f) { return c.floor + (1.0 - c.floor) * f; };
  if (c.name == "constant") return 1.0;
  if (c.name == "wsd") {
    const int64_t decay = resolved(c.decay, steps, true), begin = steps - decay;
    if (step < begin) return 1.0;
    return down(1.0 - static_cast<double>(step - begin + 1) / static_cast<double>(decay));
  }
  const int64_t length = steps - 1 - warmup;
  const double t = length <= 0 ? 0.0 : std::min(1.0, static_cast<double>(step - warmup) / static_cast<double>(length));
  return c.name == "linear" ? down(1.0 - t) : down(0.5 * (1.0 + std::cos(std::numbers::pi * t)));
}

}  // namespace moiety
