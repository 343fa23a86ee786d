// GGUF: parse, read every key and tensor, and see the file as a Hugging Face model.
#include "fuzz.h"
#include "moiety/io/gguf.h"
#include "moiety/io/gguf_names.h"
#include "moiety/io/gguf_tokenizer.h"
#include "moiety/io/tokenizer.h"

using namespace moiety;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  auto bytes = std::as_bytes(std::span(data, size));
  std::shared_ptr<const GgufFile> file;
  if (!fuzz::accepted([&] { file = GgufFile::parse(bytes, "fuzz"); })) return 0;
  size_t way = 0;  // one way to ask for each key, in turn: refusals are slow under the sanitizers
  for (const auto& entry : file->metadata()) {
    const std::string& key = entry.first;
    fuzz::require(file->find(key) != nullptr, "a key that is listed and not found");
    fuzz::accepted([&] {
      switch (way++ % 6) {
        case 0:
          file->string(key);
          break;
        case 1:
          file->integer(key);
          break;
        case 2:
          file->number(key);
          break;
        case 3:
          file->boolean(key);
          break;
        case 4:
          file->numbers(key);
          break;
        default:
          file->strings(key);
      }
    });
  }
  for (const TensorInfo& info : file->tensors()) {
    fuzz::accepted([&] {
      TensorView view = file->get(info.name);
      fuzz::require(static_cast<int64_t>(view.data.size()) == info.bytes(), "a tensor of another size than its shape");
      view.to_float();
    });
    fuzz::accepted([&] { gguf_tensor_name("llama", hf_tensor_name("llama", info.name)); });
  }
  bool derived = fuzz::accepted([&] { hf_config(*file, true); });
  if (derived || file->find("moiety.config") != nullptr) fuzz::accepted([&] { hf_config(*file); });
  fuzz::accepted([&] { hf_generation_config(*file); });
  fuzz::accepted([&] { hf_tokenizer(*file); });
  fuzz::accepted([&] {
    auto tokenizer = Tokenizer::from_gguf(*file);
    tokenizer->decode(tokenizer->encode("Hello, wörld <s>\n\n 123"));
  });
  return 0;
}
