#pragma once
// What a model says of two sequences, for comparing experts on disk with those in memory.
#include <torch/torch.h>

#include "moiety/models/model.h"

namespace moiety::test {

/// Logits of two sequences [rows, steps, V], one behind the other: a prompt of 20 tokens, then the rest of `steps` one
/// by one. The second begins with full pools.
inline torch::Tensor run_twice(CausalModel& model, int64_t steps, int64_t rows = 1) {
  const torch::NoGradGuard frozen;
  std::vector<torch::Tensor> all;
  for (int64_t s = 0; s < 2; ++s) {
    const auto ids = (torch::arange(steps * rows, torch::kInt64) * 37 + 11 * s).remainder(256).view({rows, steps});
    auto cache = model.make_cache();
    for (int64_t begin = 0; begin < steps; begin += begin == 0 ? 20 : 1) {
      Pass pass;
      pass.cache = &cache;
      all.push_back(model.forward(ids.narrow(1, begin, begin == 0 ? 20 : 1), pass));
    }
  }
  return torch::cat(all, 1);
}

}  // namespace moiety::test
