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
constexpr int64_t kRead = int64_t{1} << 20;  // of one request: several are in flight for one matrix
constexpr unsigned kDepth = 64;

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
    Job::Part* part = nullptr;
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

int64_t Reader::buffer_bytes(std::span<const StoredPiece> pieces) {
  int64_t sum = 0;
  for (const StoredPiece& p : pieces) sum += up(p.offset + p.bytes) - down(p.offset);
  return sum;
}

void Reader::failed(const Job& job, const Job::Part& part, int64_t at, int error) const {
  const auto& path = files_[part.piece.file]->path;
  if (error != 0) fail("cannot read {} from {} at offset {}: {}", job.what, path.string(), at, std::strerror(error));
  struct stat status {};
  ::fstat(files_[part.piece.file]->plain, &status);
  fail(
      "cannot read {} from {} at offset {}: the file ends at {}, but {} bytes from offset {} belong to it; it was cut "
      "short since it was opened",
      job.what, path.string(), at, static_cast<int64_t>(status.st_size), part.piece.bytes, part.piece.offset);
}

void Reader::start(Job& job, std::vector<StoredPiece> pieces, std::byte* buffer, std::string what) {
  job.parts.clear();
  job.what = std::move(what);
  const auto now = std::chrono::steady_clock::now();
  for (const StoredPiece& p : pieces) {
    Job::Part part;
    part.piece = p;
    part.begin = down(p.offset);
    part.end = up(p.offset + p.bytes);
    part.to = buffer;
    part.start = now;
    buffer += part.end - part.begin;
    job.parts.push_back(part);
  }
#if defined(MOIETY_URING)
  if (!ring_) return;
  for (auto& part : job.parts) {
    const File& file = *files_[part.piece.file];
    for (int64_t at = part.begin; at < part.end; at += kRead) {
      // What finds no room is read when it is waited for.
      if (ring_->free.empty()) break;
      io_uring_sqe* sqe = io_uring_get_sqe(&ring_->ring);
      if (sqe == nullptr) break;
      const size_t id = ring_->free.back();
      ring_->free.pop_back();
      const int64_t bytes = std::min(kRead, part.end - at);
      ring_->requests[id] = {&part, bytes};
      io_uring_prep_read(sqe, file.direct >= 0 ? file.direct : file.plain, part.to + (at - part.begin),
                         static_cast<unsigned>(bytes), static_cast<uint64_t>(at));
      io_uring_sqe_set_data64(sqe, id);
      ++part.pending;
      ++ring_->flying;
    }
  }
  io_uring_submit(&ring_->ring);
#endif
}

size_t Reader::left(const Job& job) {
  return static_cast<size_t>(std::count_if(job.parts.begin(), job.parts.end(), [](const auto& p) { return !p.done; }));
}

// Reads a part with pread: all of it, or what is left behind requests that came back short.
void Reader::read_plain(Job& job, Job::Part& part) {
  File& file = *files_[part.piece.file];
  const int64_t needed = part.piece.offset + part.piece.bytes;
  for (int64_t at = part.begin; at < needed;) {
    const bool direct = file.direct >= 0 && at % kBlock == 0;
    const ssize_t n =
        ::pread(direct ? file.direct : file.plain, part.to + (at - part.begin), static_cast<size_t>(part.end - at), at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && direct && (errno == EINVAL || errno == EOPNOTSUPP)) {  // refused by this file system
      ::close(file.direct);
      file.direct = -1;
      direct_ = false;
      continue;
    }
    if (n < 0) failed(job, part, at, errno);
    if (n == 0) failed(job, part, at, 0);
    at += n;
  }
  if (file.direct < 0) ::posix_fadvise(file.plain, part.begin, part.end - part.begin, POSIX_FADV_DONTNEED);
}

void Reader::finish(Job::Part& part) {
  part.done = true;
  bytes_ += part.piece.bytes;
  if (options_.rate <= 0.0) return;
  const auto lasts = std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(static_cast<double>(part.piece.bytes) / options_.rate));
  last_end_ = std::max(part.start, last_end_) + lasts;
  std::this_thread::sleep_until(last_end_);
}

std::span<const std::byte> Reader::wait(Job& job, size_t index) {
  Job::Part& part = job.parts.at(index);
  if (!part.done) {
    bool again = !ring_;
#if defined(MOIETY_URING)
    if (ring_) {
      const int64_t requests = (part.end - part.begin + kRead - 1) / kRead;
      again = part.pending < requests;  // some found no room in the ring
      while (part.pending > 0) {
        io_uring_cqe* cqe = nullptr;
        const int result = io_uring_wait_cqe(&ring_->ring, &cqe);
        if (result == -EINTR) continue;
        check(result == 0, "io_uring fails: {}", std::strerror(-result));
        const auto id = static_cast<size_t>(io_uring_cqe_get_data64(cqe));
        const Ring::Request& r = ring_->requests[id];
        --r.part->pending;
        // Short reads, interrupted ones and refusals of the file system are read again by pread, which also says what
        // is wrong.
        if (cqe->res < r.bytes) r.part->short_ = true;
        ring_->free.push_back(id);
        --ring_->flying;
        io_uring_cqe_seen(&ring_->ring, cqe);
      }
      again = again || part.short_;
    }
#endif
    if (again)
      read_plain(job, part);
    else if (files_[part.piece.file]->direct < 0)
      ::posix_fadvise(files_[part.piece.file]->plain, part.begin, part.end - part.begin, POSIX_FADV_DONTNEED);
    finish(part);
  }
  return {part.to + (part.piece.offset - part.begin), static_cast<size_t>(part.piece.bytes)};
}

void Reader::settle() {
#if defined(MOIETY_URING)
  if (!ring_) return;
  while (ring_->flying > 0) {
    io_uring_cqe* cqe = nullptr;
    const int result = io_uring_wait_cqe(&ring_->ring, &cqe);
    if (result == -EINTR) continue;
    if (result != 0) return;
    ring_->free.push_back(static_cast<size_t>(io_uring_cqe_get_data64(cqe)));
    --ring_->flying;
    io_uring_cqe_seen(&ring_->ring, cqe);
  }
#endif
}

}  // namespace moiety
