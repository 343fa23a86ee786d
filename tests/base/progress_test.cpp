#include "moiety/base/progress.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>
#include <vector>

#include "moiety/base/log.h"

using namespace moiety;

namespace {

struct Fixture {
  std::ostringstream text;
  double time = 100;
  Progress::Output output(ProgressMode mode) {
    return {&text, mode, [this] { return time; }, 80};
  }
};

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; ++at) ++n;
  return n;
}

}  // namespace

TEST(Progress, BarShowsRateAndTimeLeft) {
  Fixture f;
  {
    Progress progress("work", 100, "token", f.output(ProgressMode::Bar));
    f.time += 10;
    progress.note("loss 2");
    progress.set(50);
  }
  EXPECT_NE(f.text.str().find("50/100 tokens, 5/s, 0:10, 0:10 left, loss 2"), std::string::npos) << f.text.str();
  EXPECT_NE(f.text.str().find("work ["), std::string::npos) << f.text.str();
  EXPECT_EQ(f.text.str().back(), '\n');
}

TEST(Progress, LinesAreSparse) {
  Fixture f;
  {
    Progress progress("work", 1000, "", f.output(ProgressMode::Lines));
    for (int i = 0; i < 1000; ++i) {
      f.time += 0.05;
      progress.add();
    }
  }
  EXPECT_GE(count(f.text.str(), "\n"), 4u);
  EXPECT_LE(count(f.text.str(), "\n"), 6u);
  EXPECT_EQ(f.text.str().find('\r'), std::string::npos);
  EXPECT_NE(f.text.str().find("work: 100% 1000/1000"), std::string::npos) << f.text.str();
}

TEST(Progress, ShortJobsLeaveNoLine) {
  Fixture f;
  { Progress progress("work", 2, "", f.output(ProgressMode::Lines)); }
  EXPECT_EQ(f.text.str(), "");
}

TEST(Progress, JsonLines) {
  Fixture f;
  {
    Progress progress("w\xff", 0, "row", f.output(ProgressMode::Json));
    f.time += 2;
    progress.add(7);
  }
  std::istringstream lines(f.text.str());
  std::vector<nlohmann::json> values;
  for (std::string line; std::getline(lines, line);) values.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(values.size(), 2u);
  EXPECT_EQ(values[0]["done"], 7);
  EXPECT_TRUE(values[0]["total"].is_null());
  EXPECT_EQ(values[0]["seconds"], 2.0);
  EXPECT_EQ(values[1]["finished"], true);
}

TEST(Progress, QuietAndNestedShowNothing) {
  Fixture f, inner;
  {
    Progress progress("quiet", 1, "", f.output(ProgressMode::None));
    f.time += 100;
    progress.add();
  }
  EXPECT_EQ(f.text.str(), "");
  {
    Progress outer("outer", 1, "", f.output(ProgressMode::Json));
    Progress nested("nested", 1, "", inner.output(ProgressMode::Json));
    nested.add();
  }
  EXPECT_EQ(inner.text.str(), "");
  EXPECT_EQ(count(f.text.str(), "outer"), 1u);
}

TEST(Progress, ThreadsMayUpdate) {
  Fixture f;
  {
    Progress progress("work", 4000, "", f.output(ProgressMode::Json));
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 1000; ++i) progress.add();
      });
    }
    for (auto& thread : threads) thread.join();
  }
  EXPECT_NE(f.text.str().find("\"done\":4000"), std::string::npos) << f.text.str();
}

TEST(Log, BarStepsAside) {
  Fixture f;
  {
    Progress progress("work", 10, "", f.output(ProgressMode::Bar));
    f.time += 1;
    progress.add();
    size_t before = count(f.text.str(), "\x1b[K");
    log::info("a remark");
    EXPECT_EQ(count(f.text.str(), "\x1b[K"), before + 2);  // cleared, drawn again
  }
}
