#pragma once
// What transformers assumes for keys that a config.json leaves out.
#include <nlohmann/json.hpp>

namespace moiety {

/// The text model's config with the defaults of its model_type put in for missing keys (an explicit null stays null).
/// Only sizes, counts, windows, scales and routing rules are filled in. Unknown model types come back as they are.
nlohmann::json with_defaults(const nlohmann::json& config);

}  // namespace moiety
