#include "moiety/io/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

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

const char* blamed = "moiety";

// Only what a signal handler may call.
void say(const char* text) {
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, std::strlen(text));
}

void on_bus_error(int signal, siginfo_t* info, void*) {
  Mappings& m = mappings();
  const auto* at = static_cast<const std::byte*>(info->si_addr);
  // Held by the thread that was interrupted: nothing is known then.
  if (m.lock.try_lock()) {
    auto next = m.all.upper_bound(at);
    if (next != m.all.begin()) {
      const MappedFile& file = *std::prev(next)->second;
      if (at < file.bytes().data() + (file.bytes().size() + 4095) / 4096 * 4096) {
        struct stat status {};
        const bool there = ::stat(file.path().c_str(), &status) == 0;
        say(blamed);
        say(": ");
        say(file.path().c_str());
        say(there && static_cast<size_t>(status.st_size) < file.bytes().size()
                ? " was cut short while it was in use: what was mapped is not there any more\n"
                : " cannot be read any more: the disk gave an error\n");
        ::_exit(1);
      }
    }
    m.lock.unlock();
  }
  // Not ours: as without a handler, when the instruction runs again.
  ::signal(signal, SIG_DFL);
}

}  // namespace

void MappedFile::explain_lost_pages(const char* who) {
  blamed = who;
  mappings();
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, nullptr);
}

std::optional<MappedFile::Location> MappedFile::locate(const std::byte* byte) {
  Mappings& m = mappings();
  const std::lock_guard<std::mutex> guard(m.lock);
  auto at = m.all.upper_bound(byte);
  if (at == m.all.begin()) return std::nullopt;
  const MappedFile& file = *std::prev(at)->second;
  if (byte >= file.data_ + file.size_) return std::nullopt;
  return Location{file.path_, static_cast<size_t>(byte - file.data_), file.bytes()};
}

void MappedFile::copy(const std::byte* from, std::span<std::byte> to) {
  if (to.empty()) return;
  const MappedFile* file = nullptr;  // stays: the caller holds what it reads
  {
    Mappings& m = mappings();
    const std::lock_guard<std::mutex> guard(m.lock);
    auto at = m.all.upper_bound(from);
    if (at != m.all.begin() && from < std::prev(at)->second->data_ + std::prev(at)->second->size_)
      file = std::prev(at)->second;
  }
  if (file == nullptr) {
    std::memcpy(to.data(), from, to.size());
    return;
  }
  for (size_t done = 0; done < to.size();) {
    const auto offset = static_cast<off_t>(from - file->data_ + static_cast<ptrdiff_t>(done));
    const ssize_t got = ::pread(file->fd_, to.data() + done, to.size() - done, offset);
    if (got < 0 && errno == EINTR) continue;
    check(got >= 0, "cannot read {} at {}: {}", file->path_.string(), offset, std::strerror(errno));
    check(got > 0, "{} was cut short while it was in use: there is nothing at {}", file->path_.string(), offset);
    done += static_cast<size_t>(got);
  }
}

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  // Non-blocking: opening a FIFO must not hang.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  check(fd >= 0, "cannot open {}: {}", path.string(), std::strerror(errno));
  struct Closer {
    int fd;
    ~Closer() {
      if (fd >= 0) ::close(fd);
    }
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
    file->fd_ = std::exchange(closer.fd, -1);
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
  ::close(fd_);
}

}  // namespace moiety
