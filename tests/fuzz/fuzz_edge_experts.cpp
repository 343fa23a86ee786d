// Experts of their own bit widths beside a model file: the GGUF file, its length in the last four bytes, then the
// experts' file.
// libFuzzer: -max_len=4096
#include <algorithm>
#include <cstring>
#include <vector>

#include "folder.h"
#include "fuzz.h"
#include "moiety/io/edge_experts.h"

using namespace moiety;
namespace fs = std::filesystem;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fuzz::Folder folder("edge");
  if (size < 4) return 0;
  uint32_t length = 0;
  std::memcpy(&length, data + size - 4, 4);
  size -= 4;
  const size_t model_size = std::min<size_t>(length, size);
  const auto all = std::as_bytes(std::span(data, size));
  const fs::path path = folder.path / "m.gguf";
  fuzz::put(edge_experts_path(path), data + model_size, size - model_size);
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
