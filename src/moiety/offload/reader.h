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

  /// Bytes of a buffer for this piece: widened to whole blocks of 4096 bytes.
  static int64_t buffer_bytes(const StoredPiece& piece);

  /// One piece under way. Stays where it is until next() has returned it.
  class Read {
   public:
    /// What was read, inside of the buffer, once next() has returned it.
    std::span<const std::byte> bytes() const {
      return {to_ + (piece_.offset - begin_), static_cast<size_t>(piece_.bytes)};
    }

   private:
    friend class Reader;
    StoredPiece piece_;
    std::string what_;
    std::byte* to_ = nullptr;                  // where the widened read begins
    int64_t begin_ = 0, end_ = 0, asked_ = 0;  // widened, in the file; requests go as far as asked_
    int pending_ = 0;
    bool ahead_ = false, short_ = false;
    std::chrono::steady_clock::time_point start_;
  };
  /// Begins to read; `buffer` has buffer_bytes and is aligned to 4096. `what` names it in errors: "expert 3 of layer
  /// 1". What is read `ahead` asks the disk only for a little at a time, and only where nothing else is left to ask
  /// for: what is not waits for little.
  void start(Read& read, const StoredPiece& piece, std::byte* buffer, std::string what, bool ahead);
  /// Waits until a read is complete: the one that began first of those that are. Error: the disk fails, or the file
  /// ends too early, naming `what`, file and offset.
  Read& next();
  /// Reads that next() has not returned.
  size_t flying() const { return reads_.size(); }
  /// Waits until nothing is in flight, whatever comes of it: buffers may go then.
  void settle();

  bool direct() const { return direct_; }  ///< of all files
  bool uring() const { return ring_ != nullptr; }

 private:
  struct Ring;
  struct File;

  void ask();
  void reap();
  void read_plain(Read& read);
  void pace(const Read& read);
  [[noreturn]] void failed(const Read& read, int64_t at, int error) const;

  std::vector<std::unique_ptr<File>> files_;
  std::unique_ptr<Ring> ring_;
  ReadOptions options_;
  std::vector<Read*> reads_;  // in the order of their beginning
  bool direct_ = true;
  std::chrono::steady_clock::time_point last_end_{};
};

}  // namespace moiety
