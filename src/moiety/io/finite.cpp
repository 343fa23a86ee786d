#include "moiety/io/finite.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace moiety {

std::string not_finite(std::span<const float> values, const std::vector<int64_t>& shape) {
  const auto bad = std::find_if(values.begin(), values.end(), [](float v) { return !std::isfinite(v); });
  if (bad == values.end()) return "";
  auto at = static_cast<int64_t>(bad - values.begin());
  std::vector<int64_t> index(shape.size());
  for (size_t i = shape.size(); i-- > 0; at /= shape[i]) index[i] = at % shape[i];
  const char* what = std::isnan(*bad) ? "nan" : *bad > 0.f ? "inf" : "-inf";
  return fmt::format("holds {} at [{}]", what, fmt::join(index, ", "));
}

}  // namespace moiety
