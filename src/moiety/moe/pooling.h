#pragma once
// What routers keep of every site for a loss over all of them.
#include <torch/types.h>

#include <string>

#include "moiety/nn/pass.h"

namespace moiety {

/// Keeps rows [N, ...] of a site until the pass ends; pooled() joins those of all sites under one key, in their order
/// (undefined: there are none).
void pool(Pass& pass, const std::string& key, const torch::Tensor& rows);
torch::Tensor pooled(const Pass& pass, const std::string& key);

}  // namespace moiety
