#include "moiety/nn/team.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <thread>

#include "moiety/base/error.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

// Thrown in members whose team has failed; never seen outside.
struct Abandoned {};

// How often a member looks before it lets another thread have its core.
constexpr int kLooks = 20'000;

inline void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Team::Team(int64_t works) : counters_(new Counter[static_cast<size_t>(works)]), works_(works) {}

void Team::fail(std::exception_ptr what) {
  const std::lock_guard<std::mutex> guard(lock_);
  if (!failure_) failure_ = std::move(what);
  failed_.store(true, std::memory_order_release);
}

void Team::Member::wait() {
  ++step_;
  if (count_ == 1) return;
  if (team_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    team_.arrived_.store(0, std::memory_order_relaxed);
    team_.step_.store(step_, std::memory_order_release);
    return;
  }
  for (int looks = 0; team_.step_.load(std::memory_order_acquire) != step_; ++looks) {
    if (team_.failed_.load(std::memory_order_relaxed)) throw Abandoned();
    if (looks < kLooks)
      rest();
    else
      std::this_thread::yield();
  }
}

bool Team::Member::take(int64_t total, int64_t piece, int64_t& first, int64_t& last) {
  check(work_ < team_.works_, "a team has room for {} pieces of work", team_.works_);
  piece = std::max<int64_t>(piece, 1);
  first = team_.counters_[static_cast<size_t>(work_)].taken.fetch_add(piece, std::memory_order_relaxed);
  last = std::min(total, first + piece);
  return first < total;
}

void Team::run(const std::function<void(Member&)>& body) {
  parallel::on_threads(parallel::inside() ? 1 : at::get_num_threads(), [&](int index, int count) {
    Member member(*this, index, count);
    try {
      body(member);
    } catch (const Abandoned&) {
      // Another member's failure is the one to report.
    } catch (...) {
      fail(std::current_exception());
    }
  });
  if (failure_) std::rethrow_exception(failure_);
}

}  // namespace moiety
