// WideNet: routing with capacity, the mixture, a stack of blocks that share both halves.
#include "moiety/moe/widenet.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/moe/topk.h"

namespace moiety::conform {
namespace {

WideNetConfig config_of(const Case& c) {
  WideNetConfig config;
  config.top_k = c.config.at("top_k");
  config.capacity_factor = c.config.at("capacity_factor");
  config.official_capacity = c.config.value("official_capacity", false);
  config.balance_coef = 1.0;
  config.noise = false;
  return config;
}

struct Experts4 {
  torch::Tensor w1, b1, w2, b2;
  std::shared_ptr<MlpExperts> module;
};

Experts4 experts_of(const Case& c) {
  Experts4 e{c.leaf("w1"), c.leaf("b1"), c.leaf("w2"), c.leaf("b2"), nullptr};
  const bool gelu = c.config.value("output_activation", std::string("none")) == "gelu";
  e.module = std::make_shared<MlpExperts>(LinearStack(e.w1, e.b1), LinearStack(e.w2, e.b2), activation("gelu_new"),
                                          gelu ? activation("gelu_new") : nullptr);
  return e;
}

torch::Tensor sum_of_losses(const Pass& pass) {
  auto sum = torch::zeros({});
  for (const auto& [name, value] : pass.losses) sum = sum + value;
  return sum;
}

MOIETY_OP("widenet", "route", [](const Case& c) -> Outputs {
  const auto x = c.in("x");
  auto config = config_of(c);
  config.noise = c.config.at("training");
  CapacityRouter router(Linear(c.in("router")), config);
  if (config.noise) router.noise = c.in("noise");
  Pass pass;
  pass.training = true;
  const Routing r = router.route(x, pass.at("ffn"), pass);
  const auto order = top_k(r.scores, config.top_k).second;
  const auto used = (r.experts >= 0);
  auto combine = torch::zeros_like(r.scores).scatter_add(1, r.experts.clamp_min(0), r.gates);
  auto kept = torch::zeros_like(r.scores, torch::kInt64).scatter_add(1, r.experts.clamp_min(0), used.to(torch::kInt64));
  return {{"probs", r.scores},
          {"topk_idx", order},
          {"combine", combine},
          {"kept", kept},
          {"capacity", torch::scalar_tensor(router.capacity(x.size(0)), torch::kInt64)},
          {"balance_loss", sum_of_losses(pass)}};
});

MOIETY_OP("widenet", "moe_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), router = c.leaf("router");
  const auto e = experts_of(c);
  Mixture layer(std::make_shared<CapacityRouter>(Linear(router), config_of(c)), e.module);
  Pass pass;
  pass.training = true;
  const auto y = layer.forward(x, pass);
  const auto loss = sum_of_losses(pass);
  ((y * c.in("grad_y")).sum() + c.config.at("balance_coef").get<double>() * loss).backward();
  return {{"y", y},
          {"balance_loss", loss},
          {"grad_x", x.grad()},
          {"grad_router", router.grad()},
          {"grad_w1", e.w1.grad()},
          {"grad_b2", e.b2.grad()}};
});

MOIETY_OP("widenet", "block_stack", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), router = c.leaf("router"), q = c.leaf("q");
  auto ln1_weight = c.leaf("ln1_weight"), ln2_bias = c.leaf("ln2_bias");
  const auto ln1_bias = c.in("ln1_bias"), ln2_weight = c.in("ln2_weight");
  const auto e = experts_of(c);
  const double eps = c.config.at("layer_norm_eps");
  std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>> norms;
  for (int64_t i = 0; i < c.config.at("num_layers").get<int64_t>(); ++i)
    norms.emplace_back(std::make_shared<LayerNorm>(ln1_weight[i], ln1_bias[i], eps),
                       std::make_shared<LayerNorm>(ln2_weight[i], ln2_bias[i], eps));
  WideNet stack(std::make_shared<BidirectionalAttention>(Linear(q, c.in("q_bias")), Linear(c.in("k"), c.in("k_bias")),
                                                         Linear(c.in("v"), c.in("v_bias")),
                                                         Linear(c.in("o"), c.in("o_bias")), c.config.at("num_heads")),
                std::make_shared<Mixture>(std::make_shared<CapacityRouter>(Linear(router), config_of(c)), e.module),
                std::move(norms));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  pass.training = true;
  const auto y = stack.forward(x, pass);
  const auto loss = sum_of_losses(pass);
  ((y * c.in("grad_y")).sum() + c.config.at("balance_coef").get<double>() * loss).backward();
  std::vector<torch::Tensor> loads;
  for (const auto& record : trace.records) {
    const auto chosen = record.routing.experts.reshape({-1});
    loads.push_back(torch::bincount(chosen.masked_select(chosen >= 0), {}, router.size(0)));
  }
  return {{"y", y},
          {"balance_loss", loss},
          {"expert_load", torch::stack(loads)},
          {"grad_x", x.grad()},
          {"grad_router", router.grad()},
          {"grad_q", q.grad()},
          {"grad_w2", e.w2.grad()},
          {"grad_ln1_weight", ln1_weight.grad()},
          {"grad_ln2_bias", ln2_bias.grad()}};
});

}  // namespace
}  // namespace moiety::conform
