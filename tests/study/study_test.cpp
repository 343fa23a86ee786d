#include "moiety/study/study.h"

#include <gtest/gtest.h>

#include <atomic>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/registry.h"
#include "moiety/study/runner.h"

namespace moiety {
namespace {

using nlohmann::json;

StudyTable table(const std::vector<double>& arm, const std::vector<double>& base) {
  StudyTable t;
  for (size_t i = 0; i < arm.size(); ++i) t.add("arm", static_cast<int64_t>(i), {{"loss", arm[i]}});
  for (size_t i = 0; i < base.size(); ++i) t.add("base", static_cast<int64_t>(i), {{"loss", base[i]}});
  return t;
}

TEST(Study, DifferencesArePairedBySeed) {
  const auto d = table({1.0, 1.9, 3.0}, {2.0, 2.0, 4.0}).difference("arm", "base", "loss");
  ASSERT_EQ(d.percent.size(), 3u);
  EXPECT_NEAR(d.percent[0], -50.0, 1e-9);
  EXPECT_NEAR(d.percent[1], -5.0, 1e-9);
  EXPECT_NEAR(d.mean, -80.0 / 3, 1e-9);
}

TEST(Study, AClearDifferenceNeedsEverySeedAndMoreThanTheNoise) {
  EXPECT_TRUE(table({0.98, 0.97, 0.985}, {1, 1, 1}).difference("arm", "base", "loss").lower());
  EXPECT_FALSE(table({0.98, 0.97, 1.001}, {1, 1, 1}).difference("arm", "base", "loss").lower());  // one seed disagrees
  EXPECT_FALSE(table({0.999, 0.999, 0.9}, {1, 1, 1}).difference("arm", "base", "loss").lower());  // noise
  EXPECT_FALSE(table({0.9}, {1}).difference("arm", "base", "loss").lower());                      // one seed only
  EXPECT_FALSE(table({0.98, 0.97, 0.985}, {1, 1, 1}).difference("arm", "base", "loss").lower(3.0));
  EXPECT_TRUE(table({1.02, 1.03, 1.02}, {1, 1, 1}).difference("arm", "base", "loss").higher());
}

TEST(Study, SpreadIsTheSampleDeviationAndMissingIsNoNumber) {
  const auto t = table({1, 2, 3}, {});
  EXPECT_NEAR(t.spread("arm", "loss"), 1.0, 1e-12);
  EXPECT_TRUE(std::isnan(t.mean("arm", "other")));
  EXPECT_TRUE(t.difference("arm", "base", "loss").percent.empty());
}

Study counted(std::atomic<int>& calls) {
  Study s;
  s.slug = "counted";
  s.title = "a study that counts";
  s.arms = {{"one", "first"}, {"two", "second"}, {"long", "full budget only", false}};
  s.metrics = {{"value", "value", 2}};
  s.full = {.seeds = 3, .steps = 10};
  s.brief = {.seeds = 1, .steps = 5};
  s.measure = [&calls](const StudyCell& cell) -> json {
    ++calls;
    EXPECT_TRUE(std::filesystem::is_empty(cell.folder));
    const auto shared = cell.once("base", [&](const auto& folder) { write_file(folder / "made", cell.arm); });
    return {{"value", static_cast<double>(cell.seed + (cell.arm == "two" ? 10 : 0))},
            {"maker", read_text(shared / "made")}};
  };
  s.judge = [](const StudyTable& t) {
    return StudyOutcome{
        t.mean("two", "value") > t.mean("one", "value") ? StudyOutcome::reproduced : StudyOutcome::not_reproduced,
        "two is above one", "10 more"};
  };
  return s;
}

const RegisterStudy registered("test-study", "A title", "one line", [] {
  Study s;
  s.brief = {.seeds = 1, .steps = 5};
  s.settings = []() -> json { fail("asked for too early"); };
  return s;
});

TEST(Study, RunsEveryCellOnceAndKeepsIt) {
  const TemporaryFolder folder("moiety-study-test");
  std::atomic<int> calls = 0;
  const Study s = counted(calls);
  StudyOptions o{.budget = "full", .work = folder.path()};
  const json r = run_study(s, o);
  EXPECT_EQ(calls, 9);
  EXPECT_EQ(r["verdict"], "reproduced");
  EXPECT_EQ(r["arms"][1]["values"]["value"]["mean"], 11.0);
  EXPECT_EQ(r["arms"][1]["values"]["value"]["seeds"], 3);
  // What cells share was made by the first of them alone.
  for (const auto& arm : r["arms"])
    for (const auto& cell : arm["cells"]) EXPECT_EQ(cell["maker"], "one");
  run_study(s, o);
  EXPECT_EQ(calls, 9);
  o.seeds = 4;
  run_study(s, o);
  EXPECT_EQ(calls, 12);
  o.restart = true;
  o.seeds = 1;
  run_study(s, o);
  EXPECT_EQ(calls, 15);
}

TEST(Study, TheShortBudgetLeavesArmsOutAndOtherSettingsMeasureAnew) {
  const TemporaryFolder folder("moiety-study-test");
  std::atomic<int> calls = 0;
  Study s = counted(calls);
  const StudyOptions o{.budget = "short", .work = folder.path()};
  const json r = run_study(s, o);
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(r["arms"].size(), 2u);
  s.settings = [] { return json{{"width", 3}}; };
  run_study(s, o);
  EXPECT_EQ(calls, 4);
}

TEST(Study, AFailedCellLosesNothing) {
  const TemporaryFolder folder("moiety-study-test");
  std::atomic<int> calls = 0;
  Study s = counted(calls);
  const auto measure = s.measure;
  bool broken = true;
  s.measure = [&](const StudyCell& cell) -> json {
    if (broken && cell.arm == "two") fail("out of luck");
    return measure(cell);
  };
  const StudyOptions o{.budget = "short", .work = folder.path()};
  EXPECT_THROW(run_study(s, o), Error);
  broken = false;
  run_study(s, o);
  EXPECT_EQ(calls, 2);
}

TEST(Study, BadRequestsAreNamed) {
  std::atomic<int> calls = 0;
  const Study s = counted(calls);
  const auto message = [](auto body) -> std::string {
    try {
      body();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_NE(message([&] { run_study(s, {.budget = "large"}); }).find("short or full"), std::string::npos);
  EXPECT_NE(message([&] { measure_cell(s, {.budget = "short"}, "three", 0); }).find("no arm three"), std::string::npos);
}

TEST(Study, LookingAtStudiesPreparesNothing) {
  // Settings may read the text that studies learn, which need not be there to list them.
  const Study s = get_study("test-study");
  EXPECT_EQ(s.slug, "test-study");
  EXPECT_EQ(s.title, "A title");
  EXPECT_EQ(study_budget(s, {.budget = "short"}).steps, 5);
  EXPECT_THROW(s.settings(), Error);
}

TEST(Study, ThePageHoldsTheResult) {
  const TemporaryFolder folder("moiety-study-test");
  std::atomic<int> calls = 0;
  const json r = run_study(counted(calls), {.budget = "short", .work = folder.path()});
  const std::string page = study_html(r);
  EXPECT_NE(page.find("a study that counts"), std::string::npos);
  EXPECT_EQ(page.find("{{data}}"), std::string::npos);
}

}  // namespace
}  // namespace moiety
