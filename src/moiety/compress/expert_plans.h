#pragma once
// DERN, M-SMoE and UNCURL over a whole checkpoint: what with_experts needs, out of a calibration. Layers are looked at
// one after another; new experts are made when they are written.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "moiety/compress/calibration.h"
#include "moiety/compress/dern.h"
#include "moiety/compress/expert_layers.h"
#include "moiety/compress/expert_selection.h"
#include "moiety/compress/mc_smoe.h"
#include "moiety/compress/uncurl.h"

namespace moiety {

struct PlannedExperts {
  std::vector<NewExperts> layers;                   ///< those that change
  nlohmann::json report = nlohmann::json::array();  ///< an object for every layer with experts
};

// All: Error for a layer whose experts are shared by rows of the router already, which no token of the calibration has
// reached, or that cannot be computed with.

/// DERN with `keep` experts a layer, the same number everywhere; `protect` are retained. Reports importance, retained,
/// moved and lost neurons, and how many best cosines lie in each tenth of [0, 1] (below 0: in the first). Error:
/// `keep.across`, a width other than that of the experts.
PlannedExperts plan_dern(const ExpertLayers& layers, const Calibration& calibration, const KeepRule& keep,
                         const ProtectedExperts& protect, const DernConfig& config);

/// UNCURL; experts of `protect` stay alone. Reports usage, clusters and labels. Error: fewer tokens than experts.
PlannedExperts plan_uncurl(const ExpertLayers& layers, const Calibration& calibration, const ProtectedExperts& protect,
                           const UncurlConfig& config);

/// M-SMoE; `config.layers` are blocks. Reports usage, groups and labels. Error: layers of unequal numbers of experts,
/// fewer tokens than experts; see group_experts.
PlannedExperts plan_m_smoe(const ExpertLayers& layers, const Calibration& calibration, const MSmoeConfig& config);

}  // namespace moiety
