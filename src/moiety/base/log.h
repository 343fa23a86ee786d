#pragma once
// Remarks for the user, one line each on stderr, never mixed into a result. --quiet shows errors only, --verbose also
// debug.
#include <fmt/format.h>

#include <string>
#include <utility>

namespace moiety::log {

enum class Level { Debug, Info, Warn, Error };

void set_level(Level least);
Level level();
/// Thread-safe; a progress bar on the terminal steps aside.
void write(Level level, const std::string& line);

template <class... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  if (level() <= Level::Debug) write(Level::Debug, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  if (level() <= Level::Info) write(Level::Info, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  if (level() <= Level::Warn) write(Level::Warn, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::Error, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace moiety::log
