#pragma once
// A file that appears under its name whole or not at all: written to a temporary name beside it, synced, renamed.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moiety {

/// Every member throws Error naming the path and the system's reason. A path that names a device or a pipe
/// (/dev/stdout) is written in place; a symbolic link keeps pointing to the file it points to; permissions of a
/// replaced file are kept.
class AtomicFile {
 public:
  /// Opens the temporary file. The folder must exist.
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();  ///< removes the temporary file unless committed
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  /// Replaces bytes written before, e.g. a header whose values are known only at the end.
  void write_at(int64_t offset, std::span<const std::byte> bytes);
  /// Bytes written so far.
  int64_t size() const { return size_; }

  /// Flushes, syncs and closes the temporary file; commit() then only renames. Lets a set of files appear together.
  void close();
  /// Puts the file under its name, or under `path` in the same file system.
  void commit();
  void commit(const std::filesystem::path& path);

 private:
  void flush();
  [[noreturn]] void fail_with(const char* what) const;

  std::filesystem::path path_, temporary_;  // temporary_ is empty when the target is written in place
  int fd_ = -1;
  int64_t size_ = 0;
  std::vector<std::byte> buffer_;
};

}  // namespace moiety
