#pragma once
// Progress of a long job, on stderr: a bar with rate and time left on a terminal, sparse lines in a pipe, JSON lines
// with --json, nothing with --quiet.
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>

namespace moiety {

enum class ProgressMode { None, Bar, Lines, Json };

/// Bar when stderr is a terminal, else Lines.
ProgressMode default_progress_mode();
/// What new bars use; the command line sets it once.
void set_progress_mode(ProgressMode mode);

/// One job at a time: a Progress made while another is alive shows nothing. add, set and note may be called from any
/// thread.
///   Progress progress("evaluate", tokens, "token");
///   for (...) progress.add(n);
/// JSON lines: {"progress": label, "done": n, "total": n or null, "unit": unit, "seconds": s, "note": text, "finished":
/// bool}.
class Progress {
 public:
  /// For tests: where to write, how, and what time it is (seconds).
  struct Output {
    std::ostream* stream;
    ProgressMode mode;
    std::function<double()> clock;
    int width = 80;
  };

  /// `total` 0: unknown. `unit` is singular: "token", "tensor".
  Progress(std::string label, int64_t total, std::string unit = "");
  Progress(std::string label, int64_t total, std::string unit, Output output);
  ~Progress();  ///< finishes
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void add(int64_t n = 1);
  void set(int64_t done);
  void note(std::string text);  ///< shown behind the numbers, e.g. "loss 3.21"
  void finish();

  /// Clears the bar that is on the terminal, runs `body`, and draws the bar again.
  static void step_aside(const std::function<void()>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moiety
