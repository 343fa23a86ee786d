#pragma once
// Many products of unequal size on all threads: a thread takes the next task when it is through with one, and the
// products inside a task run on that thread alone. Many small products one after another, each on all threads, would
// wait for each other at every end.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "moiety/nn/parallel.h"

namespace moiety {

/// So many that the last one to end lets the other threads wait for little.
inline int64_t many_tasks() {
  return 4 * at::get_num_threads();
}

/// Runs task(0) ... task(count - 1) in this order of starting. The caller's autograd does not see what tasks do. An
/// exception is thrown here when all have run.
template <class Task>
void run_tasks(int64_t count, Task task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex lock;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = next++; i < count; i = next++) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> guard(lock);
        if (!failure) failure = std::current_exception();
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

/// Counts tasks that others wait for. A task that waits must come behind those it waits for: they run already then.
class Countdown {
 public:
  void expect(int64_t count) { left_ = count; }
  void wait() const {
    for (int64_t v = left_; v > 0; v = left_) left_.wait(v);
  }
  /// Counts one task when it goes out of scope, however the task ends.
  class Done {
   public:
    explicit Done(Countdown& c) : c_(c) {}
    ~Done() {
      if (--c_.left_ == 0) c_.left_.notify_all();
    }
    Done(const Done&) = delete;
    Done& operator=(const Done&) = delete;

   private:
    Countdown& c_;
  };

 private:
  std::atomic<int64_t> left_{0};
};

}  // namespace moiety
