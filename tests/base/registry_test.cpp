#include "moiety/base/registry.h"

#include <gtest/gtest.h>

using namespace moiety;

namespace {

struct Config {
  int64_t experts = 4;
  void fields(Fields& f) { f("experts", experts, "how many").min(1); }
};

using MakeNumber = std::function<int(int)>;

const RegisterMethod part({.slug = "test-part",
                           .kind = "part",
                           .title = "Test Part",
                           .summary = "one",
                           .paper = {"A Title", "Someone", 2024, "2401.00001"},
                           .sites = {"ffn"},
                           .config = describe<Config>,
                           .make = MakeNumber([](int x) { return 2 * x; })});
const RegisterMethod study({.slug = "test-part", .kind = "study", .summary = "two"});
const RegisterMethod earlier({.slug = "a-test", .kind = "part", .summary = "three"});

}  // namespace

TEST(Registry, FindsByKindAndSlug) {
  const auto& all = methods();
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end(), [](const Method& a, const Method& b) { return a.slug < b.slug; }));
  EXPECT_EQ(find_methods("test-part").size(), 2u);
  EXPECT_TRUE(find_methods("nothing").empty());
  const Method& method = get_method("part", "test-part");
  EXPECT_EQ(method.summary, "one");
  EXPECT_EQ(method.config()[0].name, "experts");
  EXPECT_EQ(factory<MakeNumber>(method)(21), 42);
  EXPECT_THROW(factory<std::function<void()>>(method), Error);
}

TEST(Registry, NamesTheNearest) {
  auto message = [](const std::string& kind, const std::string& slug) {
    try {
      get_method(kind, slug);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message("part", "tset-part"), "there is no part `tset-part`; did you mean `test-part`?");
  EXPECT_EQ(message("rule", "test-part"), "test-part is a part and study, not a rule");
}
