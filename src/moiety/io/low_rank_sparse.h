#pragma once
// Matrices stored as low rank + row-sparse (MC-SMoE, arXiv 2310.01334): of NAME.weight [out, in] a file holds NAME.left
// [out, r], NAME.right [r, in], NAME.rows [n, in] and NAME.index [n] int64, ascending: W = left right, and row i of
// `rows` is added to row index[i]. The config says so with a section `moiety.low_rank_sparse`.
#include "moiety/io/whole_matrices.h"

namespace moiety {

inline constexpr const char* kLowRankSparse = "low_rank_sparse";  ///< the section of `moiety` in a config

/// Matrices come whole in the type of `left`. Error also when one is asked for: an index out of order.
MatrixForm low_rank_sparse_form();

}  // namespace moiety
