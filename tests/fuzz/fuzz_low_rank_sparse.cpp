// Matrices stored as low rank and a few rows, put together.
#include "in_parts.h"
#include "moiety/io/low_rank_sparse.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  moiety::fuzz::read_in_parts(std::as_bytes(std::span(data, size)), moiety::kLowRankSparse);
  return 0;
}
