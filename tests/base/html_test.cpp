#include "moiety/base/html.h"

#include <gtest/gtest.h>

#include "moiety/base/error.h"

namespace moiety {
namespace {

TEST(Html, DataCannotEndItsElement) {
  const nlohmann::json data = {{"a", "</script><!-- <b>"}, {"b", "{{data}}"}};
  const std::string page = html_with_data("<x>{{data}}</x>", data);
  EXPECT_EQ(page.find('<', 1), page.find("</x>"));
  const std::string inside = page.substr(3, page.size() - 7);
  EXPECT_EQ(nlohmann::json::parse(inside), data);
}

TEST(Html, IllFormedTextIsReplaced) {
  EXPECT_EQ(html_with_data("{{data}}", nlohmann::json("\xff")), "\"\xef\xbf\xbd\"");
}

TEST(Html, APageWithoutAPlaceIsAnError) {
  EXPECT_THROW(html_with_data("<x></x>", {}), Error);
}

}  // namespace
}  // namespace moiety
