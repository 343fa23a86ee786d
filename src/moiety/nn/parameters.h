#pragma once
#include <torch/nn/module.h>

#include <cstdint>

namespace moiety {

/// Elements of all parameters; those that several modules share count once.
int64_t parameter_count(const torch::nn::Module& module);

}  // namespace moiety
