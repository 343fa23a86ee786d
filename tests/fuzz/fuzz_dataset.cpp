// Data files: text, JSONL, JSON, CSV, TSV, IDX. Input: three bytes that pick options, then the file.
// libFuzzer: -max_len=1024
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "fuzz.h"
#include "moiety/io/dataset.h"

using namespace moiety;

namespace {

/// The input as a file, for data sets are indexed files; one in memory, for disks are slow.
std::string write_input(std::string_view text) {
  static const int file = ::memfd_create("data", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  bool written =
      ::ftruncate(file, 0) == 0 && ::pwrite(file, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size());
  fuzz::require(written, "no memory for a file");
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
  std::string path = write_input(input.rest_text());
  std::shared_ptr<const Dataset> set;
  if (!fuzz::accepted([&] { set = Dataset::open(path, options); })) return 0;
  set->classes();
  for (int64_t i = 0; i < std::min<int64_t>(set->size(), 16); ++i) {
    fuzz::accepted([&] {
      Sample sample = set->get(i);
      bool answered = sample.answer < static_cast<int64_t>(std::max<size_t>(sample.choices.size(), 1));
      fuzz::require(answered, "an answer that is no choice");
    });
  }
  return 0;
}
