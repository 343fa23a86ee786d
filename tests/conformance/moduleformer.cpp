// ModuleFormer: gates and their losses, stick-breaking attention, both mixtures, concentration and pruning.
#include "moiety/moe/moduleformer.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

ModuleGate::Weights gate_of(const Case& c) {
  ModuleGate::Weights w;
  w.type = c.config.at("gate_type");
  if (c.has("gate_w1")) w.w1 = c.leaf("gate_w1");
  if (c.has("gate_b1")) w.b1 = c.leaf("gate_b1");
  if (c.has("gate_w2")) w.w2 = c.leaf("gate_w2");
  if (c.has("centroids")) w.centroids = c.leaf("centroids");
  if (c.has("temperature")) w.temperature = c.leaf("temperature");
  return w;
}

torch::Tensor last_of(const ModuleGate::Weights& w) {
  return w.type == "gmm" ? w.centroids : w.w2;
}

torch::Tensor sum_of_losses(const Pass& pass) {
  auto sum = torch::zeros({});
  for (const auto& [name, value] : pass.losses) sum = sum + value;
  return sum;
}

MOIETY_OP("moduleformer", "gate", [](const Case& c) -> Outputs {
  const auto w = gate_of(c);
  auto x = c.leaf("x");
  ModuleGate gate(w, c.config.at("top_k"), c.config.at("aux_loss_type"), 1.0);
  Pass pass;
  pass.training = true;
  const Routing r = gate.route(x, pass.at("ffn"), pass);
  const auto aux = sum_of_losses(pass);
  (aux + (r.gates * c.in("grad_gates")).sum()).backward();
  return {{"topk_idx", r.experts}, {"gates", r.gates},   {"probs", r.scores},
          {"aux_loss", aux},       {"grad_x", x.grad()}, {"grad_gate_w", last_of(w).grad()}};
});

MOIETY_OP("moduleformer", "stickbreaking_attention", [](const Case& c) -> Outputs {
  auto q = c.leaf("q"), k = c.leaf("k");
  torch::Tensor mask;
  if (c.has("attention_mask")) mask = c.in("attention_mask").to(torch::kBool);
  const auto r = stick_breaking_attention(q, k, c.in("v"), mask);
  (r.output * c.in("grad_y")).sum().backward();
  return {{"y", r.output}, {"att", r.weights}, {"grad_q", q.grad()}, {"grad_k", k.grad()}};
});

MOIETY_OP("moduleformer", "attention_layer", [](const Case& c) -> Outputs {
  ModuleAttention::Parts parts;
  parts.gate = std::make_shared<ModuleGate>(gate_of(c), c.config.at("top_k"), c.config.at("aux_loss_type"), 1.0);
  parts.q = LinearStack(c.in("q_experts"));
  parts.o = LinearStack(c.in("o_experts"));
  if (c.has("k_weight")) {
    parts.k = Linear(c.in("k_weight"), c.in("k_bias"));
    parts.v = Linear(c.in("v_weight"), c.in("v_bias"));
  }
  parts.heads = c.config.at("n_head");
  ModuleAttention layer(std::move(parts));
  torch::Tensor past_k, past_v;
  if (c.has("past_k")) {
    past_k = c.in("past_k");
    past_v = c.in("past_v");
  }
  Pass pass;
  pass.training = true;
  const auto y = layer.forward(c.in("x"), past_k, past_v, {}, pass);
  return {{"y", y}, {"aux_loss", sum_of_losses(pass)}, {"k_cache", past_k}, {"v_cache", past_v}};
});

MOIETY_OP("moduleformer", "ffn_layer", [](const Case& c) -> Outputs {
  const auto w = gate_of(c);
  auto x = c.leaf("x"), w1 = c.leaf("w1");
  Mixture layer(std::make_shared<ModuleGate>(w, c.config.at("top_k"), c.config.at("aux_loss_type"), 1.0),
                std::make_shared<MlpExperts>(LinearStack(w1), LinearStack(c.in("w2")),
                                             activation(c.config.at("activation").get<std::string>())));
  const bool rows = x.dim() == 2;
  Pass pass;
  pass.training = true;
  const auto y = layer.forward(rows ? x.unsqueeze(0) : x, pass).view_as(x);
  const auto aux = sum_of_losses(pass);
  ((y * c.in("grad_y")).sum() + c.config.at("aux_loss_weight").get<double>() * aux).backward();
  return {
      {"y", y}, {"aux_loss", aux}, {"grad_x", x.grad()}, {"grad_w1", w1.grad()}, {"grad_gate_w", last_of(w).grad()}};
});

MOIETY_OP("moduleformer", "concentration", [](const Case& c) -> Outputs {
  auto logits = c.leaf("router_logits");
  const int64_t k = c.config.at("top_k");
  const auto loss = moduleformer_loss("concentration", logits, {}, {});
  loss.backward();
  const auto pruning = module_pruning(logits.detach(), k, c.config.at("tau"));
  const Routing r = pruned_choice(logits.detach(), pruning.keep, k);
  return {{"loss", loss},
          {"grad_router_logits", logits.grad()},
          {"frequency", pruning.frequency},
          {"keep", pruning.keep.to(torch::kInt64)},
          {"pruned_gates", r.gates},
          {"pruned_topk_idx", r.experts}};
});

}  // namespace
}  // namespace moiety::conform
