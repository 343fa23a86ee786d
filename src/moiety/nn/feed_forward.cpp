#include "moiety/nn/feed_forward.h"

#include <torch/torch.h>

namespace moiety {

FeedForward::FeedForward(Linear g, Linear u, Linear d, Activation act) : act_(act) {
  if (!g.is_empty()) gate = register_module("gate_proj", std::move(g));
  up = register_module("up_proj", std::move(u));
  down = register_module("down_proj", std::move(d));
}

torch::Tensor FeedForward::apply(const torch::Tensor& x) {
  return down(gate.is_empty() ? act_(up(x)) : act_(gate(x)) * up(x));
}

}  // namespace moiety
