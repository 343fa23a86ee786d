#include "moiety/adapt/rank_choice.h"

#include <torch/torch.h>

#include "moiety/moe/losses.h"

namespace moiety {

torch::Tensor rank_counts(const torch::Tensor& indices, int64_t count) {
  return torch::bincount(indices.reshape({-1}), {}, count);
}

torch::Tensor moved_bias(const torch::Tensor& bias, const torch::Tensor& counts, double rate) {
  auto out = bias.detach().clone();
  update_choice_bias(out, counts, rate);
  return out;
}

MovingBias::MovingBias(torch::Tensor b, double rate) : buffer(std::move(b)), rate_(rate) {}

void MovingBias::move(const torch::Tensor& indices, const Pass& pass) {
  if (pass.recomputing) return;
  const torch::NoGradGuard frozen;
  before_ = buffer.clone();
  if (rate_ <= 0.0) return;
  auto counted = indices;
  if (const auto real = token_groups(pass, indices.size(0), false).real; real.defined())
    counted = indices.index_select(0, real.nonzero().squeeze(1));
  update_choice_bias(buffer, rank_counts(counted, buffer.size(0)), rate_);
}

}  // namespace moiety
