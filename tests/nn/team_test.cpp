#include "moiety/nn/team.h"
#include "moiety/nn/parallel.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <vector>

#include "threads.h"

namespace moiety {
namespace {

TEST(Team, WorkIsDoneOnceAndSeenBehindAWait) {
  for (const int threads : {1, 2, 5}) {
    const test::Threads use(threads);
    constexpr int64_t kPhases = 40, kItems = 23;
    std::vector<std::vector<int64_t>> made(kPhases, std::vector<int64_t>(kItems, 0));
    Team team(kPhases);
    std::atomic<int64_t> wrong{0}, members{0};
    team.run([&](Team::Member& m) {
      ++members;
      for (int64_t phase = 0; phase < kPhases; ++phase) {
        for (int64_t i = 0, end = 0; m.take(kItems, 4, i, end);)
          for (; i < end; ++i) {
            // Every item reads what all items of the phase before are.
            int64_t sum = 1;
            if (phase > 0)
              for (const int64_t v : made[phase - 1]) sum += v;
            made[phase][i] += sum % 1009;
          }
        m.next();
        m.wait();
      }
      int64_t sum = 0;
      for (const int64_t v : made.back()) sum += v;
      if (sum != kItems * made.back()[0]) ++wrong;
    });
    EXPECT_EQ(members, threads);
    EXPECT_EQ(wrong, 0);
    int64_t want = 1;
    for (int64_t phase = 0; phase < kPhases; ++phase, want = (want * kItems + 1) % 1009)
      for (const int64_t v : made[phase]) EXPECT_EQ(v, want) << phase;
  }
}

TEST(Team, AnErrorOfOneMemberEndsTheOthers) {
  const test::Threads use(3);
  Team team(1);
  EXPECT_THROW(team.run([](Team::Member& m) {
    m.wait();
    if (m.index() == 1) throw std::runtime_error("one");
    m.wait();  // would wait for ever
  }),
               std::runtime_error);
}

TEST(Team, InsideAParallelRegionItIsOneThread) {
  const test::Threads use(2);
  std::atomic<int64_t> members{0};
  parallel_for(0, 2, 1, [&](int64_t, int64_t) {
    Team team(1);
    team.run([&](Team::Member& m) { members += m.count(); });
  });
  EXPECT_EQ(members, 2);
}

}  // namespace
}  // namespace moiety
