// tokenizer.json and text. Input: a byte that picks a way, then
//   text for one of the tokenizers in tests/data/tokenizers, or a tokenizer.json, a NUL byte, and text for it, or
//   vocab.json (vocab.txt), merges.txt, tokenizer_config.json, each before a NUL byte, and text.
// libFuzzer: -max_len=1280
#include <algorithm>
#include <filesystem>

#include "fuzz.h"
#include "moiety/base/config.h"
#include "moiety/base/files.h"
#include "moiety/io/tokenizer.h"
#include "moiety/io/tokenizer_files.h"

using namespace moiety;

namespace {

using Tokenizers = std::vector<std::shared_ptr<const Tokenizer>>;

/// The fixtures of every kind, read once; run from the root of the checkout.
const Tokenizers& known() {
  static const Tokenizers all = [] {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator("tests/data/tokenizers"))
      if (entry.path().extension() == ".json") files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    Tokenizers out;
    for (const auto& file : files) out.push_back(Tokenizer::from_json(parse_json(read_text(file), file.string())));
    fuzz::require(!out.empty(), "no tokenizers in tests/data/tokenizers");
    return out;
  }();
  return all;
}

void use(const std::shared_ptr<const Tokenizer>& tokenizer, std::string_view text, uint8_t way) {
  bool add = (way & 1) != 0, parse = (way & 2) != 0, skip = (way & 4) != 0;
  auto ids = tokenizer->encode(text, add, parse);
  for (int64_t id : ids) {
    fuzz::require(id >= 0 && id < tokenizer->size(), "an id outside the vocabulary");
    tokenizer->piece(id);
    tokenizer->is_special(id);
  }
  std::string whole = tokenizer->decode(ids, skip), streamed;
  DecodeStream stream(tokenizer, skip);
  for (int64_t id : ids) streamed += stream.push(id);
  streamed += stream.flush();
  fuzz::require(streamed == whole, "streamed text that differs from the whole");
}

}  // namespace

// Reading the fixtures is no part of the first input's time.
extern "C" int LLVMFuzzerInitialize(int*, char***) {
  known();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  uint8_t choice = input.byte(), way = input.byte();
  const Tokenizers& fixed = known();
  if (choice >= 128) {
    use(fixed[choice % fixed.size()], input.rest_text(), way);
    return 0;
  }
  if (choice >= 96) {
    constexpr const char* kinds[] = {"GPT2", "Roberta", "Qwen2", "Bert"};
    VocabularyFiles files;
    files.kind = kinds[choice % 4];
    files.vocabulary = input.text();
    files.merges = input.text();
    fuzz::accepted([&] {
      std::string_view config = input.text();
      if (!config.empty()) files.config = parse_json(config, "config");
      HfTokenizer made = from_vocabulary(files, "fuzz");
      use(Tokenizer::from_json(made.tokenizer, made.config), input.rest_text(), way);
    });
    return 0;
  }
  std::string_view json = input.text();
  fuzz::accepted([&] { use(Tokenizer::from_json(parse_json(json, "tokenizer.json")), input.rest_text(), way); });
  return 0;
}
