#pragma once
// Feed-forward layers cut into experts by sets of hidden units: rows of the matrices that enter them, columns of those
// that leave.
#include <torch/types.h>

namespace moiety {

/// N sets of D / N hidden units in order: [N, D / N] int64. Error unless N divides D.
torch::Tensor contiguous_sets(int64_t hidden_units, int64_t count);
/// w [D, d] or a bias [D], sets [N, f] -> [N, f, d] or [N, f].
torch::Tensor cut_rows(const torch::Tensor& w, const torch::Tensor& sets);
/// w [d, D], sets [N, f] -> [N, d, f].
torch::Tensor cut_columns(const torch::Tensor& w, const torch::Tensor& sets);

}  // namespace moiety
