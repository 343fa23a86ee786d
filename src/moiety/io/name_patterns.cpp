#include "moiety/io/name_patterns.h"

#include <fmt/format.h>

#include <algorithm>

#include "moiety/base/text.h"

namespace moiety {

NamePatterns::NamePatterns(const std::vector<std::string>& patterns, const std::string& where) {
  for (const auto& p : patterns) all_.emplace_back("\\A(?:" + p + ")", fmt::format("{} {}", where, shown(p)));
}

bool NamePatterns::match(const std::string& name) const {
  return std::any_of(all_.begin(), all_.end(), [&](const Regex& regex) {
    size_t begin = 0, end = 0;
    return Regex::Matches(regex, name).next(begin, end);
  });
}

}  // namespace moiety
