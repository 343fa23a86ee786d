// DynMoLE: entropies, the choice, the experts beside a matrix, the losses.
#include "moiety/adapt/dynmole.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

DynMoleRule rule_of(const Case& c) {
  DynMoleRule r;
  r.entropy_threshold = c.config.value("entropy_threshold", r.entropy_threshold);
  r.entropy_index = c.config.value("entropy_index", r.entropy_index);
  r.entropy_eps = c.config.value("entropy_eps", r.entropy_eps);
  r.entropy_type = c.config.value("entropy_type", r.entropy_type);
  r.keep_top_k = c.config.value("keep_top_k", r.keep_top_k);
  r.top_p = c.config.value("top_p", r.top_p);
  return r;
}

MOIETY_OP("dynmole", "tsallis_entropy", [](const Case& c) -> Outputs {
  auto p = c.leaf("p");
  const auto h = entropy(p, c.config.at("index"), c.config.at("eps"), c.config.at("normalize"), c.config.at("type"));
  h.sum().backward();
  return {{"entropy", h}, {"grad_p", p.grad()}};
});

MOIETY_OP("dynmole", "dynamic_routing", [](const Case& c) -> Outputs {
  const auto choice = dynmole_choose(torch::softmax(c.in("logits"), -1), rule_of(c));
  const auto mask = choice.mask.to(torch::kInt64);
  return {{"weights", choice.weights}, {"mask", mask}, {"entropy", choice.entropy}, {"active", mask.sum(-1)}};
});

MOIETY_OP("dynmole", "dynmole_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), gate = c.leaf("gate"), a = c.leaf("lora_A"), b = c.leaf("lora_B");
  Linear matrix(c.in("weight"));
  matrix->attach(
      std::make_shared<RoutedLora>("gate_proj", std::make_shared<DynMoleRouter>(Linear(gate), rule_of(c)), a, b,
                                   c.config.at("lora_alpha").get<double>() / static_cast<double>(a.size(1))));
  Pass pass;
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  return {
      {"y", y}, {"grad_x", x.grad()}, {"grad_gate", gate.grad()}, {"grad_lora_A", a.grad()}, {"grad_lora_B", b.grad()}};
});

MOIETY_OP("dynmole", "dynmole_loss", [](const Case& c) -> Outputs {
  auto logits = c.leaf("logits");
  torch::Tensor valid;
  if (c.config.at("use_mask").get<bool>()) {
    const auto mask = c.in("attention_mask").reshape({-1});
    valid = (mask != 0).repeat({logits.size(0) / mask.size(0)});
  }
  const auto loss =
      dynmole_loss(logits, rule_of(c), c.config.at("router_aux_loss_coef"), c.config.at("router_dyn_loss_coef"), valid);
  if (loss.loss.requires_grad()) loss.loss.backward();
  return {{"loss", loss.loss},
          {"entropy_loss", loss.entropy},
          {"balance_loss", loss.balance},
          {"grad_logits", logits.grad().defined() ? logits.grad() : torch::zeros_like(logits)}};
});

}  // namespace
}  // namespace moiety::conform
