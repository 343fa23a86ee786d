#include "moiety/base/text.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

using namespace moiety;

TEST(Text, EditDistance) {
  EXPECT_EQ(edit_distance("", ""), 0u);
  EXPECT_EQ(edit_distance("abc", ""), 3u);
  EXPECT_EQ(edit_distance("experts", "Experts"), 0u);
  EXPECT_EQ(edit_distance("exprets", "experts"), 1u);  // a swap
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3u);
}

RC_GTEST_PROP(Text, EditDistanceIsSymmetricAndBounded, (const std::string& a, const std::string& b)) {
  RC_ASSERT(edit_distance(a, b) == edit_distance(b, a));
  RC_ASSERT(edit_distance(a, b) <= std::max(a.size(), b.size()));
  RC_ASSERT(edit_distance(a, a) == 0u);
}

TEST(Text, Nearest) {
  std::vector<std::string> names{"generate", "eval", "experts_per_token", "tokenize"};
  EXPECT_EQ(nearest("geenrate", names), "generate");
  EXPECT_EQ(nearest("EVAL", names), "eval");
  EXPECT_EQ(nearest("experts", names), "experts_per_token");
  EXPECT_EQ(nearest("quantum", names), std::nullopt);
  EXPECT_EQ(did_you_mean("tokenise", names), "; did you mean `tokenize`?");
  EXPECT_EQ(did_you_mean("zzz", names), "");
}

TEST(Text, ListOf) {
  EXPECT_EQ(list_of({}), "");
  EXPECT_EQ(list_of({"a"}), "a");
  EXPECT_EQ(list_of({"a", "b", "c"}), "a, b or c");
  EXPECT_EQ(list_of({"a", "b"}, "and"), "a and b");
}

TEST(Text, ShownIsPrintable) {
  EXPECT_EQ(shown("plain"), "plain");
  EXPECT_EQ(shown("a\nb\x01"), "a\\x0ab\\x01");
  EXPECT_EQ(shown("\xc3\xa9\xff"), "\xc3\xa9\\xff");
  EXPECT_EQ(shown("\xed\xa0\x80"), "\\xed\\xa0\\x80");  // a surrogate
  EXPECT_EQ(shown("\xc0\x80"), "\\xc0\\x80");           // overlong
  EXPECT_EQ(shown("\xe2\x82"), "\\xe2\\x82");           // cut off
  EXPECT_EQ(shown(std::string(200, 'x'), 10), "xxxxxxxxxx...");
}

RC_GTEST_PROP(Text, ShownIsBounded, (const std::string& text)) {
  RC_ASSERT(shown(text, 20).size() <= 20u + 4u + 3u);
}
