#pragma once
// A file mapped read-only. Views into it keep it alive through the shared pointer.
#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>

namespace moiety {

class MappedFile {
 public:
  /// Throws Error when the file is missing, not a regular file, or cannot be mapped. An empty file gives empty bytes.
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }

  /// Where a byte of memory lies, if in a file that is mapped now.
  struct Location {
    std::filesystem::path path;
    size_t offset = 0;                 ///< in the file
    std::span<const std::byte> whole;  ///< the mapping
  };
  static std::optional<Location> locate(const std::byte* byte);

  /// Copies to `to` what lies at `from`: of a mapped file by reading it, which costs a fraction of looking at its pages
  /// one by one and keeps none of them in the process. Error: the file is shorter than it was, the disk fails.
  static void copy(const std::byte* from, std::span<std::byte> to);

  /// From now on a page of a mapped file that cannot be read any more, because somebody cut the file short or the disk
  /// fails, ends the process with exit code 1 and a sentence on stderr that begins with `who` and names the file,
  /// instead of a bare SIGBUS. Other causes of that signal stay what they are. Linux gives no other way out: the
  /// instruction that read the page cannot go on.
  static void explain_lost_pages(const char* who);

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;  // of copy()
};

}  // namespace moiety
