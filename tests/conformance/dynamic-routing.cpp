// Dynamic top-p routing: the choice, the layer, both losses.
#include "moiety/moe/dynamic_routing.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/moe/mixture.h"

namespace moiety::conform {
namespace {

torch::Tensor count_of(const Routing& r) {
  return (r.experts >= 0).sum(-1);
}

MOIETY_OP("dynamic-routing", "top_p_route", [](const Case& c) -> Outputs {
  const Routing r = top_p_choice(torch::softmax(c.in("router_logits"), -1), c.config.at("top_p_threshold"));
  return {{"probs", r.scores}, {"experts", r.experts}, {"gates", r.gates}, {"count", count_of(r)}};
});

MOIETY_OP("dynamic-routing", "moe_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), weight = c.leaf("router"), down = c.leaf("down_proj");
  DynamicRoutingConfig config;
  config.p = c.config.at("top_p_threshold");
  Mixture layer(
      std::make_shared<TopPRouter>(Linear(weight), config),
      std::make_shared<GatedExperts>(LinearStack(c.in("gate_proj")), LinearStack(c.in("up_proj")), LinearStack(down),
                                     activation(c.config.at("hidden_act").get<std::string>())));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = layer.forward(x, pass);
  (y * c.in("grad_y")).sum().backward();
  return {{"y", y},
          {"count", count_of(trace.records.at(0).routing).view({x.size(0), x.size(1)})},
          {"grad_x", x.grad()},
          {"grad_router", weight.grad()},
          {"grad_down_proj", down.grad()}};
});

MOIETY_OP("dynamic-routing", "losses", [](const Case& c) -> Outputs {
  auto logits = c.leaf("router_logits");
  TokenGroups groups;
  if (c.has("token_mask")) groups.real = c.in("token_mask").to(torch::kBool);
  auto balance = torch::zeros({}), entropy = torch::zeros({});
  std::vector<torch::Tensor> loads;
  for (int64_t l = 0; l < logits.size(0); ++l) {
    const Routing r = top_p_choice(torch::softmax(logits[l], -1), c.config.at("top_p_threshold"));
    const Load load = load_of(r.experts, r.scores, groups);
    loads.push_back(load.counts.squeeze(0) / load.tokens);
    balance = balance + dynamic_balance_loss(r.experts, r.scores, groups);
    entropy = entropy + entropy_loss(logits[l], groups);
  }
  const auto loss =
      c.config.at("balance_coef").get<double>() * balance + c.config.at("dynamic_coef").get<double>() * entropy;
  loss.backward();
  return {{"load", torch::stack(loads)},
          {"balance_loss", balance},
          {"dynamic_loss", entropy},
          {"loss", loss},
          {"grad_router_logits", logits.grad()}};
});

}  // namespace
}  // namespace moiety::conform
