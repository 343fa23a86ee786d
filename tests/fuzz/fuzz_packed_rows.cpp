// Matrices stored as codes of a few bits; bits, types and widths stand in the file's metadata.
// libFuzzer: -max_len=1024
#include "in_parts.h"
#include "moiety/io/packed_rows.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  moiety::fuzz::read_in_parts(std::as_bytes(std::span(data, size)), moiety::kPackedRows);
  return 0;
}
