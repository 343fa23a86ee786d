#include "moiety/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "moiety/base/progress.h"

namespace moiety::log {
namespace {

spdlog::logger& logger() {
  static auto made = [] {
    auto logger = spdlog::stderr_color_mt("moiety");
    logger->set_pattern("%^%l:%$ %v");
    logger->set_level(spdlog::level::info);
    return logger;
  }();
  return *made;
}

}  // namespace

void set_level(Level least) {
  constexpr spdlog::level::level_enum levels[] = {spdlog::level::debug, spdlog::level::info, spdlog::level::warn,
                                                  spdlog::level::err};
  logger().set_level(levels[static_cast<int>(least)]);
}

Level level() {
  auto now = logger().level();
  return now <= spdlog::level::debug  ? Level::Debug
         : now == spdlog::level::info ? Level::Info
         : now == spdlog::level::warn ? Level::Warn
                                      : Level::Error;
}

void write(Level level, const std::string& line) {
  Progress::step_aside([&] {
    constexpr spdlog::level::level_enum levels[] = {spdlog::level::debug, spdlog::level::info, spdlog::level::warn,
                                                    spdlog::level::err};
    logger().log(levels[static_cast<int>(level)], "{}", line);
  });
}

}  // namespace moiety::log
