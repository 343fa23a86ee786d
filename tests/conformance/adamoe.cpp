// AdaMoE: the layer with null experts, its balance loss, low-rank experts beside a frozen matrix.
#include "moiety/moe/adamoe.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

AdaMoeConfig config_of(const Case& c) {
  AdaMoeConfig out;
  out.null_experts = c.config.at("n_null");
  out.top_k = c.config.at("top_k");
  return out;
}

torch::Tensor grad_or_zeros(const torch::Tensor& t) {
  return t.grad().defined() ? t.grad() : torch::zeros_like(t);
}

MOIETY_OP("adamoe", "moe_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), gate = c.leaf("gate"), null_gate = c.leaf("null_gate");
  const auto router = std::make_shared<NullRouter>(Linear(gate), Linear(null_gate), config_of(c));
  Mixture layer(router, std::make_shared<GatedExperts>(LinearStack(c.in("w1")), LinearStack(c.in("w3")),
                                                       LinearStack(c.in("w2")), activation("silu")));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = layer.forward(x, pass);
  (y * c.in("grad_y")).sum().backward();
  const Routing& r = trace.records.at(0).routing;
  const NullChoice choice = adamoe_choose(r.logits, gate.size(0), router->config.top_k);
  return {{"y", y},
          {"router_logits", r.logits},
          {"topk_idx", choice.slots},
          {"gates", r.gates},
          {"true_count", (r.experts >= 0).sum(-1)},
          {"grad_x", x.grad()},
          {"grad_gate", gate.grad()},
          {"grad_null_gate", grad_or_zeros(null_gate)}};
});

MOIETY_OP("adamoe", "balance_loss", [](const Case& c) -> Outputs {
  auto logits = c.leaf("router_logits");
  const int64_t n = c.config.at("n_true"), k = c.config.at("top_k");
  torch::Tensor real;
  if (c.has("attention_mask")) real = c.in("attention_mask").reshape({-1}).to(torch::kBool);
  torch::Tensor loss;
  if (c.config.at("variant") == "per_layer") {
    loss = torch::zeros({});
    for (int64_t l = 0; l < logits.size(0); ++l) loss = loss + adamoe_balance_loss(logits[l], n, k, real);
  } else {
    loss = adamoe_pooled_loss(logits, n, k, real);
  }
  (c.config.at("coef").get<double>() * loss).backward();
  return {{"aux_loss", loss}, {"grad_router_logits", logits.grad()}};
});

MOIETY_OP("adamoe", "lora_forward", [](const Case& c) -> Outputs {
  const int64_t n = c.config.at("n_true");
  const auto rows = c.in("router"), x = c.in("x");
  const double scale = c.config.at("lora_alpha").get<double>() / c.config.at("r").get<double>();
  Linear matrix(c.in("weight"));
  matrix->attach(std::make_shared<AdaMoeBeside>(
      "q_proj",
      std::make_shared<NullRouter>(Linear(rows.narrow(0, 0, n)), Linear(rows.narrow(0, n, rows.size(0) - n)),
                                   config_of(c)),
      std::make_shared<LoraExperts>(LinearStack(c.in("lora_A")), LinearStack(c.in("lora_B")), scale)));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = project(matrix, x, pass);
  const Routing& r = trace.records.at(0).routing;
  return {{"y", y}, {"router_logits", r.logits}, {"true_count", (r.experts >= 0).sum(-1)}};
});

}  // namespace
}  // namespace moiety::conform
