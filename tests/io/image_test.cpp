#include "moiety/io/image.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <zlib.h>

#include <cstring>

#include "message_of.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

std::span<const std::byte> bytes_of(const std::string& s) {
  return {reinterpret_cast<const std::byte*>(s.data()), s.size()};
}

std::string be32(uint32_t v) {
  return {static_cast<char>(v >> 24), static_cast<char>(v >> 16), static_cast<char>(v >> 8), static_cast<char>(v)};
}

std::string chunk(const std::string& type, const std::string& data) {
  const std::string body = type + data;
  return be32(static_cast<uint32_t>(data.size())) + body +
         be32(static_cast<uint32_t>(
             crc32(0, reinterpret_cast<const Bytef*>(body.data()), static_cast<uInt>(body.size()))));
}

// A PNG written here: 8 bits, colour type 0 (grey), 2 (RGB) or 6 (RGBA).
std::string png(uint32_t width, uint32_t height, int type, const std::string& pixels) {
  const size_t channels = type == 0 ? 1 : type == 2 ? 3 : 4;
  std::string raw;
  for (uint32_t y = 0; y < height && !pixels.empty(); ++y)
    raw += std::string(1, '\0') + pixels.substr(y * width * channels, width * channels);
  uLongf size = compressBound(raw.size());
  std::string packed(size, '\0');
  compress(reinterpret_cast<Bytef*>(packed.data()), &size, reinterpret_cast<const Bytef*>(raw.data()), raw.size());
  packed.resize(size);
  return "\x89PNG\r\n\x1a\n" +
         chunk("IHDR",
               be32(width) + be32(height) + std::string("\x08", 1) + static_cast<char>(type) + std::string(3, '\0')) +
         chunk("IDAT", packed) + chunk("IEND", "");
}

// quarters.jpg: 16 x 16 pixels, quarters of red, green, blue and grey, as a baseline JPEG that another program wrote.
const std::string folder = std::string(MOIETY_SOURCE_DIR) + "/tests/data/images/";

std::string gzip(const std::string& text) {
  z_stream z{};
  deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&z, text.size()), '\0');
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  z.avail_in = static_cast<uInt>(text.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  deflate(&z, Z_FINISH);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

TEST(Image, PngIsReadExactly) {
  const std::string rgb("\xff\x00\x00\x00\xff\x00\x00\x00\xff\x01\x02\x03\x04\x05\x06\x07\x08\x09", 18);
  const Image image = decode_image(bytes_of(png(3, 2, 2, rgb)), "x.png");
  EXPECT_EQ(image.height, 2);
  EXPECT_EQ(image.width, 3);
  EXPECT_EQ(image.channels, 3);
  EXPECT_EQ(std::string(image.pixels.begin(), image.pixels.end()), rgb);
  const Image grey = decode_image(bytes_of(png(3, 2, 2, rgb)), "x.png", 1);
  EXPECT_EQ(grey.pixels.size(), 6u);
  EXPECT_EQ(decode_image(bytes_of(png(2, 1, 0, "ab")), "x.png").channels, 1);
  EXPECT_EQ(decode_image(bytes_of(png(2, 1, 6, "abcdefgh")), "x.png").channels, 4);
  EXPECT_EQ(decode_image(bytes_of(png(2, 1, 6, "abcdefgh")), "x.png", 3).channels, 3);
}

// The format allows it; stb copies to a null pointer then.
TEST(Image, PngPixelsMayBeginWithEmptyParts) {
  const std::string good = png(2, 2, 0, "abcd"), empty = chunk("IDAT", "");
  const std::string head = good.substr(0, 33), rest = good.substr(33);
  const Image image = decode_image(bytes_of(head + empty + empty + rest), "x.png");
  EXPECT_EQ(std::string(image.pixels.begin(), image.pixels.end()), "abcd");
  const std::string none = head + empty + chunk("IEND", "");
  EXPECT_NE(message_of([&] { decode_image(bytes_of(none), "none.png"); }).find("none.png cannot be read"),
            std::string::npos);
}

TEST(Image, JpegIsReadClosely) {
  const Image image = read_image(folder + "quarters.jpg");
  ASSERT_EQ(image.height, 16);
  ASSERT_EQ(image.width, 16);
  ASSERT_EQ(image.channels, 3);
  const auto pixel = [&](int y, int x, int c) {
    return static_cast<int>(image.pixels[static_cast<size_t>((y * 16 + x) * 3 + c)]);
  };
  EXPECT_GT(pixel(3, 3, 0), 200);
  EXPECT_LT(pixel(3, 3, 1), 60);
  EXPECT_GT(pixel(3, 12, 1), 200);
  EXPECT_GT(pixel(12, 3, 2), 200);
  EXPECT_NEAR(pixel(12, 12, 0), 128, 12);
}

TEST(Image, DamageIsOneSentence) {
  const std::string good = png(3, 2, 2, std::string(18, 'x'));
  for (size_t size = 0; size < good.size(); ++size) {
    const std::string cut = good.substr(0, size);
    EXPECT_NE(message_of([&] { decode_image(bytes_of(cut), "cut.png"); }).find("cut.png"), std::string::npos) << size;
  }
  const std::string jpeg = read_text(folder + "quarters.jpg");
  for (size_t size = 0; size < jpeg.size(); size += 7) {
    const std::string cut = jpeg.substr(0, size);
    EXPECT_NE(message_of([&] { decode_image(bytes_of(cut), "cut.jpg"); }).find("cut.jpg"), std::string::npos) << size;
  }
  EXPECT_NE(message_of([&] { decode_image(bytes_of("GIF89a......"), "a.gif"); }).find("neither a PNG nor a JPEG"),
            std::string::npos);
  EXPECT_NE(message_of([&] { decode_image(bytes_of(png(60000, 60000, 2, "")), "big.png"); }), "");
  EXPECT_NE(message_of([&] { decode_image(bytes_of(png(16000, 16000, 6, "")), "bomb.png"); }).find("cannot hold"),
            std::string::npos);
  EXPECT_THROW(decode_image(bytes_of(good), "x", 2), Error);
}

// Code lengths that no Huffman code has: a decoder that trusts them writes past its tables.
TEST(Image, JpegHuffmanTablesAreChecked) {
  const std::string good = read_text(folder + "quarters.jpg");
  int tables = 0;
  for (size_t at = good.find("\xff\xc4"); at != std::string::npos; at = good.find("\xff\xc4", at + 2)) {
    ++tables;
    for (const std::string& counts : {std::string(16, '\xff'), std::string(1, '\x0c') + std::string(15, '\0'),
                                      std::string(15, '\0') + std::string(1, '\xff')}) {
      std::string bad = good;
      bad.replace(at + 5, 16, counts);
      EXPECT_NE(message_of([&] { decode_image(bytes_of(bad), "bad.jpg"); }).find("bad.jpg cannot be read"),
                std::string::npos)
          << at;
    }
  }
  EXPECT_GT(tables, 0);
}

RC_GTEST_PROP(Image, FlippedBytesEndInPixelsOrError, ()) {
  std::string data =
      *rc::gen::arbitrary<bool>() ? png(5, 4, 2, std::string(60, 'q')) : read_text(folder + "quarters.jpg");
  const auto flips =
      *rc::gen::container<std::vector<std::pair<uint16_t, char>>>(rc::gen::arbitrary<std::pair<uint16_t, char>>());
  for (const auto& [at, value] : flips) data[at % data.size()] = value;
  try {
    const Image image = decode_image(bytes_of(data), "x");
    RC_ASSERT(image.pixels.size() == static_cast<size_t>(image.height * image.width * image.channels));
  } catch (const Error&) {
  }
}

TEST(Idx, ReadsPlainAndGzipped) {
  const std::string idx = std::string("\0\0\x08\x03", 4) + be32(2) + be32(2) + be32(3) + "abcdefghijkl";
  const TemporaryFolder folder_here;
  for (const auto& text : {idx, gzip(idx)}) {
    write_file(folder_here / "x-idx3-ubyte", text);
    const IdxArray array = read_idx(folder_here / "x-idx3-ubyte");
    EXPECT_EQ(array.shape, (std::vector<int64_t>{2, 2, 3}));
    EXPECT_EQ(std::string(array.data.begin(), array.data.end()), "abcdefghijkl");
  }
}

TEST(Idx, DamageIsOneSentence) {
  const std::string idx = std::string("\0\0\x08\x02", 4) + be32(2) + be32(3) + "abcdef";
  for (size_t size = 0; size < idx.size(); ++size)
    EXPECT_NE(message_of([&] { parse_idx(bytes_of(idx.substr(0, size)), "cut"); }).find("cut"), std::string::npos)
        << size;
  EXPECT_NE(message_of([&] { parse_idx(bytes_of(idx + "g"), "long"); }).find("needs 6 bytes of data, the file has 7"),
            std::string::npos);
  EXPECT_NE(message_of([&] { parse_idx(bytes_of(std::string("\0\0\x0d\x01", 4) + be32(0)), "floats"); }).find("0x0d"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              parse_idx(bytes_of(std::string("\0\0\x08\x04", 4) + be32(0xFFFFFFFF) + be32(0xFFFFFFFF) +
                                 be32(0xFFFFFFFF) + be32(1)),
                        "huge");
            }).find("64 bits"),
            std::string::npos);
  EXPECT_NE(message_of([&] { parse_idx(bytes_of("PK\3\4"), "zip"); }).find("no IDX"), std::string::npos);
  const std::string packed = gzip(idx + std::string(1000, 'x'));
  for (size_t size = 0; size < packed.size(); ++size)
    EXPECT_NE(message_of([&] { gunzip(bytes_of(packed.substr(0, size)), "cut.gz", 1 << 20); }).find("cut.gz"),
              std::string::npos)
        << size;
  EXPECT_NE(message_of([&] { gunzip(bytes_of(packed), "bomb.gz", 100); }).find("more than 100"), std::string::npos);
  EXPECT_EQ(gunzip(bytes_of(gzip("ab") + gzip("cd")), "two.gz", 100).size(), 4u);
  std::string broken = packed;
  broken[broken.size() - 6] = static_cast<char>(broken[broken.size() - 6] ^ 1);
  EXPECT_NE(message_of([&] { gunzip(bytes_of(broken), "crc.gz", 1 << 20); }).find("damaged"), std::string::npos);
}

}  // namespace
}  // namespace moiety
