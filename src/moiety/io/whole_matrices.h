#pragma once
// Matrices that are stored in parts and whole wherever they are read: a section of `moiety` in the config says so, and
// a matrix is made when it is asked for. Each form is one file beside this one: low_rank_sparse.h, packed_rows.h.
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "moiety/io/overlay.h"

namespace moiety {

/// A matrix of tensors whose names begin with `stem`; their infos in the order of MatrixForm::parts. Error: they do not
/// fit together.
using WholeMatrix = std::function<OverlayTensor(const std::string& stem, const std::vector<TensorInfo>& parts)>;

/// A matrix made of bytes, which it keeps.
TensorView matrix_of(const TensorInfo& info, std::shared_ptr<const std::vector<std::byte>> bytes);

/// One way to store matrices in parts.
struct MatrixForm {
  std::string section;             ///< of `moiety` in the config
  std::vector<std::string> parts;  ///< what the names end in behind the stem; the first marks a matrix
  /// `settings`: the section. Error: it says what is impossible.
  std::function<WholeMatrix(std::shared_ptr<const Checkpoint> stored, const nlohmann::json& settings)> open;
};

/// A checkpoint with such sections with its matrices whole, each made when it is asked for, and without the sections;
/// any other as it is. Error: tensors of a matrix that are missing or do not fit together, one that is there whole,
/// too.
std::shared_ptr<const Checkpoint> with_whole_matrices(std::shared_ptr<const Checkpoint> checkpoint);

/// The tensors as they lie in the file: of what with_whole_matrices() made the parts, of any other its own.
const std::vector<TensorInfo>& stored_tensors(const Checkpoint& checkpoint);

}  // namespace moiety
