// DERN: importance, moves of neurons, clustering, a whole layer.
#include "moiety/compress/dern.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/base/config.h"
#include "moiety/compress/expert_statistics.h"

namespace moiety::conform {
namespace {

torch::Tensor integers(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kInt64);
}

std::vector<int64_t> list(const torch::Tensor& t) {
  const auto i = t.to(torch::kInt64).contiguous();
  return {i.const_data_ptr<int64_t>(), i.const_data_ptr<int64_t>() + i.numel()};
}

std::vector<ExpertWeights> experts_of(const Case& c) {
  return unstack_experts(c.has("gate_proj") ? c.in("gate_proj") : torch::Tensor(), c.in("up_proj"), c.in("down_proj"));
}

/// The method's own settings among those of the case.
DernConfig config_of(const Case& c) {
  auto own = nlohmann::json::object();
  for (const char* key : {"threshold", "components", "router_transfer", "width", "init", "iterations"})
    if (c.config.contains(key)) own[key] = c.config.at(key);
  return parse<DernConfig>(own, "the case");
}

torch::Tensor importance_of(const Case& c) {
  const auto logits = c.in("router_logits");
  return gate_mass(route_logits(logits, c.config.at("top_k"), c.config.at("norm_topk_prob")), logits.size(1)) /
         static_cast<double>(real_tokens(logits.size(0)));
}

MOIETY_OP("dern", "importance", [](const Case& c) -> Outputs {
  const auto s = importance_of(c);
  return {{"importance", s}, {"retained", integers(dern_retained(s, c.config.at("num_retained")))}};
});

MOIETY_OP("dern", "reassign", [](const Case& c) -> Outputs {
  const auto experts = experts_of(c);
  const auto moves = dern_reassign(experts, c.in("router"), list(c.in("retained")), config_of(c));
  Outputs out = {{"router_out", moves.router}};
  const int64_t width = width_of(experts[0]);
  out["target"] = moves.target.empty() ? torch::empty({0, width}, torch::kInt64) : torch::stack(moves.target);
  out["similarity"] = moves.similarity.empty() ? torch::empty({0, width}) : torch::stack(moves.similarity);
  return out;
});

MOIETY_OP("dern", "recluster", [](const Case& c) -> Outputs {
  const ExpertWeights neurons{c.has("gate") ? c.in("gate") : torch::Tensor(), c.in("up"), c.in("down")};
  const auto done = dern_recluster(neurons, c.in("weight"), c.config.at("own"), c.config.at("width"),
                                   c.config.value("init", std::string("own")), c.config.value("iterations", 20));
  return {{"gate_out", done.expert.gate},
          {"up_out", done.expert.up},
          {"down_out", done.expert.down},
          {"label", done.label}};
});

MOIETY_OP("dern", "layer", [](const Case& c) -> Outputs {
  const auto s = importance_of(c);
  const auto done =
      dern_layer(experts_of(c), c.in("router"), s, dern_retained(s, c.config.at("num_retained")), config_of(c));
  const auto stacked = stack_experts(done.experts);
  return {{"importance", s},
          {"retained", integers(done.retained)},
          {"router", done.moves.router},
          {"gate_proj", stacked.gate},
          {"up_proj", stacked.up},
          {"down_proj", stacked.down}};
});

}  // namespace
}  // namespace moiety::conform
