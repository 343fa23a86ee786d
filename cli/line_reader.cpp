#include "line_reader.h"

#include <histedit.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <iostream>

namespace moiety::cli {
namespace {

volatile sig_atomic_t interrupt_pressed = 0;
struct sigaction before_interrupt;

extern "C" void on_interrupt(int) {
  interrupt_pressed = 1;
}

}  // namespace

InterruptGuard::InterruptGuard() {
  struct sigaction action {};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  action.sa_flags = 0;  // reads return with EINTR
  sigaction(SIGINT, &action, &before_interrupt);
}

InterruptGuard::~InterruptGuard() {
  sigaction(SIGINT, &before_interrupt, nullptr);
}

bool InterruptGuard::pressed() {
  return interrupt_pressed != 0;
}

void InterruptGuard::clear() {
  interrupt_pressed = 0;
}

std::filesystem::path cache_folder() {
  if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg && *xdg == '/') return std::filesystem::path(xdg) / "moiety";
  if (const char* home = std::getenv("HOME"); home && *home == '/')
    return std::filesystem::path(home) / ".cache" / "moiety";
  return {};
}

struct LineReader::Editor {
  EditLine* line = nullptr;
  History* history = nullptr;
  std::filesystem::path file;
  std::string prompt;

  static char* show_prompt(EditLine* line) {
    void* self = nullptr;
    el_get(line, EL_CLIENTDATA, &self);
    return static_cast<Editor*>(self)->prompt.data();
  }

  explicit Editor(std::filesystem::path path) : file(std::move(path)) {
    std::setlocale(LC_CTYPE, "");
    line = el_init("moiety", stdin, stdout, stderr);
    history = history_init();
    HistEvent event;
    ::history(history, &event, H_SETSIZE, 1000);
    ::history(history, &event, H_SETUNIQUE, 1);
    el_set(line, EL_CLIENTDATA, this);
    el_set(line, EL_PROMPT, show_prompt);
    el_set(line, EL_EDITOR, "emacs");
    el_set(line, EL_HIST, ::history, history);
    el_set(line, EL_BIND, "^R", "em-inc-search-prev", nullptr);
    el_source(line, nullptr);
    if (!file.empty()) {
      std::error_code error;
      std::filesystem::create_directories(file.parent_path(), error);
      ::history(history, &event, H_LOAD, file.c_str());
    }
  }
  ~Editor() {
    HistEvent event;
    if (!file.empty()) {
      // What people say to a model is nobody else's business.
      const mode_t before = umask(077);
      ::history(history, &event, H_SAVE, file.c_str());
      umask(before);
    }
    history_end(history);
    el_end(line);
  }
};

LineReader::LineReader(std::filesystem::path history) : interactive_(isatty(STDIN_FILENO) && isatty(STDOUT_FILENO)) {
  if (interactive_) editor_ = std::make_unique<Editor>(std::move(history));
}

LineReader::~LineReader() = default;

std::optional<std::string> LineReader::read(const std::string& prompt, bool& interrupted) {
  interrupted = false;
  if (!editor_) {
    std::string line;
    if (!std::getline(std::cin, line)) return std::nullopt;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    return line;
  }
  editor_->prompt = prompt;
  InterruptGuard::clear();
  int count = 0;
  errno = 0;
  const char* text = el_gets(editor_->line, &count);
  if (InterruptGuard::pressed() || (count < 0 && errno == EINTR)) {
    InterruptGuard::clear();
    el_reset(editor_->line);
    interrupted = true;
    return std::string();
  }
  if (!text || count <= 0) return std::nullopt;
  std::string line(text, static_cast<size_t>(count));
  while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
  if (!line.empty()) {
    HistEvent event;
    ::history(editor_->history, &event, H_ENTER, line.c_str());
  }
  return line;
}

}  // namespace moiety::cli
