// Safetensors: parse, then read every tensor.
#include "fuzz.h"
#include "moiety/io/safetensors.h"

using namespace moiety;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  auto bytes = std::as_bytes(std::span(data, size));
  fuzz::accepted([&] {
    auto file = SafetensorsFile::parse(bytes, "fuzz");
    for (const TensorInfo& info : file->tensors()) {
      TensorView view = file->get(info.name);
      bool inside = view.data.empty() || (view.data.data() >= bytes.data() &&
                                          view.data.data() + view.data.size() <= bytes.data() + bytes.size());
      fuzz::require(inside, "a tensor outside the file");
      fuzz::require(static_cast<int64_t>(view.data.size()) == info.bytes(), "a tensor of another size than its shape");
      auto values = view.to_float();
      fuzz::require(static_cast<int64_t>(values.size()) == info.elements(), "another number of values than elements");
    }
    fuzz::require(!file->has("") || file->get("").name.empty(), "a tensor under another name");
  });
  return 0;
}
