#include "moiety/moe/topk.h"

#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {

std::pair<torch::Tensor, torch::Tensor> top_k(const torch::Tensor& scores, int64_t k) {
  check(k >= 1 && k <= scores.size(-1), "top-k of {} is impossible: there are {} to choose from", k, scores.size(-1));
  const auto indices =
      std::get<1>(at::sort(scores.detach(), /*stable=*/true, -1, /*descending=*/true)).narrow(-1, 0, k);
  return {scores.gather(-1, indices), indices};
}

}  // namespace moiety
