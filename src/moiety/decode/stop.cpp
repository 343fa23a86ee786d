#include "moiety/decode/stop.h"

#include <algorithm>
#include <utility>

#include "moiety/base/error.h"

namespace moiety {

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_)
    check(!stop.empty(), "a stop string is empty: it must have at least one character");
}

std::string StopStrings::push(std::string_view text) {
  if (stopped()) return {};
  held_ += text;
  size_t first_end = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    const size_t end = at + stop.size();
    if (end < first_end || (end == first_end && stop.size() > found_.size())) {
      first_end = end;
      found_ = stop;
    }
  }
  if (stopped()) {
    std::string shown = held_.substr(0, first_end - found_.size());
    held_.clear();
    return shown;
  }
  // Hold back the longest end of the text that a stop string begins with.
  size_t hold = 0;
  for (const std::string& stop : stops_)
    for (size_t size = std::min(stop.size() - 1, held_.size()); size > hold; --size)
      if (std::string_view(held_).ends_with(std::string_view(stop).substr(0, size))) hold = size;
  std::string shown = held_.substr(0, held_.size() - hold);
  held_.erase(0, held_.size() - hold);
  return shown;
}

std::string StopStrings::flush() {
  return std::exchange(held_, {});
}

}  // namespace moiety
