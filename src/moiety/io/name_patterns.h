#pragma once
// Which tensors a user means: regular expressions that match from the start of a name.
#include <string>
#include <vector>

#include "moiety/io/regex.h"

namespace moiety {

class NamePatterns {
 public:
  /// Throws Error naming `where` when one is no regular expression.
  NamePatterns(const std::vector<std::string>& patterns, const std::string& where);
  /// Whether one of them matches at the start of `name`. Throws Error when that takes too many steps.
  bool match(const std::string& name) const;

 private:
  std::vector<Regex> all_;
};

}  // namespace moiety
