#pragma once
// Stop strings over a stream of text that comes in pieces: no byte that may belong to a stop string is let through
// before it is known that it does not.
#include <string>
#include <string_view>
#include <vector>

namespace moiety {

class StopStrings {
 public:
  /// Throws Error when one of `stops` is empty (it would stop before anything).
  explicit StopStrings(std::vector<std::string> stops = {});

  /// Adds `text` and returns what may be shown now. When a stop string is complete, that is all before it, and found()
  /// is set. The first to be complete counts, the longest of those that end together, however the text was cut into
  /// pieces.
  std::string push(std::string_view text);
  /// Returns what was held back: the text ended without a stop string.
  std::string flush();
  bool stopped() const { return !found_.empty(); }
  const std::string& found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  std::string found_;
};

}  // namespace moiety
