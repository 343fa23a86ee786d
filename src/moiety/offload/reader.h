#pragma once
// Explicit reads of pieces of files: io_uring where the system has it, pread otherwise; past the page cache (O_DIRECT)
// where the file system allows, otherwise with the pages dropped right behind. Used by one thread.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moiety/offload/source.h"

namespace moiety {

struct ReadOptions {
  bool direct = true;  ///< try O_DIRECT
  bool uring = true;   ///< try io_uring
  /// Bytes a second, 0: no limit. A read of n bytes then ends no earlier than max(its start, the end of the read
  /// before)
  /// + n / rate.
  double rate = 0.0;
};

/// Memory of whole pages.
class PageMemory {
 public:
  explicit PageMemory(int64_t bytes, bool huge = false);
  ~PageMemory();
  PageMemory(const PageMemory&) = delete;
  PageMemory& operator=(const PageMemory&) = delete;
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* map_ = nullptr;
  size_t mapped_ = 0;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

class Reader {
 public:
  /// Error: a file cannot be opened.
  Reader(const std::vector<std::filesystem::path>& files, ReadOptions options);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  /// Bytes of a buffer for these pieces: each widened to whole blocks of 4096 bytes.
  static int64_t buffer_bytes(std::span<const StoredPiece> pieces);

  /// The pieces of one expert under way.
  class Job {
   public:
    Job() = default;

   private:
    friend class Reader;
    struct Part {
      StoredPiece piece;
      std::byte* to = nullptr;     // where the widened read begins
      int64_t begin = 0, end = 0;  // widened, in the file
      int pending = 0;
      bool done = false, short_ = false;
      std::chrono::steady_clock::time_point start;
    };
    std::vector<Part> parts;
    std::string what;
  };
  /// Begins to read; `buffer` has buffer_bytes and is aligned to 4096. `what` names it in errors: "expert 3 of layer
  /// 1".
  void start(Job& job, std::vector<StoredPiece> pieces, std::byte* buffer, std::string what);
  /// Waits for one piece and returns its bytes, inside of the buffer. Error: the disk fails, or the file ends too
  /// early, naming `what`, file and offset.
  std::span<const std::byte> wait(Job& job, size_t piece);
  /// Pieces that have not been waited for.
  static size_t left(const Job& job);
  /// Waits until nothing is in flight, whatever comes of it: buffers may go then.
  void settle();

  int64_t bytes() const { return bytes_; }  ///< of pieces that were read
  bool direct() const { return direct_; }   ///< of all files
  bool uring() const { return ring_ != nullptr; }

 private:
  struct Ring;
  struct File;

  void read_plain(Job& job, Job::Part& part);
  void finish(Job::Part& part);
  [[noreturn]] void failed(const Job& job, const Job::Part& part, int64_t at, int error) const;

  std::vector<std::unique_ptr<File>> files_;
  std::unique_ptr<Ring> ring_;
  ReadOptions options_;
  int64_t bytes_ = 0;
  bool direct_ = true;
  std::chrono::steady_clock::time_point last_end_{};
};

}  // namespace moiety
