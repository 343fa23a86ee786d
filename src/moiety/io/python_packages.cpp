#include "moiety/io/python_packages.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <sstream>
#include <string>

namespace moiety {

namespace fs = std::filesystem;

namespace {

std::vector<std::string> versions_in(const fs::path& lib) {
  std::vector<std::string> out;
  std::error_code ec;
  for (fs::directory_iterator it(lib, ec), end; !ec && it != end; it.increment(ec))
    if (const auto name = it->path().filename().string(); name.starts_with("python3")) out.push_back(name);
  std::sort(out.begin(), out.end());
  return out;
}

void add_site_packages(const fs::path& prefix, std::vector<fs::path>& out) {
  for (const char* lib : {"lib", "lib64", "local/lib"})
    for (const auto& name : versions_in(prefix / lib))
      for (const char* leaf : {"site-packages", "dist-packages"})
        if (fs::is_directory(prefix / lib / name / leaf)) out.push_back(prefix / lib / name / leaf);
}

/// Prefix of an interpreter ("P/bin/python" -> "P"); links stay unresolved, for in a virtual environment python is one.
void add_interpreter(const fs::path& python, std::vector<fs::path>& out) {
  std::error_code ec;
  const fs::path absolute = fs::absolute(python, ec);
  if (!ec) add_site_packages(absolute.parent_path().parent_path(), out);
}

void add_environments_above(fs::path folder, std::vector<fs::path>& out) {
  for (int depth = 0; depth < 32 && !folder.empty(); ++depth, folder = folder.parent_path()) {
    if (fs::is_directory(folder / ".venv")) add_site_packages(folder / ".venv", out);
    if (folder == folder.root_path()) break;
  }
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace

std::vector<fs::path> python_package_folders() {
  std::vector<fs::path> all;
  if (const std::string python = environment("MOIETY_PYTHON"); !python.empty()) {
    if (fs::is_directory(python))
      add_site_packages(python, all);
    else
      add_interpreter(python, all);
  }
  if (const std::string env = environment("VIRTUAL_ENV"); !env.empty()) add_site_packages(env, all);
  std::error_code ec;
  add_environments_above(fs::current_path(ec), all);
  if (const fs::path self = fs::read_symlink("/proc/self/exe", ec); !ec)
    add_environments_above(self.parent_path(), all);
  std::istringstream path(environment("PATH"));
  for (std::string folder; std::getline(path, folder, ':');)
    if (!folder.empty() && ::access((fs::path(folder) / "python3").c_str(), X_OK) == 0) {
      add_interpreter(fs::path(folder) / "python3", all);
      if (folder == "/usr/bin" || folder == "/bin") {
        add_site_packages("/usr/local", all);
        if (fs::is_directory("/usr/lib/python3/dist-packages")) all.push_back("/usr/lib/python3/dist-packages");
      }
    }
  if (const std::string home = environment("HOME"); !home.empty()) add_site_packages(fs::path(home) / ".local", all);
  std::vector<fs::path> out;
  std::set<fs::path> seen;  // lib64 is often a link to lib
  for (const auto& p : all) {
    const fs::path real = fs::canonical(p, ec);
    if (!ec && seen.insert(real).second) out.push_back(p);
  }
  return out;
}

}  // namespace moiety
