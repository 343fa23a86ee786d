#include "moiety/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include "moiety/base/error.h"

namespace moiety {
namespace {

// All mappings by their first byte.
struct Mappings {
  std::mutex lock;
  std::map<const std::byte*, const MappedFile*> all;
};
Mappings& mappings() {
  static auto* const kept = new Mappings;  // outlives files that static objects hold
  return *kept;
}

}  // namespace

std::optional<MappedFile::Location> MappedFile::locate(const std::byte* byte) {
  Mappings& m = mappings();
  const std::lock_guard<std::mutex> guard(m.lock);
  auto at = m.all.upper_bound(byte);
  if (at == m.all.begin()) return std::nullopt;
  const MappedFile& file = *std::prev(at)->second;
  if (byte >= file.data_ + file.size_) return std::nullopt;
  return Location{file.path_, static_cast<size_t>(byte - file.data_), file.bytes()};
}

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  // Non-blocking: opening a FIFO must not hang.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  check(fd >= 0, "cannot open {}: {}", path.string(), std::strerror(errno));
  struct Closer {
    int fd;
    ~Closer() { ::close(fd); }
  } closer{fd};
  struct stat status {};
  check(::fstat(fd, &status) == 0, "cannot examine {}: {}", path.string(), std::strerror(errno));
  check(S_ISREG(status.st_mode), "{} is {}, not a regular file", path.string(),
        S_ISDIR(status.st_mode) ? "a folder" : "a device or pipe");
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = path;
  const auto size = static_cast<size_t>(status.st_size);
  if (size > 0) {
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    check(data != MAP_FAILED, "cannot map {} ({} bytes): {}", path.string(), size, std::strerror(errno));
    file->data_ = static_cast<const std::byte*>(data);
    file->size_ = size;
    Mappings& m = mappings();
    const std::lock_guard<std::mutex> guard(m.lock);
    m.all[file->data_] = file.get();
  }
  return file;
}

MappedFile::~MappedFile() {
  if (size_ == 0) return;
  {
    Mappings& m = mappings();
    const std::lock_guard<std::mutex> guard(m.lock);
    m.all.erase(data_);
  }
  ::munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace moiety
