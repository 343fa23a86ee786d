#pragma once
// Element and block formats of stored tensors: what one block holds and how many bytes it takes.
// A row of `cols` elements takes cols / block * bytes bytes; blocks never cross a row.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace moiety {

enum class Format : uint8_t {
  F32,
  F16,
  BF16,
  F64,
  I8,
  U8,
  I16,
  U16,
  I32,
  U32,
  I64,
  U64,
  BOOL,
  F8_E4M3,
  F8_E5M2,  // plain, one element a block
  Q8_0,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q4_K,
  Q5_K,
  Q6_K,
  TQ1_0,
  TQ2_0,
  MXFP4,  // GGUF blocks
};

struct FormatInfo {
  Format format;
  std::string_view name;  ///< as files write it: "Q4_K", "BF16"
  int block;              ///< elements per block
  int bytes;              ///< bytes per block
  int gguf_id;            ///< type number in a GGUF file, -1: GGUF cannot hold it
  bool can_quantize;      ///< quantize_row is implemented (true for F32, F16, BF16 too)
};

/// All formats, in enum order.
std::span<const FormatInfo> formats();
const FormatInfo& info(Format format);
/// Case-insensitive ("q4_k" and "Q4_K"); nullptr when there is no such format.
const FormatInfo* find_format(std::string_view name);
/// True for the GGUF block formats (several elements a block).
bool is_block(Format format);
/// Bytes of one row of `cols` elements. Throws Error when cols is not a multiple of the block.
int64_t row_bytes(Format format, int64_t cols);

/// Decodes one row of any real-valued or integer format into float32, in the operation order of the format's
/// definition.
void dequantize_row(Format format, const std::byte* blocks, float* out, int64_t cols);
/// Encodes one row. `importance` [cols] (optional) weights the squared error of the searching formats.
/// Throws Error, naming the element, for values that are not finite or a scale that overflows half. F32, F16 and BF16
/// keep infinities and NaN; F16 refuses finite values beyond its range.
void quantize_row(Format format, const float* x, std::byte* blocks, int64_t cols, const float* importance = nullptr);

}  // namespace moiety
