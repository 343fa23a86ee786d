#pragma once
// TensorBoard event files: records of length, masked crc32c, an Event message, masked crc32c. The two messages are
// small enough to be written by hand.
#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moiety {

/// CRC-32C (Castagnoli), as in RFC 3720.
uint32_t crc32c(std::string_view bytes);

class EventFile {
 public:
  /// Replaces the file. Throws Error when it cannot be written.
  EventFile(const std::string& path, double wall_time);
  /// One event with the values (tag, number) of a step. Flushed.
  void scalars(double wall_time, int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  void record(std::string_view message);
  std::string path_;
  std::ofstream out_;
};

}  // namespace moiety
