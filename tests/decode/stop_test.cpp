#include "moiety/decode/stop.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "moiety/base/error.h"

namespace moiety {
namespace {

TEST(StopStrings, HoldsBackWhatMayBeAStopString) {
  StopStrings stops({"END", "\n\n"});
  EXPECT_EQ(stops.push("say E"), "say ");
  EXPECT_EQ(stops.push("N"), "");
  EXPECT_EQ(stops.push("O"), "ENO");
  EXPECT_EQ(stops.push("\n"), "");
  EXPECT_EQ(stops.push("x\n"), "\nx");
  EXPECT_FALSE(stops.stopped());
  EXPECT_EQ(stops.push("\nrest"), "");
  EXPECT_TRUE(stops.stopped());
  EXPECT_EQ(stops.found(), "\n\n");
  EXPECT_EQ(stops.push("more"), "");
}

TEST(StopStrings, FlushGivesBackAnUnfinishedOne) {
  StopStrings stops({"</answer>"});
  EXPECT_EQ(stops.push("2 </ans"), "2 ");
  EXPECT_EQ(stops.flush(), "</ans");
  EXPECT_FALSE(stops.stopped());
}

TEST(StopStrings, OverlapsOfItself) {
  StopStrings stops({"aab"});
  std::string shown;
  for (const char c : std::string("aaaab")) shown += stops.push(std::string(1, c));
  EXPECT_TRUE(stops.stopped());
  EXPECT_EQ(shown, "aa");
}

TEST(StopStrings, EmptyIsAnError) {
  EXPECT_THROW(StopStrings({"a", ""}), Error);
}

// However the text is cut, the shown text is all before the stop string that is complete first.
RC_GTEST_PROP(StopStrings, CutsDoNotMatter, ()) {
  const auto letters = rc::gen::container<std::string>(rc::gen::elementOf(std::string("ab")));
  const auto text = *letters;
  const auto all = *rc::gen::container<std::vector<std::string>>(letters);
  std::vector<std::string> stops;
  for (const auto& s : all)
    if (!s.empty()) stops.push_back(s.substr(0, 4));
  size_t end = std::string::npos, begin = text.size();
  for (const auto& s : stops)
    if (const size_t at = text.find(s); at != std::string::npos)
      if (at + s.size() < end || (at + s.size() == end && at < begin)) {
        end = at + s.size();
        begin = at;
      }
  StopStrings filter(stops);
  std::string shown;
  for (size_t at = 0; at < text.size() && !filter.stopped();) {
    const auto size = *rc::gen::inRange<size_t>(1, 5);
    shown += filter.push(std::string_view(text).substr(at, size));
    RC_ASSERT(shown.size() <= begin);
    at += size;
  }
  shown += filter.flush();
  RC_ASSERT(filter.stopped() == (end != std::string::npos));
  RC_ASSERT(shown == text.substr(0, begin));
}

}  // namespace
}  // namespace moiety
