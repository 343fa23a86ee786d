#pragma once

#include <torch/types.h>

namespace moiety {

/// The weights of one expert in f32: gate [d, h] (undefined for a plain two-layer expert), up [d, h], down [h, d].
struct ExpertWeights {
  torch::Tensor gate, up, down;
};

}  // namespace moiety
