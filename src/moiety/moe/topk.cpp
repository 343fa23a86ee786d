#include "moiety/moe/topk.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/nn/parallel.h"

namespace moiety {

namespace {

// Above so many, sorting is faster.
constexpr int64_t kFew = 16;

// As sorting orders: NaN above all.
bool above(float a, float b) {
  return a > b || (std::isnan(a) && !std::isnan(b));
}

}  // namespace

void largest(const float* row, int64_t size, int64_t k, int64_t* best) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (found == k && !above(row[i], row[best[k - 1]])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && above(row[i], row[best[at - 1]]); --at) best[at] = best[at - 1];
    best[at] = i;
  }
}

namespace {

// Indices of the k largest of every row of a contiguous f32 tensor [..., size].
torch::Tensor few_largest(const torch::Tensor& scores, int64_t k) {
  const int64_t size = scores.size(-1), rows = scores.numel() / size;
  auto shape = scores.sizes().vec();
  shape.back() = k;
  auto indices = torch::empty(shape, torch::kInt64);
  const float* from = scores.const_data_ptr<float>();
  int64_t* to = indices.data_ptr<int64_t>();
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / size), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) largest(from + r * size, size, k, to + r * k);
  });
  return indices;
}

}  // namespace

std::pair<torch::Tensor, torch::Tensor> top_k(const torch::Tensor& scores, int64_t k) {
  check(k >= 1 && k <= scores.size(-1), "top-k of {} is impossible: there are {} to choose from", k, scores.size(-1));
  const auto plain = scores.detach();
  const bool few = plain.is_cpu() && plain.scalar_type() == torch::kFloat32 && k <= kFew && plain.numel() > 0;
  const auto indices = few ? few_largest(plain.contiguous(), k)
                           : std::get<1>(at::sort(plain, /*stable=*/true, -1, /*descending=*/true)).narrow(-1, 0, k);
  return {scores.gather(-1, indices), indices};
}

}  // namespace moiety
