#include "moiety/io/finite.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace moiety {
namespace {

TEST(NotFinite, NamesTheFirstPlace) {
  std::vector<float> values(24, 1.f);
  EXPECT_EQ(not_finite(values, {2, 3, 4}), "");
  values[23] = -INFINITY;
  EXPECT_EQ(not_finite(values, {2, 3, 4}), "holds -inf at [1, 2, 3]");
  values[6] = -std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(not_finite(values, {2, 3, 4}), "holds nan at [0, 1, 2]");
  EXPECT_EQ(not_finite(values, {24}), "holds nan at [6]");
}

TEST(NotFinite, KnowsScalarsAndNothing) {
  const float inf = INFINITY;
  EXPECT_EQ(not_finite({&inf, 1}, {}), "holds inf at []");
  EXPECT_EQ(not_finite({}, {0, 4}), "");
}

}  // namespace
}  // namespace moiety
