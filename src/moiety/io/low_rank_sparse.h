#pragma once
// Matrices stored as low rank + row-sparse (MC-SMoE, arXiv 2310.01334): of NAME.weight [out, in] a file holds NAME.left
// [out, r], NAME.right [r, in], NAME.rows [n, in] and NAME.index [n] int64, ascending: W = left right, and row i of
// `rows` is added to row index[i]. The config says so with a section `moiety.low_rank_sparse`.
#include <memory>

#include "moiety/io/checkpoint.h"

namespace moiety {

inline constexpr const char* kLowRankSparse = "low_rank_sparse";  ///< the section of `moiety` in a config

/// Such a checkpoint with its matrices whole, in the type of `left`, each made when it is asked for; any other as it
/// is. Error: tensors of a matrix that are missing or do not fit together, an index out of order.
std::shared_ptr<const Checkpoint> with_whole_matrices(std::shared_ptr<const Checkpoint> checkpoint);

}  // namespace moiety
