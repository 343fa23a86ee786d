// LLaVA-MoLE: a feed-forward layer with its experts, the balance loss.
#include "moiety/adapt/llava_mole.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/nn/feed_forward.h"

namespace moiety::conform {
namespace {

MOIETY_OP("llava-mole", "mole_mlp", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), rows = c.leaf("router_weight"), ga = c.leaf("gate_A"), gb = c.leaf("gate_B"),
       da = c.leaf("down_A"), db = c.leaf("down_B");
  const double scale = c.config.at("lora_alpha").get<double>() / static_cast<double>(ga.size(1));
  const auto router = std::make_shared<MoleRouter>(Linear(rows, c.in("router_bias")), c.config.at("dense").get<bool>(),
                                                   c.config.at("gate_weighting").get<std::string>(), 0.0);
  Linear gate(c.in("gate_weight")), up(c.in("up_weight")), down(c.in("down_weight"));
  const auto first = std::make_shared<MoleBeside>(router, true, std::vector<torch::Tensor>{ga, c.in("up_A")},
                                                  std::vector<torch::Tensor>{gb, c.in("up_B")}, scale);
  gate->attach(first);
  up->attach(first);
  down->attach(std::make_shared<MoleBeside>(router, false, std::vector<torch::Tensor>{da},
                                            std::vector<torch::Tensor>{db}, scale));
  FeedForward layer(gate, up, down, activation("silu"));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = layer.forward(x, pass);
  (y * c.in("grad_y")).sum().backward();
  const auto p = trace.records.at(0).routing.scores.view({x.size(0), x.size(1), -1});
  const auto grad = [](const torch::Tensor& t) { return t.grad().defined() ? t.grad() : torch::zeros_like(t); };
  return {{"y", y},
          {"routing", p},
          {"index", mole_gates(p.detach(), false, "none").argmax(-1)},
          {"grad_x", grad(x)},
          {"grad_router_weight", grad(rows)},
          {"grad_gate_A", grad(ga)},
          {"grad_gate_B", grad(gb)},
          {"grad_down_A", grad(da)},
          {"grad_down_B", grad(db)}};
});

MOIETY_OP("llava-mole", "mole_balance_loss", [](const Case& c) -> Outputs {
  auto logits = c.leaf("logits");
  const auto loss = mole_balance_loss(torch::softmax(logits, -1), c.in("attention_mask"));
  loss.backward();
  return {{"loss", loss}, {"grad_logits", logits.grad()}};
});

}  // namespace
}  // namespace moiety::conform
