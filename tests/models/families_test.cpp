#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "moiety/base/registry.h"
#include "moiety/models/decoder_config.h"
#include "moiety/models/model.h"

namespace moiety {
namespace {

TEST(Families, EveryModelThatLoadsIsListed) {
  std::set<std::string> listed, known;
  for (const Method& method : methods())
    if (method.kind == "family") listed.insert(method.slug);
  auto names = decoder_families();
  const auto encoders = encoder_families();
  names.insert(names.end(), encoders.begin(), encoders.end());
  for (std::string name : names) {
    std::replace(name.begin(), name.end(), '_', '-');
    known.insert(name);
  }
  EXPECT_EQ(listed, known);
}

}  // namespace
}  // namespace moiety
