#include "moiety/base/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "moiety/base/error.h"

namespace moiety {
namespace fs = std::filesystem;
namespace {

constexpr size_t buffer_bytes = 1 << 20;

/// The file that `path` names once symbolic links are followed; the last one need not exist.
fs::path follow_links(fs::path path) {
  std::error_code ignored;
  for (int hops = 0; hops < 40 && fs::is_symlink(path, ignored); ++hops) {
    fs::path target = fs::read_symlink(path, ignored);
    if (ignored) break;
    path = target.is_absolute() ? target : path.parent_path() / target;
  }
  return path;
}

bool write_all(int fd, const std::byte* data, size_t size) {
  while (size > 0) {
    ssize_t written = ::write(fd, data, size);
    if (written < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    data += written;
    size -= static_cast<size_t>(written);
  }
  return true;
}

void sync_folder(const fs::path& folder) {
  int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);  // some file systems cannot sync a folder: the rename is atomic all the same
  ::close(fd);
}

}  // namespace

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  check(!path_.empty(), "cannot write a file without a name");
  struct stat status {};
  bool exists = ::stat(path_.c_str(), &status) == 0;
  check(!(exists && S_ISDIR(status.st_mode)), "cannot write {}: it is a folder", path_.string());
  if (exists && !S_ISREG(status.st_mode)) {
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    if (fd_ < 0) fail_with("open");
    return;
  }
  path_ = follow_links(path_);
  static std::atomic<unsigned> counter{0};
  std::string name = fmt::format(".{}.{}-{}.tmp", path_.filename().string().substr(0, 200), ::getpid(), counter++);
  temporary_ = path_.parent_path() / name;
  fd_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    int error = errno;
    temporary_.clear();
    errno = error;
    fail_with("write");
  }
  if (exists) ::fchmod(fd_, status.st_mode & 07777);
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(other.size_),
      buffer_(std::move(other.buffer_)) {
  other.temporary_.clear();
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail_with(const char* what) const {
  fail("cannot {} {}: {}", what, path_.string(), std::strerror(errno));
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  check(fd_ >= 0, "cannot write {}: it is closed already", path_.string());
  size_ += static_cast<int64_t>(bytes.size());
  if (buffer_.size() + bytes.size() <= buffer_bytes) {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    return;
  }
  flush();
  if (bytes.size() >= buffer_bytes) {
    if (!write_all(fd_, bytes.data(), bytes.size())) fail_with("write");
  } else {
    buffer_.assign(bytes.begin(), bytes.end());
  }
}

void AtomicFile::write_at(int64_t offset, std::span<const std::byte> bytes) {
  check(fd_ >= 0 && !temporary_.empty(), "cannot go back in {}: it is a pipe, a device, or closed", path_.string());
  check(offset >= 0 && offset <= size_ && static_cast<int64_t>(bytes.size()) <= size_ - offset,
        "cannot replace bytes {} to {} of {}: only {} are written", offset, offset + static_cast<int64_t>(bytes.size()),
        path_.string(), size_);
  flush();
  while (!bytes.empty()) {
    ssize_t written = ::pwrite(fd_, bytes.data(), bytes.size(), offset);
    if (written < 0) {
      if (errno == EINTR) continue;
      fail_with("write");
    }
    bytes = bytes.subspan(static_cast<size_t>(written));
    offset += written;
  }
}

void AtomicFile::flush() {
  if (!write_all(fd_, buffer_.data(), buffer_.size())) fail_with("write");
  buffer_.clear();
}

void AtomicFile::close() {
  if (fd_ < 0) return;
  flush();
  if (!temporary_.empty() && ::fsync(fd_) != 0) fail_with("sync");
  if (::close(std::exchange(fd_, -1)) != 0) fail_with("close");
}

void AtomicFile::commit() {
  commit(path_);
}

void AtomicFile::commit(const fs::path& path) {
  close();
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), path.c_str()) != 0)
    fail("cannot rename {} to {}: {}", temporary_.string(), path.string(), std::strerror(errno));
  temporary_.clear();
  sync_folder(path.parent_path());
}

}  // namespace moiety
