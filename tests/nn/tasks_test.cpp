#include "moiety/nn/tasks.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <set>
#include <stdexcept>
#include <thread>

#include "threads.h"

namespace moiety {
namespace {

TEST(Tasks, RunOnAllThreads) {
  const test::Threads two(2);
  std::mutex lock;
  std::condition_variable started;
  int running = 0;
  // Each of the two waits until the other has begun, which one thread alone never sees.
  run_tasks(2, [&](int64_t) {
    std::unique_lock hold(lock);
    ++running;
    started.notify_all();
    started.wait_for(hold, std::chrono::seconds(10), [&] { return running == 2; });
    EXPECT_EQ(running, 2);
  });
}

TEST(Tasks, EveryOneRunsOnceAndAnErrorComesOut) {
  const test::Threads two(2);
  std::mutex lock;
  std::multiset<int64_t> ran;
  EXPECT_THROW(run_tasks(50,
                         [&](int64_t i) {
                           const std::lock_guard hold(lock);
                           ran.insert(i);
                           if (i == 7) throw std::runtime_error("seven");
                         }),
               std::runtime_error);
  EXPECT_EQ(ran.size(), 50u);
  EXPECT_EQ(std::set<int64_t>(ran.begin(), ran.end()).size(), 50u);
}

}  // namespace
}  // namespace moiety
