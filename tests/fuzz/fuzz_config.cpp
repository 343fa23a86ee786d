// config.json of Hugging Face: parse, and everything that is derived from it without a model.
#include "fuzz.h"
#include "moiety/base/config.h"
#include "moiety/io/gguf_names.h"

using namespace moiety;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  nlohmann::json config;
  if (!fuzz::accepted([&] { config = parse_json(text, "config.json"); })) return 0;
  fuzz::accepted([&] { gguf_arch_of(config); });
  fuzz::accepted([&] { text_config(config); });
  fuzz::accepted([&] { rope_parameters(config); });
  fuzz::accepted([&] { rope_parameters(config, "sliding_attention", 5e5); });
  fuzz::accepted([&] { llama3_rope_freqs(config); });
  fuzz::accepted([&] {
    GgufWriter writer("/dev/null");
    write_gguf_config(writer, config);
  });
  return 0;
}
