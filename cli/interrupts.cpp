#include "interrupts.h"

#include <atomic>
#include <csignal>

namespace moiety::cli {
namespace {

std::atomic<int> interrupts{0};

extern "C" void on_training_interrupt(int signal) {
  if (interrupts.fetch_add(1) == 0) return;
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

}  // namespace

void note_interrupts() {
  interrupts = 0;
  std::signal(SIGINT, on_training_interrupt);
  std::signal(SIGTERM, on_training_interrupt);
}

bool interrupted() {
  return interrupts.load() > 0;
}

}  // namespace moiety::cli
