// Experts of their own bit widths beside a model file: the GGUF file, its length in the last four bytes, then the
// experts' file.
// libFuzzer: -max_len=4096
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "fuzz.h"
#include "moiety/io/edge_experts.h"

using namespace moiety;
namespace fs = std::filesystem;

namespace {

struct Place {
  fs::path folder;
  Place() {
    const fs::path memory = "/dev/shm";
    folder = (fs::is_directory(memory) ? memory : fs::temp_directory_path()) /
             ("moiety-fuzz-edge-" + std::to_string(::getpid()));
    fs::create_directories(folder);
  }
  ~Place() {
    std::error_code ignored;
    fs::remove_all(folder, ignored);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Place place;
  if (size < 4) return 0;
  uint32_t length = 0;
  std::memcpy(&length, data + size - 4, 4);
  size -= 4;
  const size_t model_size = std::min<size_t>(length, size);
  const auto all = std::as_bytes(std::span(data, size));
  const fs::path path = place.folder / "m.gguf";
  std::ofstream(edge_experts_path(path), std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(data) + model_size, static_cast<std::streamsize>(size - model_size));
  fuzz::accepted([&] {
    const auto model = GgufFile::parse(all.first(model_size), "fuzz");
    const auto experts = EdgeExperts::open(*model, path);
    if (!experts) return;
    const EdgeLayout& l = experts->layout();
    const int64_t bytes = experts->matrix_bytes();
    fuzz::require(bytes <= 64 * static_cast<int64_t>(size), "matrices that the file cannot hold");
    std::vector<std::byte> out(static_cast<size_t>(3 * bytes));
    for (int64_t layer = 0; layer < l.layers(); ++layer)
      for (int64_t e = 0; e < l.experts; ++e) {
        const auto stored = experts->stored(layer, e);
        fuzz::require(static_cast<int64_t>(stored.size()) == l.stored_bytes(l.bits[layer * l.experts + e]),
                      "an expert of another size than its width has");
        experts->decode(layer, e, stored, {out.data(), out.data() + bytes, out.data() + 2 * bytes});
      }
  });
  return 0;
}
