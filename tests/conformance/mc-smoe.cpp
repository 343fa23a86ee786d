// MC-SMoE: statistics, alignment, groups, averages, low rank + row-sparse with its pruning rule.
#include "moiety/compress/mc_smoe.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/base/config.h"
#include "moiety/compress/expert_statistics.h"

namespace moiety::conform {
namespace {

MOIETY_OP("mc-smoe", "statistics", [](const Case& c) -> Outputs {
  const auto logits = c.in("router_logits");
  return {{"usage", usage_of(selection_counts(route_logits(logits, c.config.at("top_k")), logits.size(1)))},
          {"similarity", cosine_affinity(logit_gram(logits))}};
});

MOIETY_OP("mc-smoe", "align", [](const Case& c) -> Outputs {
  const bool glu = c.config.at("glu");
  const auto experts = glu ? unstack_experts(c.in("gate_proj"), c.in("up_proj"), c.in("down_proj"))
                           : unstack_experts({}, c.in("wi"), c.in("wo"));
  const auto aligned =
      align_experts(experts, c.config.value("reference", int64_t{0}), c.config.value("include_down", true));
  const auto stacked = stack_experts(aligned.experts);
  if (!glu) return {{"perm", aligned.order}, {"wi", stacked.up}, {"wo", stacked.down}};
  return {{"perm", aligned.order}, {"gate_proj", stacked.gate}, {"up_proj", stacked.up}, {"down_proj", stacked.down}};
});

MOIETY_OP("mc-smoe", "group", [](const Case& c) -> Outputs {
  const auto groups = group_experts(c.in("usage"), c.in("similarity"), c.config.at("num_average_groups"),
                                    c.config.at("merging_layers").get<std::vector<int64_t>>());
  return {{"labels", groups.labels}, {"num_groups", groups.groups}, {"dominant", groups.dominant.to(torch::kUInt8)}};
});

MOIETY_OP("mc-smoe", "merge", [](const Case& c) -> Outputs {
  const auto experts =
      unstack_experts(c.has("gate_proj") ? c.in("gate_proj") : torch::Tensor(), c.in("up_proj"), c.in("down_proj"));
  const auto stacked = stack_experts(merge_groups(experts, c.in("labels"), c.in("usage"), c.config.value("eps", 1e-7)));
  return {{"gate_proj", stacked.gate}, {"up_proj", stacked.up}, {"down_proj", stacked.down}};
});

MOIETY_OP("mc-smoe", "losparse", [](const Case& c) -> Outputs {
  Outputs out;
  std::vector<std::string> names;
  std::vector<torch::Tensor> sparse, gradients;
  const std::string prefix = "weight.";
  for (const auto& [name, weight] : c.inputs) {
    if (!name.starts_with(prefix)) continue;
    const std::string m = name.substr(prefix.size());
    const auto split = split_low_rank(weight, c.config.at("rank"), m);
    out["low_rank." + m] = torch::matmul(split.left, split.right);
    out["sparse_init." + m] = split.sparse.clone();
    names.push_back(m);
    sparse.push_back(split.sparse);
    gradients.push_back(c.in("grad." + m));
  }
  auto own = nlohmann::json::object();
  for (const char* key : {"total_steps", "beta1", "beta2", "delta_t", "initial_threshold", "final_threshold",
                          "warmup_steps", "initial_warmup", "final_warmup"})
    if (c.config.contains(key)) own[key] = c.config.at(key);
  const auto config = parse<RowPruningConfig>(own, "the case");
  RowPruning pruning(sparse, config);
  std::vector<double> remaining, masked;
  for (int64_t t = 0; t < config.total_steps; ++t) {
    std::vector<torch::Tensor> now;
    for (size_t i = 0; i < sparse.size(); ++i) {
      now.push_back(gradients[i][t]);
      sparse[i].sub_(now.back(), c.config.at("lr").get<double>());
    }
    const auto step = pruning.after_step(now);
    remaining.push_back(step.remaining);
    masked.push_back(step.mask_threshold);
  }
  for (size_t i = 0; i < names.size(); ++i) out["sparse." + names[i]] = sparse[i];
  out["threshold"] = torch::tensor(remaining, torch::kFloat64);
  out["mask_threshold"] = torch::tensor(masked, torch::kFloat64);
  return out;
});

}  // namespace
}  // namespace moiety::conform
