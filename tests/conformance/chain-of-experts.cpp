// Chain-of-Experts: the feed-forward half of a block, forward and backward.
#include "moiety/moe/chain_of_experts.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

struct Chain {
  torch::Tensor x, norm, gate, up, down;
  std::shared_ptr<ChainOfExperts> module;
};

Chain chain_of(const Case& c) {
  Chain t{c.leaf("x"), c.leaf("norm_weight"), c.leaf("gate"), c.leaf("up_proj"), c.leaf("down_proj"), nullptr};
  ChainOfExpertsConfig config;
  config.rounds = c.config.at("inner_iter");
  config.experts = t.up.size(0);
  config.shared = c.config.at("n_shared_experts");
  config.top_k = c.config.at("top_k");
  config.per_round_router = c.config.at("use_igate");
  config.inner_residual = c.config.at("inner_residual");
  config.outer_residual = c.config.at("outer_residual");
  config.norm_topk_prob = c.config.at("norm_topk_prob");
  config.routed_scaling_factor = c.config.at("routed_scaling_factor");
  config.aux_loss_alpha = c.config.value("aux_loss_alpha", 0.0);
  config.seq_aux = c.config.value("seq_aux", true);
  std::vector<std::shared_ptr<Router>> routers;
  for (int64_t t_round = 0; t_round < t.gate.size(0); ++t_round)
    routers.push_back(chain_router(Linear(t.gate[t_round]), config));
  std::shared_ptr<FeedForward> shared;
  if (config.shared > 0)
    shared = std::make_shared<FeedForward>(Linear(c.in("shared_gate_proj")), Linear(c.in("shared_up_proj")),
                                           Linear(c.in("shared_down_proj")), activation("silu"));
  t.module = std::make_shared<ChainOfExperts>(
      std::make_shared<RmsNorm>(t.norm, c.config.at("rms_norm_eps").get<double>()), routers,
      std::make_shared<GatedExperts>(LinearStack(c.in("gate_proj")), LinearStack(t.up), LinearStack(t.down),
                                     activation("silu")),
      shared, config);
  return t;
}

MOIETY_OP("chain-of-experts", "ffn_forward", [](const Case& c) -> Outputs {
  const Chain t = chain_of(c);
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = t.module->forward(t.x, pass);
  std::vector<torch::Tensor> index, gates;
  for (const auto& record : trace.records) {
    const auto order = std::get<1>(at::sort(record.routing.gates, true, -1, true));
    index.push_back(record.routing.experts.gather(1, order));
    gates.push_back(record.routing.gates.gather(1, order));
  }
  return {{"y", y}, {"topk_idx", torch::stack(index)}, {"topk_weight", torch::stack(gates)}};
});

MOIETY_OP("chain-of-experts", "ffn_backward", [](const Case& c) -> Outputs {
  const Chain t = chain_of(c);
  Pass pass;
  pass.training = true;
  const auto y = t.module->forward(t.x, pass);
  auto aux = torch::zeros({});
  for (const auto& [name, value] : pass.losses) aux = aux + value;
  ((y * c.in("grad_y")).sum() + aux).backward();
  return {{"y", y},
          {"aux_loss", aux},
          {"grad_x", t.x.grad()},
          {"grad_norm_weight", t.norm.grad()},
          {"grad_gate", t.gate.grad()},
          {"grad_up_proj", t.up.grad()},
          {"grad_down_proj", t.down.grad()}};
});

}  // namespace
}  // namespace moiety::conform
