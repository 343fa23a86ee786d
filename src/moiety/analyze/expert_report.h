#pragma once
// What the experts of a mixture are worth on a text and how much they resemble each other: load, gates, what they
// write, alike routers and alike weights, and how many each layer could do without.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/compress/calibration.h"
#include "moiety/compress/expert_layers.h"

namespace moiety {

/// Cosines between the flattened matrices of a layer's experts, [E, E] f32; one layer in memory, as bf16.
torch::Tensor weight_similarity(const ExpertLayers& layers, size_t layer);

/// {tokens, layers: [...], suggestions: [...], summary}. A layer: `load`, `share`, `importance`, `saliency` (see
/// LayerCalibration) by expert, `alike_routers` (cosines of columns of raw logits) and, where `weights` is true,
/// `alike_weights`, [E, E] each, and the pair of experts that is most alike. A suggestion: `share` of all experts that
/// stay, `keep` by layer, and `saliency_kept`, the share of what all experts together write that stays.
nlohmann::json expert_report(const ExpertLayers& layers, const Calibration& calibration, bool weights);

/// A self-contained page over it (and `model`, if the caller added it).
std::string expert_page(const nlohmann::json& report);

}  // namespace moiety
