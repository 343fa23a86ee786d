#pragma once
// Records which experts a model takes on a text.
#include <functional>
#include <vector>

#include "moiety/models/model.h"
#include "moiety/offload/traces.h"

namespace moiety {

/// Runs the ids through the model in windows of `context` tokens that do not overlap, each a sequence of its own (`bos`
/// in front when it is not negative), and returns what every router of a mixture chose; gates are divided by their sum.
/// Error: no expert layers; layers that choose different numbers of experts.
ExpertTraces record_experts(CausalModel& model, const std::vector<int64_t>& ids, int64_t bos, int64_t context,
                            const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace moiety
