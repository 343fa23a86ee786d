#pragma once
// NaN and infinity in weights: where the first one is.
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace moiety {

/// "holds nan at [3, 5]", of the first number of a tensor of this shape that is NaN or infinite; empty when all are
/// finite.
std::string not_finite(std::span<const float> values, const std::vector<int64_t>& shape);

}  // namespace moiety
