#include "moiety/train/event_file.h"

#include <array>
#include <cstring>

#include "moiety/base/error.h"

namespace moiety {
namespace {

std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? c >> 1 ^ 0x82F63B78u : c >> 1;
    table[i] = c;
  }
  return table;
}

uint32_t masked(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

template <class T>
void little_endian(std::string& out, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) out += static_cast<char>(value >> 8 * i & 0xFF);
}

// Protocol buffers: a key is field number * 8 + type (0 varint, 1 64 bits, 2 length and bytes, 5 32 bits).
void varint(std::string& out, uint64_t value) {
  for (; value >= 128; value >>= 7) out += static_cast<char>(value | 128);
  out += static_cast<char>(value);
}
void put_double(std::string& out, int field, double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  varint(out, static_cast<uint64_t>(field * 8 + 1));
  little_endian(out, bits);
}
void put_float(std::string& out, int field, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  varint(out, static_cast<uint64_t>(field * 8 + 5));
  little_endian(out, bits);
}
void put_integer(std::string& out, int field, int64_t value) {
  varint(out, static_cast<uint64_t>(field * 8));
  varint(out, static_cast<uint64_t>(value));
}
void put_bytes(std::string& out, int field, std::string_view bytes) {
  varint(out, static_cast<uint64_t>(field * 8 + 2));
  varint(out, bytes.size());
  out += bytes;
}

// Field numbers of tensorflow's event.proto and summary.proto.
constexpr int kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5;
constexpr int kValue = 1, kTag = 1, kSimpleValue = 2;

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  static const auto table = make_table();
  uint32_t c = 0xFFFFFFFFu;
  for (const char byte : bytes) c = table[(c ^ static_cast<unsigned char>(byte)) & 0xFF] ^ c >> 8;
  return ~c;
}

EventFile::EventFile(const std::string& path, double wall_time)
    : path_(path), out_(path, std::ios::binary | std::ios::trunc) {
  check(out_.good(), "cannot write {}", path);
  std::string event;
  put_double(event, kWallTime, wall_time);
  put_bytes(event, kFileVersion, "brain.Event:2");
  record(event);
}

void EventFile::scalars(double wall_time, int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;
  for (const auto& [tag, value] : values) {
    std::string one;
    put_bytes(one, kTag, tag);
    put_float(one, kSimpleValue, static_cast<float>(value));
    put_bytes(summary, kValue, one);
  }
  std::string event;
  put_double(event, kWallTime, wall_time);
  put_integer(event, kStep, step);
  put_bytes(event, kSummary, summary);
  record(event);
}

void EventFile::record(std::string_view message) {
  std::string out;
  little_endian(out, static_cast<uint64_t>(message.size()));
  little_endian(out, masked(std::string_view(out).substr(0, 8)));
  out += message;
  little_endian(out, masked(message));
  out_.write(out.data(), static_cast<std::streamsize>(out.size()));
  out_.flush();
  check(out_.good(), "cannot write {}", path_);
}

}  // namespace moiety
