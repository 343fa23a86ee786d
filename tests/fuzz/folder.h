#pragma once
// A folder for readers that open files by name: in memory where the system has such a place, gone at the end.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace moiety::fuzz {

struct Folder {
  std::filesystem::path path;
  explicit Folder(const std::string& name) {
    const std::filesystem::path memory = "/dev/shm";
    const auto top = std::filesystem::is_directory(memory) ? memory : std::filesystem::temp_directory_path();
    path = top / ("moiety-fuzz-" + name + "-" + std::to_string(::getpid()));
    std::filesystem::create_directories(path);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
};

inline void put(const std::filesystem::path& file, const void* data, size_t size) {
  std::ofstream(file, std::ios::binary | std::ios::trunc)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

}  // namespace moiety::fuzz
