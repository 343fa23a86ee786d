#include "moiety/base/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <nlohmann/json.hpp>

namespace moiety {
namespace {

constexpr double bar_interval = 0.1, line_interval = 10, json_interval = 0.5;

std::atomic<ProgressMode> mode{default_progress_mode()};
std::mutex mutex;  // guards `current` and all drawing

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int terminal_width() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

std::string time_text(double seconds) {
  auto whole = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  if (whole >= 3600) return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

std::string count_text(double value) {
  if (value >= 1e9) return fmt::format("{:.2f}G", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.2f}M", value / 1e6);
  if (value >= 1e4) return fmt::format("{:.1f}k", value / 1e3);
  return value == std::floor(value) ? fmt::format("{:.0f}", value) : fmt::format("{:.1f}", value);
}

}  // namespace

ProgressMode default_progress_mode() {
  const char* term = std::getenv("TERM");
  bool dumb = term == nullptr || std::string(term) == "dumb";
  return isatty(STDERR_FILENO) != 0 && !dumb ? ProgressMode::Bar : ProgressMode::Lines;
}

void set_progress_mode(ProgressMode chosen) {
  mode = chosen;
}

struct Progress::State {
  std::string label, unit, note;
  int64_t total = 0;
  std::atomic<int64_t> done{0};
  Output output;
  double start = 0, shown = 0;
  bool drawn = false, finished = false;

  std::string numbers(double time) const {
    int64_t n = done;
    double seconds = std::max(time - start, 1e-9);
    double rate = static_cast<double>(n) / seconds;
    std::string text = count_text(static_cast<double>(n));
    if (total > 0) text += "/" + count_text(static_cast<double>(total));
    if (!unit.empty()) text += " " + unit + (total == 1 || (total == 0 && n == 1) ? "" : "s");
    text += fmt::format(", {}/s, {}", count_text(rate >= 10 ? std::round(rate) : rate), time_text(seconds));
    if (!finished && total > 0 && n > 0)
      text += fmt::format(", {} left", time_text(static_cast<double>(total - n) / rate));
    if (!note.empty()) text += ", " + note;
    return text;
  }

  double fraction() const {
    return total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0;
  }

  void draw(double time) {
    shown = time;
    std::ostream& out = *output.stream;
    if (output.mode == ProgressMode::Json) {
      nlohmann::json line{{"progress", label},
                          {"done", done.load()},
                          {"total", nullptr},
                          {"unit", unit},
                          {"seconds", std::round((time - start) * 1000) / 1000},
                          {"note", note},
                          {"finished", finished}};
      if (total > 0) line["total"] = total;
      out << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << std::endl;
    } else if (output.mode == ProgressMode::Lines) {
      std::string percent = total > 0 ? fmt::format("{:.0f}% ", std::floor(100 * fraction())) : "";
      out << label << ": " << percent << numbers(time) << std::endl;
    } else {
      std::string text = numbers(time), bar;
      int room = output.width - static_cast<int>(label.size() + text.size()) - 6;
      if (total > 0 && room >= 8) {
        int cells = std::min(room, 30), full = static_cast<int>(fraction() * cells);
        bar = fmt::format("[{:=<{}}{:<{}}] ", "", full, "", cells - full);
      }
      std::string line = label + " " + bar + text;
      out << "\r\x1b[K" << line.substr(0, static_cast<size_t>(std::max(output.width - 1, 10))) << std::flush;
      drawn = true;
    }
  }

  void update() {
    std::lock_guard lock(mutex);
    if (finished) return;
    double time = output.clock();
    double interval = output.mode == ProgressMode::Bar    ? bar_interval
                      : output.mode == ProgressMode::Json ? json_interval
                                                          : line_interval;
    if (time - shown >= interval) draw(time);
  }
};

namespace {
const void* current = nullptr;  // the State that is shown
std::function<void(bool)> redraw_current;
}  // namespace

Progress::Progress(std::string label, int64_t total, std::string unit)
    : Progress(std::move(label), total, std::move(unit), {&std::cerr, mode, now, terminal_width()}) {}

Progress::Progress(std::string label, int64_t total, std::string unit, Output output) {
  std::lock_guard lock(mutex);
  if (output.mode == ProgressMode::None || current != nullptr) return;
  state_ = std::make_unique<State>();
  state_->label = std::move(label);
  state_->unit = std::move(unit);
  state_->total = total;
  state_->output = std::move(output);
  state_->start = state_->shown = state_->output.clock();
  current = state_.get();
  redraw_current = [state = state_.get()](bool show) {
    if (!state->drawn) return;
    if (show) {
      state->draw(state->output.clock());
    } else {
      *state->output.stream << "\r\x1b[K" << std::flush;
    }
  };
}

Progress::~Progress() {
  finish();
}

void Progress::add(int64_t n) {
  if (!state_) return;
  state_->done += n;
  state_->update();
}

void Progress::set(int64_t done) {
  if (!state_) return;
  state_->done = done;
  state_->update();
}

void Progress::note(std::string text) {
  if (!state_) return;
  std::lock_guard lock(mutex);
  state_->note = std::move(text);
}

void Progress::finish() {
  if (!state_) return;
  std::lock_guard lock(mutex);
  if (state_->finished) return;
  state_->finished = true;
  double time = state_->output.clock();
  // A short job needs no line in a log.
  bool silent = state_->output.mode == ProgressMode::Lines && time - state_->start < 1;
  if (!silent) state_->draw(time);
  if (state_->output.mode == ProgressMode::Bar) *state_->output.stream << "\n" << std::flush;
  current = nullptr;
  redraw_current = nullptr;
}

void Progress::step_aside(const std::function<void()>& body) {
  std::lock_guard lock(mutex);
  if (redraw_current) redraw_current(false);
  body();
  if (redraw_current) redraw_current(true);
}

}  // namespace moiety
