// Compressed task vectors: parse, then decode signs and values of those that are small, and encode them again.
// libFuzzer: -max_len=4096
#include "fuzz.h"
#include "moiety/io/task_vector.h"

using namespace moiety;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  fuzz::accepted([&] {
    const auto file = TaskVectorFile::parse(bytes, "fuzz");
    const TaskVectorHeader& h = file->header();
    for (const TensorInfo& t : file->others()) file->other(t.name).to_float();
    if (h.form == "dense" || h.form == "prune") {
      const auto values = file->values();
      fuzz::require(static_cast<int64_t>(values.size()) == (h.form == "dense" ? h.d : h.kept),
                    "another count of values");
    }
    // A caller compares d with a model before it asks for the signs.
    if (h.form == "dense" || h.d > 1 << 20) return;
    const TernaryMasks masks = file->masks();
    fuzz::require(masks.d == h.d && masks.kept() == h.kept, "other counts than the header's");
    for (size_t i = 0; i < masks.positive.size(); ++i)
      fuzz::require((masks.positive[i] & masks.negative[i]) == 0, "an entry of both signs");
    const bool signs = h.form != "prune";
    const auto code = golomb_encode(masks, h.b, signs);
    fuzz::require(golomb_decode(code.bytes, h.d, h.kept, h.b, signs) == masks, "signs that do not come back");
  });
  return 0;
}
