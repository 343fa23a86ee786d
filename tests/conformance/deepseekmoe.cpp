// DeepSeekMoE: gate with its balance loss, the whole layer, both balance losses, segmentation.
#include "moiety/moe/deepseekmoe.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

DeepseekMoeConfig config_of(const Case& c, int64_t experts) {
  DeepseekMoeConfig out;
  out.experts = experts;
  out.top_k = c.config.at("top_k");
  out.norm_topk_prob = c.config.at("norm_topk_prob");
  out.alpha1 = c.config.at("aux_loss_alpha");
  out.seq_aux = c.config.at("seq_aux");
  return out;
}

torch::Tensor sum_of_losses(const Pass& pass) {
  auto sum = torch::zeros({});
  for (const auto& [name, value] : pass.losses) sum = sum + value;
  return sum;
}

// Shares of one token by descending gate.
std::pair<torch::Tensor, torch::Tensor> by_gate(const Routing& r) {
  const auto order = std::get<1>(at::sort(r.gates.detach(), true, -1, true));
  return {r.experts.gather(1, order), r.gates.gather(1, order)};
}

MOIETY_OP("deepseekmoe", "gate", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), weight = c.leaf("weight");
  const auto router = deepseek_router(Linear(weight), config_of(c, weight.size(0)));
  Pass pass;
  pass.training = true;
  pass.batch = x.size(0);
  const Routing r = router->route(x.reshape({-1, x.size(2)}), pass.at("ffn"), pass);
  const auto loss = sum_of_losses(pass);
  loss.backward();
  const auto [index, gates] = by_gate(r);
  return {{"topk_idx", index},
          {"topk_weight", gates},
          {"aux_loss", loss},
          {"grad_weight", weight.grad()},
          {"grad_x", x.grad()}};
});

MOIETY_OP("deepseekmoe", "moe_layer", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), gate = c.leaf("gate"), g = c.leaf("gate_proj"), u = c.leaf("up_proj"), d = c.leaf("down_proj");
  std::shared_ptr<FeedForward> shared;
  torch::Tensor shared_down;
  if (c.config.at("n_shared_experts").get<int64_t>() > 0) {
    shared_down = c.leaf("shared_down_proj");
    shared = std::make_shared<FeedForward>(Linear(c.in("shared_gate_proj")), Linear(c.in("shared_up_proj")),
                                           Linear(shared_down), activation("silu"));
  }
  Mixture layer(deepseek_router(Linear(gate), config_of(c, gate.size(0))),
                std::make_shared<GatedExperts>(LinearStack(g), LinearStack(u), LinearStack(d), activation("silu")),
                shared);
  Pass pass;
  pass.training = true;
  const auto y = layer.forward(x, pass);
  const auto loss = sum_of_losses(pass);
  ((y * c.in("grad_y")).sum() + loss).backward();
  Outputs out = {{"y", y},
                 {"aux_loss", loss},
                 {"grad_x", x.grad()},
                 {"grad_gate", gate.grad()},
                 {"grad_gate_proj", g.grad()},
                 {"grad_down_proj", d.grad()}};
  if (shared) out["grad_shared_down_proj"] = shared_down.grad();
  return out;
});

MOIETY_OP("deepseekmoe", "balance_losses", [](const Case& c) -> Outputs {
  auto logits = c.leaf("router_logits");
  const int64_t experts = logits.size(1), k = c.config.at("top_k");
  const auto devices = c.in("device_of_expert");
  TopKRouterOptions options;
  options.top_k = k;
  // The logits are a router's own when it is the identity.
  TopKRouter router(Linear(torch::eye(experts)), options);
  Pass pass;
  const Routing r = router.route(logits, pass.at("ffn"), pass);
  const Load load = load_of(r.experts, r.scores);
  const auto slots = static_cast<double>(k);
  const auto expert = balance_loss(load, slots), device = device_balance_loss(load, slots, devices);
  const auto loss =
      c.config.at("expert_alpha").get<double>() * expert + c.config.at("device_alpha").get<double>() * device;
  loss.backward();
  const auto f = load_fraction(load, slots).squeeze(0);
  return {{"expert_loss", expert},
          {"device_loss", device},
          {"load", f},
          {"device_load", device_load(load, slots, devices).squeeze(0)},
          {"loss", loss},
          {"grad_router_logits", logits.grad()}};
});

MOIETY_OP("deepseekmoe", "segment", [](const Case& c) -> Outputs {
  const int64_t m = c.config.at("segments");
  const auto x = c.in("x");
  const ExpertTensors pieces = segment_experts({c.in("gate_proj"), c.in("up_proj"), c.in("down_proj")}, m);
  const int64_t old = pieces.gate.size(0) / m, tokens = x.size(0);
  GatedExperts experts(LinearStack(pieces.gate), LinearStack(pieces.up), LinearStack(pieces.down), activation("silu"));
  const auto every = x.repeat({old * m, 1});
  const auto y = experts.forward(every, std::vector<int64_t>(static_cast<size_t>(old * m), tokens));
  return {{"gate_proj", pieces.gate},
          {"up_proj", pieces.up},
          {"down_proj", pieces.down},
          {"y", y.view({old, m, tokens, -1}).sum(1)}};
});

}  // namespace
}  // namespace moiety::conform
