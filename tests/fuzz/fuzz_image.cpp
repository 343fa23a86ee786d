// PNG and JPEG, IDX, gzip. Input: a byte that picks the format and channels, then the file.
#include "fuzz.h"
#include "moiety/io/image.h"

using namespace moiety;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  uint8_t choice = input.byte();
  auto bytes = input.rest();
  fuzz::accepted([&] {
    if (choice < 192) {
      constexpr int channels[] = {0, 1, 3, 4};
      Image image = decode_image(bytes, "fuzz", channels[choice % 4]);
      auto expected = static_cast<size_t>(image.height * image.width * image.channels);
      fuzz::require(image.pixels.size() == expected, "another number of pixels than the shape says");
    } else if (choice < 224) {
      IdxArray array = parse_idx(bytes, "fuzz");
      size_t count = 1;
      for (int64_t n : array.shape) count *= static_cast<size_t>(n);
      fuzz::require(array.data.size() == count, "another number of values than the shape says");
    } else {
      gunzip(bytes, "fuzz", 1 << 20);
    }
  });
  return 0;
}
