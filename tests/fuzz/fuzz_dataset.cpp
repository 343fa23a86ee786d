// Data files: text, JSONL, JSON, CSV, TSV, IDX. Input: three bytes that pick options, then the file.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "fuzz.h"
#include "moiety/base/config.h"
#include "moiety/base/files.h"
#include "moiety/io/dataset.h"

using namespace moiety;

namespace {

/// The input as a file, for data sets are indexed files.
std::filesystem::path write_input(std::string_view text) {
  static const TemporaryFolder folder("moiety-fuzz");
  std::filesystem::path path = folder / "data";
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(text.data(), static_cast<std::streamsize>(text.size()));
  return path;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr const char* formats[] = {"auto", "text", "jsonl", "json", "csv", "tsv", "idx", "images"};
  constexpr const char* documents[] = {"file", "line", "paragraph", "\n\n", "<|end|>"};
  constexpr const char* kinds[] = {"auto", "text", "completion", "chat", "choice"};
  fuzz::Input input(data, size);
  DataOptions options;
  options.format = formats[input.byte() % 8];
  options.document = documents[input.byte() % 5];
  uint8_t choice = input.byte();
  options.kind = kinds[choice % 5];
  options.header = choice < 128;
  auto path = write_input(input.rest_text());
  std::shared_ptr<const Dataset> set;
  if (!fuzz::accepted([&] { set = Dataset::open(path.string(), options); })) return 0;
  set->classes();
  for (int64_t i = 0; i < std::min<int64_t>(set->size(), 64); ++i) {
    fuzz::accepted([&] {
      Sample sample = set->get(i);
      bool answered = sample.answer < static_cast<int64_t>(std::max<size_t>(sample.choices.size(), 1));
      fuzz::require(answered, "an answer that is no choice");
    });
  }
  return 0;
}
