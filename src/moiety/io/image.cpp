#include "moiety/io/image.h"

#include <turbojpeg.h>
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "moiety/base/error.h"
#include "moiety/io/mapped_file.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_NO_STDIO
#define STBI_ONLY_PNG
#define STBI_MAX_DIMENSIONS 16384
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

namespace moiety {

namespace {

// The most that deflate packs into a byte.
constexpr uint64_t deflate_ratio = 1032;
// The most pixels that a byte of a JPEG holds: a block of 64 takes at least a bit.
constexpr uint64_t jpeg_ratio = 512;
constexpr int max_side = STBI_MAX_DIMENSIONS;

bool starts(std::span<const std::byte> bytes, std::initializer_list<int> magic) {
  if (bytes.size() < magic.size()) return false;
  return std::equal(magic.begin(), magic.end(), bytes.begin(),
                    [](int a, std::byte b) { return a == static_cast<int>(b); });
}

uint32_t big_endian(std::span<const std::byte> bytes, size_t at) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<uint32_t>(bytes[at + i]);
  return value;
}

void check_sides(int width, int height, const std::string& where) {
  check(width > 0 && height > 0 && width <= max_side && height <= max_side,
        "{} says it has {} x {} pixels: sides from 1 to {} are read", where, width, height, max_side);
}

[[noreturn]] void too_many_pixels(int width, int height, size_t bytes, const std::string& where) {
  fail("{} says it has {} x {} pixels, which its {} bytes cannot hold", where, width, height, bytes);
}

// The parts of a PNG up to its end, for stb takes a cut file in places. Pixels may begin with empty parts, which stb
// would copy to a null pointer: these are left out of `without`, which stays empty when there are none.
bool find_png_end(std::span<const std::byte> bytes, std::vector<std::byte>& without) {
  for (size_t at = 8; bytes.size() >= 12 && at <= bytes.size() - 12;) {
    const uint64_t length = big_endian(bytes, at);
    const auto is = [&](const char* kind) { return std::memcmp(bytes.data() + at + 4, kind, 4) == 0; };
    const bool end = is("IEND"), drop = length == 0 && is("IDAT");
    if (!end && length > bytes.size() - at - 12) return false;
    const size_t next = end ? bytes.size() : at + length + 12;
    if (drop && without.empty()) {
      without.assign(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(at));
    } else if (!drop && !without.empty()) {
      const auto part = bytes.subspan(at, next - at);
      without.insert(without.end(), part.begin(), part.end());
    }
    if (end) return true;
    at = next;
  }
  return false;
}

Image decode_png(std::span<const std::byte> bytes, const std::string& where, int channels) {
  std::vector<std::byte> without;
  check(find_png_end(bytes, without), "{} is truncated: the image's end is missing", where);
  if (!without.empty()) bytes = without;
  const auto* data = reinterpret_cast<const stbi_uc*>(bytes.data());
  const int size = static_cast<int>(bytes.size());
  int width = 0, height = 0, found = 0;
  const auto reason = [] { return stbi_failure_reason() ? stbi_failure_reason() : "damaged"; };
  check(stbi_info_from_memory(data, size, &width, &height, &found) != 0, "{} cannot be read: {}", where, reason());
  check_sides(width, height, where);
  // The header comes first: bits of a sample at byte 24, kind of pixel at 25. (Apple's variant has another part
  // before.)
  check(std::memcmp(bytes.data() + 12, "IHDR", 4) == 0, "{} does not begin with the part IHDR of a PNG", where);
  const int depth = static_cast<int>(bytes[24]), kind = static_cast<int>(bytes[25]);
  const int samples = kind == 2 ? 3 : kind == 4 ? 2 : kind == 6 ? 4 : 1;
  const uint64_t row = (static_cast<uint64_t>(width) * static_cast<uint64_t>(depth * samples) + 7) / 8 + 1;
  if (row * static_cast<uint64_t>(height) > bytes.size() * deflate_ratio)
    too_many_pixels(width, height, bytes.size(), where);
  // Grey with opacity becomes grey.
  const int wanted = channels ? channels : found == 2 ? 1 : found;
  struct Free {
    void operator()(stbi_uc* p) const { stbi_image_free(p); }
  };
  const std::unique_ptr<stbi_uc, Free> pixels(stbi_load_from_memory(data, size, &width, &height, &found, wanted));
  check(pixels != nullptr, "{} cannot be read: {}", where, reason());
  Image image{height, width, wanted, {}};
  const size_t count = static_cast<size_t>(height) * static_cast<size_t>(width) * static_cast<size_t>(wanted);
  image.pixels.assign(pixels.get(), pixels.get() + count);
  return image;
}

Image decode_jpeg(std::span<const std::byte> bytes, const std::string& where, int channels) {
  struct Close {
    void operator()(void* p) const { tjDestroy(p); }
  };
  const std::unique_ptr<void, Close> decoder(tjInitDecompress());
  check(decoder != nullptr, "{}: libjpeg cannot start", where);
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
  const auto size = static_cast<unsigned long>(bytes.size());
  const auto reason = [&] { return std::string(tjGetErrorStr2(decoder.get())); };
  int width = 0, height = 0, sampling = 0, colors = 0;
  check(tjDecompressHeader3(decoder.get(), data, size, &width, &height, &sampling, &colors) == 0,
        "{} cannot be read: {}", where, reason());
  check_sides(width, height, where);
  if (static_cast<uint64_t>(width) * static_cast<uint64_t>(height) > bytes.size() * jpeg_ratio)
    too_many_pixels(width, height, bytes.size(), where);
  check(colors != TJCS_CMYK && colors != TJCS_YCCK, "{} has the colours of print (CMYK): grey or RGB are read", where);
  const int wanted = channels ? channels : colors == TJCS_GRAY ? 1 : 3;
  Image image{height, width, wanted, {}};
  image.pixels.resize(static_cast<size_t>(height) * static_cast<size_t>(width) * static_cast<size_t>(wanted));
  const int format = wanted == 1 ? TJPF_GRAY : wanted == 3 ? TJPF_RGB : TJPF_RGBA;
  const int flags = TJFLAG_ACCURATEDCT | TJFLAG_LIMITSCANS;
  if (tjDecompress2(decoder.get(), data, size, image.pixels.data(), width, 0, height, format, flags) != 0) {
    // Of what libjpeg only warns of, bytes between the parts do no harm; the rest means damage.
    const bool harmless =
        tjGetErrorCode(decoder.get()) == TJERR_WARNING && reason().find("extraneous") != std::string::npos;
    check(harmless, "{} cannot be read: {}", where, reason());
  }
  return image;
}

}  // namespace

Image decode_image(std::span<const std::byte> bytes, const std::string& where, int channels) {
  check(channels == 0 || channels == 1 || channels == 3 || channels == 4, "an image has 1, 3 or 4 channels, not {}",
        channels);
  const bool png = starts(bytes, {0x89, 'P', 'N', 'G', 0x0D, 0x0A, 0x1A, 0x0A});
  check(png || starts(bytes, {0xFF, 0xD8, 0xFF}), "{} is neither a PNG nor a JPEG image", where);
  check(bytes.size() <= (uint64_t{1} << 30), "{} is larger than 1 GiB", where);
  return png ? decode_png(bytes, where, channels) : decode_jpeg(bytes, where, channels);
}

Image read_image(const std::filesystem::path& path, int channels) {
  return decode_image(MappedFile::open(path)->bytes(), path.string(), channels);
}

std::vector<std::byte> gunzip(std::span<const std::byte> bytes, const std::string& where, uint64_t limit) {
  z_stream stream{};
  check(inflateInit2(&stream, 15 + 16) == Z_OK, "{}: zlib cannot start", where);
  struct End {
    ~End() { inflateEnd(&stream); }
    z_stream& stream;
  } end{stream};
  std::vector<std::byte> out;
  std::vector<std::byte> piece(1 << 16);
  size_t given = 0;
  int state = Z_OK;
  while (true) {
    if (stream.avail_in == 0 && given < bytes.size()) {
      const size_t take = std::min<size_t>(bytes.size() - given, 1 << 30);
      stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(bytes.data() + given));
      stream.avail_in = static_cast<uInt>(take);
      given += take;
    }
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = static_cast<uInt>(piece.size());
    state = inflate(&stream, Z_NO_FLUSH);
    const size_t made = piece.size() - stream.avail_out;
    check(out.size() + made <= limit, "{} unpacks to more than {} bytes", where, limit);
    out.insert(out.end(), piece.begin(), piece.begin() + static_cast<std::ptrdiff_t>(made));
    if (state == Z_STREAM_END) {
      // More members may follow; what is no gzip behind the last one is ignored, as gzip does.
      const bool more = stream.avail_in >= 2 && stream.next_in[0] == 0x1F && stream.next_in[1] == 0x8B;
      if (!more) return out;
      check(inflateReset(&stream) == Z_OK, "{}: zlib cannot go on", where);
      continue;
    }
    check(state == Z_OK || state == Z_BUF_ERROR, "{} is a damaged gzip file: {}", where,
          stream.msg ? stream.msg : "bad data");
    check(made > 0 || stream.avail_in > 0 || given < bytes.size(), "{} is a truncated gzip file", where);
    check(!(state == Z_BUF_ERROR && made == 0), "{} is a truncated gzip file", where);
  }
}

IdxArray parse_idx(std::span<const std::byte> bytes, const std::string& where, std::shared_ptr<const void> owner) {
  check(bytes.size() >= 4, "{} is truncated: an IDX file has at least 4 bytes", where);
  check(bytes[0] == std::byte{0} && bytes[1] == std::byte{0},
        "{} is no IDX file: it does not begin with two zero bytes", where);
  const int type = static_cast<int>(bytes[2]);
  const auto dimensions = static_cast<size_t>(bytes[3]);
  check(type == 8, "{}: IDX element type 0x{:02x} is not supported: only unsigned bytes (0x08) are", where, type);
  check(dimensions >= 1 && dimensions <= 4, "{}: {} dimensions, but 1 to 4 are read", where, dimensions);
  const size_t header = 4 + 4 * dimensions;
  check(bytes.size() >= header, "{} is truncated: its header needs {} bytes, it has {}", where, header, bytes.size());
  IdxArray array;
  uint64_t count = 1;
  for (size_t i = 0; i < dimensions; ++i) {
    const uint32_t side = big_endian(bytes, 4 + 4 * i);
    array.shape.push_back(side);
    check(!__builtin_mul_overflow(count, uint64_t{side}, &count), "{}: the shape's product exceeds 64 bits", where);
  }
  check(bytes.size() - header == count, "{}: its shape needs {} bytes of data, the file has {}", where, count,
        bytes.size() - header);
  array.data = {reinterpret_cast<const uint8_t*>(bytes.data()) + header, static_cast<size_t>(count)};
  array.owner = std::move(owner);
  return array;
}

IdxArray read_idx(const std::filesystem::path& path) {
  const auto file = MappedFile::open(path);
  const auto bytes = file->bytes();
  if (!starts(bytes, {0x1F, 0x8B})) return parse_idx(bytes, path.string(), file);
  auto unpacked =
      std::make_shared<std::vector<std::byte>>(gunzip(bytes, path.string(), bytes.size() * deflate_ratio + 64));
  const std::span<const std::byte> view = *unpacked;
  return parse_idx(view, path.string(), std::move(unpacked));
}

}  // namespace moiety
