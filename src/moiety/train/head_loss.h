#pragma once
// The last matrix and the loss behind it in one step, without ever holding all logits.
#include <torch/types.h>

#include "moiety/nn/linear.h"

namespace moiety {

/// The sum over rows with a target (not -100) of -log softmax(cap(scale * (W h + b)))[target], cap(z) = c tanh(z / c)
/// where c > 0. hidden [..., d], targets [...] int64. Rows without a target cost nothing; logits exist for some rows at
/// a time, and their gradient is taken on the spot, so that it must be asked for at most once. Products are in hidden's
/// dtype, the softmax in f32. Gradients reach hidden, W and b, where these ask for them.
torch::Tensor head_loss(const torch::Tensor& hidden, Linear head, const torch::Tensor& targets, double scale = 1.0,
                        double cap = 0.0);

}  // namespace moiety
