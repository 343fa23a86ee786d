#include "moiety/nn/tasks.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>
#include <condition_variable>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "moiety/kernels/cpu.h"
#include "moiety/nn/products.h"
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

// Machines without kernels of our own multiply by torch, whose sums depend on the number of threads.
TEST(Tasks, AProductHasTheSameBitsInATaskAloneAndBesideOthers) {
  torch::manual_seed(3);
  const test::Threads two(2);
  const Isa before = isa();
  set_isa(Isa::Portable);
  const auto w = torch::randn({256, 256});
  for (int64_t n = 1; n <= 20; ++n) {
    const auto x = torch::randn({n, 256});
    std::vector<torch::Tensor> out;
    for (int i = 0; i < 5; ++i) out.push_back(torch::empty({n, 256}));
    const auto task = [&](int64_t i) { multiply(out[static_cast<size_t>(i)], {x}, {w, true}); };
    run_tasks(4, task);
    run_tasks(1, [&](int64_t) { task(4); });
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(torch::equal(out[static_cast<size_t>(i)], out[4])) << n;
  }
  set_isa(before);
}

}  // namespace
}  // namespace moiety
