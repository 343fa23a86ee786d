// RD-pruning: curves of an MLP, the allocation, masks that only grow, the allocations it is compared with.
#include <fmt/format.h>
#include <torch/torch.h>

#include "conform.h"
#include "moiety/compress/rd_pruning.h"

namespace moiety::conform {
namespace {

std::vector<int64_t> integers(const torch::Tensor& t) {
  const auto v = t.to(torch::kInt64).contiguous();
  return {v.const_data_ptr<int64_t>(), v.const_data_ptr<int64_t>() + v.numel()};
}

std::vector<torch::Tensor> layers_of(const Case& c, const std::string& front) {
  std::vector<torch::Tensor> out;
  for (int64_t l = 0; l < c.config.at("num_layers").get<int64_t>(); ++l)
    out.push_back(c.in(fmt::format("{}.{}", front, l)));
  return out;
}

MOIETY_OP("rd-pruning", "rd_curves", [](const Case& c) -> Outputs {
  const int64_t grid = c.config.at("grid");
  const bool worst_case = c.config.at("worst_case");
  const auto model = relu_mlp(layers_of(c, "weight"), layers_of(c, "bias"));
  const std::vector<torch::Tensor> batches{c.in("x")};
  const auto curves = rd_curves(model, batches, grid, worst_case);
  std::vector<torch::Tensor> masks;
  for (const auto& layer : model.layers)
    masks.push_back(rd_mask(layer.weight, {}, rd_pruned(grid / 4, layer.weight.numel(), grid)));
  return {{"output", curves.output.at(0)},
          {"pruned", curves.pruned},
          {"distortion", curves.distortion},
          {"joint_distortion",
           torch::scalar_tensor(rd_joint_distortion(model, batches, curves, masks, worst_case), torch::kFloat64)}};
});

MOIETY_OP("rd-pruning", "allocate", [](const Case& c) -> Outputs {
  RdProblem problem;
  problem.num_weights = integers(c.in("num_weights"));
  problem.distortion = c.in("distortion");
  problem.min_index = integers(c.in("min_index"));
  const auto a = rd_allocate(problem, c.config.at("target_sparsity"));
  return {{"index", torch::tensor(a.index, torch::kInt64)},
          {"pruned", torch::tensor(a.pruned, torch::kInt64)},
          {"total_distortion", torch::scalar_tensor(a.distortion, torch::kFloat64)},
          {"budget", torch::scalar_tensor(a.budget, torch::kInt64)}};
});

MOIETY_OP("rd-pruning", "apply", [](const Case& c) -> Outputs {
  const auto weight = c.in("weight");
  const auto mask = rd_mask(weight, c.in("mask"), c.config.at("pruned"));
  return {{"mask", mask.to(torch::kInt64)}, {"weight", weight * mask}};
});

MOIETY_OP("rd-pruning", "baselines", [](const Case& c) -> Outputs {
  const auto weights = layers_of(c, "weight");
  Outputs out;
  for (const char* name : {"uniform", "global", "lamp", "erk", "uniform+"})
    out[std::string(name) == "uniform+" ? "unifplus" : name] =
        torch::tensor(pruning_baseline(name, weights, c.config.at("amount")), torch::kFloat64);
  return out;
});

}  // namespace
}  // namespace moiety::conform
