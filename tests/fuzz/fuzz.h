#pragma once
// What all fuzz targets share. A reader may refuse its input with moiety::Error; anything else that leaves it is a
// finding.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>

#include "moiety/base/error.h"

namespace moiety::fuzz {

/// Runs `body`; an Error without a sentence is a finding too.
template <class Body>
bool accepted(const Body& body) {
  try {
    body();
    return true;
  } catch (const Error& error) {
    if (error.what()[0] == '\0') std::abort();
    return false;
  }
}

/// Stops with a finding unless `ok`.
inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "finding: %s\n", what);
  std::abort();
}

/// Takes the input apart.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  /// Up to the next NUL byte, or all that is left.
  std::string_view text() {
    size_t end = 0;
    while (end < size_ && data_[end] != 0) ++end;
    std::string_view out(reinterpret_cast<const char*>(data_), end);
    size_t used = end < size_ ? end + 1 : end;
    data_ += used;
    size_ -= used;
    return out;
  }
  std::span<const std::byte> rest() const { return std::as_bytes(std::span(data_, size_)); }
  std::string_view rest_text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace moiety::fuzz
