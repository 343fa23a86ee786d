#pragma once
// Images as bytes: PNG (through stb) and JPEG files (through libjpeg-turbo), and the IDX files of MNIST and its kin, plain or gzipped.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace moiety {

/// Pixels [height, width, channels], row by row, 0 ... 255; 1 channel is grey, 3 red, green, blue, 4 those and opacity.
struct Image {
  int64_t height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;
};

/// Decodes PNG or JPEG. `channels`: 0 as in the file, else 1, 3 or 4 to convert. Throws Error naming `where` for
/// damaged, truncated and other files, for sides above 16384 and for sizes that the number of bytes cannot hold.
Image decode_image(std::span<const std::byte> bytes, const std::string& where, int channels = 0);
Image read_image(const std::filesystem::path& path, int channels = 0);

/// An array of unsigned bytes from an IDX file: 4 bytes of magic (0, 0, 8, number of dimensions), the dimensions as
/// big-endian 32-bit integers, the values in row-major order.
struct IdxArray {
  std::vector<int64_t> shape;
  std::span<const uint8_t> data;
  std::shared_ptr<const void> owner;  ///< keeps `data`
};
/// `path` may be gzipped. Throws Error for other element types and when the size is not what the shape says.
IdxArray read_idx(const std::filesystem::path& path);
IdxArray parse_idx(std::span<const std::byte> bytes, const std::string& where,
                   std::shared_ptr<const void> owner = nullptr);

/// The bytes in a gzip file, when they are no more than `limit`; Error naming `where` when it is damaged or truncated.
std::vector<std::byte> gunzip(std::span<const std::byte> bytes, const std::string& where, uint64_t limit);

}  // namespace moiety
