#pragma once
// A run whose experts are spread over its processes.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <vector>

#include "moiety/moe/exchange.h"

namespace moiety {

/// `exchange`: the processes that hold all experts together, all of the run or a group of them.
/// Leaves to this process its share of the experts of every mixture, process r the experts r * E / size ..., and lets
/// the mixtures exchange their rows through `exchange`, which has to outlive the model's use. Returns the parameters
/// that are a share now; they are the objects that they were. Error: no mixture, experts that cannot be shared evenly
/// or that hold other parameters than stacked matrices.
std::vector<torch::Tensor> split_experts(torch::nn::Module& model, Exchange& exchange);

/// The share [E / size, ...] of every process as one tensor [E, ...] on the first process, undefined on the others.
torch::Tensor gather_share(const torch::Tensor& share, Exchange& exchange);
/// This process's share of a whole tensor [E, ...].
torch::Tensor share_of(const torch::Tensor& whole, const Exchange& exchange);

}  // namespace moiety
