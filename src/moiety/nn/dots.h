#pragma once
// Narrow float matrices (routers, gates) as dot products.
#include "moiety/nn/linear.h"

namespace moiety {

/// x [..., in] -> [..., out] as matrix->forward; without a graph, where matrix->by_dots() and x has at most kDotRows
/// rows, every number is a dot product of its own (rows_times), the same whatever else is in x.
torch::Tensor multiply_narrow(Linear matrix, const torch::Tensor& x);

}  // namespace moiety
