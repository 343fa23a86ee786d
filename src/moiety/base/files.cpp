#include "moiety/base/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "moiety/base/atomic_file.h"
#include "moiety/base/error.h"

namespace moiety {
namespace fs = std::filesystem;

void write_file(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

fs::path cache_folder() {
  const auto environment = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (const std::string dir = environment("MOIETY_CACHE"); !dir.empty()) return dir;
  if (const std::string dir = environment("XDG_CACHE_HOME"); !dir.empty()) return fs::path(dir) / "moiety";
  const std::string home = environment("HOME");
  check(!home.empty(),
        "neither MOIETY_CACHE nor HOME is set: there is no place for a cache; set MOIETY_CACHE to a folder");
  return fs::path(home) / ".cache" / "moiety";
}

std::string read_text(const fs::path& path, int64_t limit) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(fd >= 0, "cannot read {}: {}", path.string(), std::strerror(errno));
  struct Closer {
    int fd;
    ~Closer() { ::close(fd); }
  } closer{fd};
  struct stat status {};
  check(::fstat(fd, &status) == 0, "cannot read {}: {}", path.string(), std::strerror(errno));
  check(!S_ISDIR(status.st_mode), "cannot read {}: it is a folder", path.string());
  auto too_large = [&](int64_t size) {
    check(size <= limit, "{} is too large: more than {} bytes", path.string(), limit);
  };
  if (S_ISREG(status.st_mode)) too_large(status.st_size);
  std::string text;
  char piece[1 << 16];
  for (;;) {
    ssize_t got = ::read(fd, piece, sizeof piece);
    if (got < 0 && errno == EINTR) continue;
    check(got >= 0, "cannot read {}: {}", path.string(), std::strerror(errno));
    if (got == 0) return text;
    text.append(piece, static_cast<size_t>(got));
    too_large(static_cast<int64_t>(text.size()));
  }
}

TemporaryFolder::TemporaryFolder(const std::string& prefix) {
  std::string name = (fs::temp_directory_path() / (prefix + "-XXXXXX")).string();
  check(::mkdtemp(name.data()) != nullptr, "cannot make a folder {}: {}", name, std::strerror(errno));
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace moiety
