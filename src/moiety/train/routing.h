#pragma once
// What a run says about the mixtures of its model: losses, capacity, noise, the bias on the choice.
#include <nlohmann/json.hpp>

#include "moiety/models/model.h"
#include "moiety/train/config.h"

namespace moiety {

/// Marks in a model's config that routers get a bias on their choice, when the run wants one and the family has none.
void prepare_routing(nlohmann::json& config, const RoutingConfig& routing);

/// Applies the run's settings to every mixture of the model but those of parts that have a rule of their own. What
/// `routing` does not say stays as the model's config has it. Error: a setting that no mixture of the model can take; a
/// balance without a weight.
void apply_routing(CausalModel& model, const RoutingConfig& routing);

}  // namespace moiety
