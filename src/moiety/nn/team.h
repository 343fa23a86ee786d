#pragma once
// One function on all threads at once, in step: many short phases of work, each of which needs what the phase before
// wrote. A parallel region for every phase would cost more than the phase.
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

namespace moiety {

class Team {
 public:
  class Member {
   public:
    int64_t index() const { return index_; }
    int64_t count() const { return count_; }
    /// Waits until every member is here; what they wrote before is visible behind it.
    void wait();
    /// The next items [first, last) of `total` that nobody has taken, about `piece` of them; false: none are left.
    /// Every member asks for the same work until it is gone, and for `next` work only behind a wait().
    bool take(int64_t total, int64_t piece, int64_t& first, int64_t& last);
    /// Goes on to other work.
    void next() { ++work_; }

   private:
    friend class Team;
    Member(Team& team, int64_t index, int64_t count) : team_(team), index_(index), count_(count) {}
    Team& team_;
    int64_t index_, count_, work_ = 0;
    uint32_t step_ = 0;
  };

  /// Room for `works` pieces of work, see Member::next.
  explicit Team(int64_t works);
  /// Runs `body` once on every thread, with at::get_num_threads() of them (one inside a parallel region). An exception
  /// of a member ends the others at their next wait() and is thrown here. Once a team.
  void run(const std::function<void(Member&)>& body);

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };
  void fail(std::exception_ptr what);

  std::unique_ptr<Counter[]> counters_;
  int64_t works_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> step_{0};
  std::atomic<bool> failed_{false};
  std::mutex lock_;
  std::exception_ptr failure_;
};

}  // namespace moiety
