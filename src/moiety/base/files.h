#pragma once
// Whole small files: crash-safe writing, bounded reading, temporary folders.
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace moiety {

/// The file is there whole or as it was before (see AtomicFile). Throws Error.
void write_file(const std::filesystem::path& path, std::string_view text);

/// The bytes of a file. Throws Error when it is missing, a folder, or larger than `limit` bytes (also for pipes, "-" is
/// not special).
std::string read_text(const std::filesystem::path& path, int64_t limit = int64_t{64} << 20);

/// Where things are kept that can be made again: $MOIETY_CACHE, $XDG_CACHE_HOME/moiety or ~/.cache/moiety. Error when
/// none of these is set.
std::filesystem::path cache_folder();

/// A fresh folder below the system's temporary folder, removed with everything in it at the end.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& prefix = "moiety");
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace moiety
