#pragma once
// Matrices whose rows lie on grids of 2^bits values, stored as codes (EAQuant, arXiv 2506.13329): of NAME [.., out, in]
// a file holds NAME.q [.., out, ceil(in bits / 8)] uint8, NAME.scale and NAME.zero [.., out, 1] f32. Element j of a row
// is (q_j - zero) scale in f32, rounded to the type that the matrix had. Code j takes the bits [j bits, (j + 1) bits)
// of its row, from the lowest of the first byte on, and what is left of the last byte is 0: four bits are two codes a
// byte, low nibble first. The config says so with a section `moiety.packed_rows`: bits and dtype, and under `tensors`
// what is different for one NAME: its dtype, and its width `in` where that is not the most that its bytes can hold.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "moiety/io/whole_matrices.h"

namespace moiety {

inline constexpr const char* kPackedRows = "packed_rows";  ///< the section of `moiety` in a config

/// Matrices come whole in the type that they had. Error: bits outside 2 to 16, tensors that do not fit together; when
/// one is asked for also bits behind the last code of a row, a scale that is not positive, a zero that is not whole.
MatrixForm packed_rows_form();

/// Codes of one row; `out`: packed_row_bytes().
void pack_row(std::span<const int32_t> codes, int64_t bits, std::byte* out);
int64_t packed_row_bytes(int64_t width, int64_t bits);

/// What a file holds of matrices with codes of `bits` bits.
class PackedRows {
 public:
  explicit PackedRows(int64_t bits);
  /// The matrix `info`, F32, F16 or BF16 in two dimensions or more: its codes row by row, and scale and zero of every
  /// row. Error: counts that do not fit, a code out of range.
  void add(const TensorInfo& info, std::span<const int32_t> codes, std::vector<float> scale, std::vector<float> zero);
  const std::vector<OverlayTensor>& tensors() const { return tensors_; }
  std::set<std::string> names() const;  ///< of the matrices
  nlohmann::json section() const;

 private:
  int64_t bits_;
  std::vector<OverlayTensor> tensors_;
  std::vector<TensorInfo> matrices_;
};

}  // namespace moiety
