#include "moiety/offload/reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#if defined(MOIETY_URING)
#include <liburing.h>
#endif

#include "moiety/base/error.h"

namespace moiety {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kRequest = int64_t{1} << 20;  // bytes: several are in flight for a large matrix
constexpr unsigned kDepth = 32;                 // requests in flight
constexpr unsigned kDepthAhead = 3;             // reads ahead keep the disk busy, but no more waits in front of others

int64_t down(int64_t n) {
  return n / kBlock * kBlock;
}
int64_t up(int64_t n) {
  return (n + kBlock - 1) / kBlock * kBlock;
}

}  // namespace

PageMemory::PageMemory(int64_t bytes, bool huge) {
  if (bytes <= 0) return;
  constexpr int64_t kHuge = int64_t{2} << 20;
  huge = huge && bytes >= kHuge;
  const int64_t unit = huge ? kHuge : kBlock;
  bytes_ = (bytes + unit - 1) / unit * unit;
  // Of the system and not of the allocator, so that it is there and goes as a whole; begins at a whole unit.
  mapped_ = static_cast<size_t>(bytes_ + unit);
  void* memory = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(memory != MAP_FAILED, "no memory for {} bytes of experts: {}", bytes_, std::strerror(errno));
  map_ = memory;
  const auto at = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(unit) - 1) /
                  static_cast<uintptr_t>(unit) * static_cast<uintptr_t>(unit);
  data_ = reinterpret_cast<std::byte*>(at);
#if defined(MADV_HUGEPAGE)
  if (huge) ::madvise(data_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);  // a wish
#endif
}

PageMemory::~PageMemory() {
  if (map_ != nullptr) ::munmap(map_, mapped_);
}

struct Reader::File {
  std::filesystem::path path;
  int plain = -1, direct = -1;
  ~File() {
    if (plain >= 0) ::close(plain);
    if (direct >= 0) ::close(direct);
  }
};

#if defined(MOIETY_URING)
struct Reader::Ring {
  struct Request {
    Read* read = nullptr;
    int64_t bytes = 0;
  };
  io_uring ring{};
  const bool works;  // the kernel may refuse
  unsigned flying = 0;
  std::vector<Request> requests{kDepth};
  std::vector<size_t> free;
  Ring() : works(io_uring_queue_init(kDepth, &ring, 0) == 0) {
    for (size_t i = 0; i < kDepth; ++i) free.push_back(i);
  }
  ~Ring() {
    if (works) io_uring_queue_exit(&ring);
  }
};
#else
struct Reader::Ring {};
#endif

Reader::Reader(const std::vector<std::filesystem::path>& files, ReadOptions options) : options_(options) {
  check(options.rate >= 0.0, "a rate of {} bytes a second is impossible", options.rate);
  for (const auto& path : files) {
    auto file = std::make_unique<File>();
    file->path = path;
    file->plain = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    check(file->plain >= 0, "cannot open {}: {}", path.string(), std::strerror(errno));
#if defined(O_DIRECT)
    if (options.direct) file->direct = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
    if (file->direct < 0) {
      direct_ = false;
      ::posix_fadvise(file->plain, 0, 0, POSIX_FADV_RANDOM);  // nothing is read that was not asked for
    }
    files_.push_back(std::move(file));
  }
#if defined(MOIETY_URING)
  if (options.uring) {
    auto ring = std::make_unique<Ring>();
    if (ring->works) ring_ = std::move(ring);
  }
#endif
}

Reader::~Reader() {
  settle();
}

int64_t Reader::buffer_bytes(const StoredPiece& piece) {
  return up(piece.offset + piece.bytes) - down(piece.offset);
}

void Reader::failed(const Read& read, int64_t at, int error) const {
  const File& file = *files_[read.piece_.file];
  if (error != 0)
    fail("cannot read {} from {} at offset {}: {}", read.what_, file.path.string(), at, std::strerror(error));
  struct stat status {};
  ::fstat(file.plain, &status);
  fail(
      "cannot read {} from {} at offset {}: the file ends at {}, but {} bytes from offset {} belong to it; it was cut "
      "short since it was opened",
      read.what_, file.path.string(), at, static_cast<int64_t>(status.st_size), read.piece_.bytes, read.piece_.offset);
}

void Reader::start(Read& read, const StoredPiece& piece, std::byte* buffer, std::string what, bool ahead) {
  read.piece_ = piece;
  read.what_ = std::move(what);
  read.to_ = buffer;
  read.begin_ = read.asked_ = down(piece.offset);
  read.end_ = up(piece.offset + piece.bytes);
  read.pending_ = 0;
  read.ahead_ = ahead;
  read.short_ = false;
  read.start_ = std::chrono::steady_clock::now();
  reads_.push_back(&read);
  ask();
}

// Gives the disk what there is to ask for: what is read ahead comes behind all else.
void Reader::ask() {
#if defined(MOIETY_URING)
  if (!ring_) return;
  bool any = false;
  for (const bool ahead : {false, true})
    for (Read* read : reads_) {
      if (read->ahead_ != ahead) continue;
      const File& file = *files_[read->piece_.file];
      while (read->asked_ < read->end_ && ring_->flying < (ahead ? kDepthAhead : kDepth)) {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring_->ring);
        if (sqe == nullptr) break;
        const size_t id = ring_->free.back();
        ring_->free.pop_back();
        const int64_t bytes = std::min(kRequest, read->end_ - read->asked_);
        ring_->requests[id] = {read, bytes};
        io_uring_prep_read(sqe, file.direct >= 0 ? file.direct : file.plain, read->to_ + (read->asked_ - read->begin_),
                           static_cast<unsigned>(bytes), static_cast<uint64_t>(read->asked_));
        io_uring_sqe_set_data64(sqe, id);
        read->asked_ += bytes;
        ++read->pending_;
        ++ring_->flying;
        any = true;
      }
    }
  if (any) io_uring_submit(&ring_->ring);
#endif
}

// Takes what the disk has answered, at least one request.
void Reader::reap() {
#if defined(MOIETY_URING)
  io_uring_cqe* cqe = nullptr;
  const int result = io_uring_submit_and_wait(&ring_->ring, 1);  // also what a busy system did not take before
  check(result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY, "io_uring fails: {}",
        std::strerror(-result));
  while (io_uring_peek_cqe(&ring_->ring, &cqe) == 0) {
    const auto id = static_cast<size_t>(io_uring_cqe_get_data64(cqe));
    const Ring::Request& r = ring_->requests[id];
    --r.read->pending_;
    // Short reads, interrupted ones and refusals of the file system are read again by pread, which also says what is
    // wrong.
    if (cqe->res < r.bytes) r.read->short_ = true;
    ring_->free.push_back(id);
    --ring_->flying;
    io_uring_cqe_seen(&ring_->ring, cqe);
  }
#endif
}

// Reads a piece with pread.
void Reader::read_plain(Read& read) {
  File& file = *files_[read.piece_.file];
  const int64_t needed = read.piece_.offset + read.piece_.bytes;
  for (int64_t at = read.begin_; at < needed;) {
    const bool direct = file.direct >= 0 && at % kBlock == 0;
    const ssize_t n = ::pread(direct ? file.direct : file.plain, read.to_ + (at - read.begin_),
                              static_cast<size_t>(read.end_ - at), at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && direct && (errno == EINVAL || errno == EOPNOTSUPP)) {  // refused by this file system
      ::close(file.direct);
      file.direct = -1;
      direct_ = false;
      continue;
    }
    if (n < 0) failed(read, at, errno);
    if (n == 0) failed(read, at, 0);
    at += n;
  }
}

// Waits until a disk of the rate that was asked for would be through.
void Reader::pace(const Read& read) {
  if (options_.rate <= 0.0) return;
  const auto lasts = std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(static_cast<double>(read.piece_.bytes) / options_.rate));
  last_end_ = std::max(read.start_, last_end_) + lasts;
  std::this_thread::sleep_until(last_end_);
}

Reader::Read& Reader::next() {
  check(!reads_.empty(), "nothing is being read");
  auto at = reads_.end();
  if (ring_) {
    const auto complete = [](const Read* r) { return r->asked_ == r->end_ && r->pending_ == 0; };
    while ((at = std::find_if(reads_.begin(), reads_.end(), complete)) == reads_.end()) {
      reap();
      ask();
    }
  } else {
    at = std::find_if(reads_.begin(), reads_.end(), [](const Read* r) { return !r->ahead_; });
    if (at == reads_.end()) at = reads_.begin();
  }
  Read& read = **at;
  reads_.erase(at);
  if (!ring_ || read.short_) read_plain(read);
  const File& file = *files_[read.piece_.file];
  if (file.direct < 0) ::posix_fadvise(file.plain, read.begin_, read.end_ - read.begin_, POSIX_FADV_DONTNEED);
  pace(read);
  return read;
}

void Reader::settle() {
#if defined(MOIETY_URING)
  try {
    while (ring_ && ring_->flying > 0) reap();
  } catch (const Error&) {  // what cannot be waited for is not waited for
  }
#endif
  reads_.clear();
}

}  // namespace moiety
