#pragma once
// Lines of a user: with editing and a history file on a terminal, plain ones from a pipe.
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

namespace moiety::cli {

class LineReader {
 public:
  /// `history`: where lines of a terminal are kept between runs; empty: nowhere.
  explicit LineReader(std::filesystem::path history);
  ~LineReader();

  bool interactive() const { return interactive_; }
  /// The next line without its end; nothing at the end of input. `interrupted` is set when the user gave up the line
  /// (Ctrl-C).
  std::optional<std::string> read(const std::string& prompt, bool& interrupted);

 private:
  struct Editor;
  bool interactive_;
  std::unique_ptr<Editor> editor_;
};

/// $XDG_CACHE_HOME/moiety or ~/.cache/moiety; empty when neither is known.
std::filesystem::path cache_folder();

/// While it lives, Ctrl-C sets a flag and ends no program.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  static bool pressed();
  static void clear();
};

}  // namespace moiety::cli
