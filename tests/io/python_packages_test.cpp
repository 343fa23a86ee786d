#include "moiety/io/python_packages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "moiety/base/files.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;

TEST(PythonPackages, OfTheEnvironmentComeFirstAndOnce) {
  const TemporaryFolder folder;
  const fs::path site = folder / "lib" / "python3.11" / "site-packages", other = folder / "lib" / "perl";
  fs::create_directories(site);
  fs::create_directories(other / "site-packages");
  fs::create_directory_symlink(folder / "lib", folder / "lib64");
  const char* python = std::getenv("MOIETY_PYTHON");
  const std::string before = python ? python : "";
  ::setenv("MOIETY_PYTHON", folder.path().c_str(), 1);
  const auto found = python_package_folders();
  if (python)
    ::setenv("MOIETY_PYTHON", before.c_str(), 1);
  else
    ::unsetenv("MOIETY_PYTHON");
  ASSERT_FALSE(found.empty());
  EXPECT_EQ(found.front(), site);
  EXPECT_EQ(std::count_if(found.begin(), found.end(),
                          [&](const fs::path& p) { return p.string().rfind(folder.path().string(), 0) == 0; }),
            1);
}

}  // namespace
}  // namespace moiety
