#include "moiety/moe/cut.h"

#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {

torch::Tensor contiguous_sets(int64_t units, int64_t count) {
  check(count >= 1, "a layer cannot be cut into {} experts", count);
  check(units % count == 0, "{} hidden units cannot be cut into {} experts of equal width", units, count);
  return torch::arange(units, torch::kInt64).view({count, units / count});
}

torch::Tensor cut_rows(const torch::Tensor& w, const torch::Tensor& sets) {
  auto shape = sets.sizes().vec();
  for (int64_t i = 1; i < w.dim(); ++i) shape.push_back(w.size(i));
  return w.index_select(0, sets.reshape({-1})).view(shape);
}

torch::Tensor cut_columns(const torch::Tensor& w, const torch::Tensor& sets) {
  return w.index_select(1, sets.reshape({-1}))
      .view({w.size(0), sets.size(0), sets.size(1)})
      .transpose(0, 1)
      .contiguous();
}

}  // namespace moiety
