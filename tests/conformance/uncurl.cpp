// UNCURL: statistics, clusters, the merge, routing over aliases.
#include "moiety/compress/uncurl.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/compress/expert_statistics.h"

namespace moiety::conform {
namespace {

std::vector<ExpertWeights> experts_of(const Case& c) {
  return unstack_experts(c.has("gate_proj") ? c.in("gate_proj") : torch::Tensor(), c.in("up_proj"), c.in("down_proj"));
}

MOIETY_OP("uncurl", "statistics", [](const Case& c) -> Outputs {
  const auto logits = c.in("router_logits"), mask = c.has("mask") ? c.in("mask") : torch::Tensor();
  return {{"usage", usage_of(selection_counts(route_logits(logits, c.config.at("top_k")), logits.size(1), mask))},
          {"affinity", cosine_affinity(logit_gram(logits, mask))}};
});

MOIETY_OP("uncurl", "cluster", [](const Case& c) -> Outputs {
  return {{"labels", spectral_clusters(c.in("affinity"), c.in("usage"), c.config.at("num_clusters"))}};
});

MOIETY_OP("uncurl", "merge", [](const Case& c) -> Outputs {
  const auto merged = uncurl_merge(experts_of(c), c.in("router"), c.in("labels"), c.in("usage"));
  const auto stacked = stack_experts(merged.experts);
  return {{"perm", merged.order},
          {"gate_proj", stacked.gate},
          {"up_proj", stacked.up},
          {"down_proj", stacked.down},
          {"router", merged.router}};
});

MOIETY_OP("uncurl", "route", [](const Case& c) -> Outputs {
  const auto mixed = route_aliases(c.in("x"), c.in("router"), c.in("labels"), experts_of(c), c.config.at("top_k"),
                                   c.config.at("norm_topk_prob"));
  return {{"y", mixed.y}, {"weights", mixed.weights}, {"calls", torch::tensor(mixed.calls, torch::kInt64)}};
});

}  // namespace
}  // namespace moiety::conform
