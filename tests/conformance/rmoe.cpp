// RMoE: one step of the recurrent router, a stack of them with its loss and gradients, the whole layer.
#include "moiety/moe/rmoe.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/moe/mixture.h"

namespace moiety::conform {
namespace {

struct Cell {
  std::map<std::string, torch::Tensor> tensors;
  std::shared_ptr<RecurrentCell> module;
};

Cell cell_of(const Case& c, const std::string& kind) {
  Cell cell;
  for (const char* part : {"r", "z", "n"})
    for (const char* what : {"weight_i", "weight_h", "bias_i", "bias_h"})
      if (const std::string name = std::string(what) + part; c.has(name)) cell.tensors[name] = c.leaf(name);
  cell.module = std::make_shared<RecurrentCell>(kind, cell.tensors);
  return cell;
}

RmoeConfig config_of(const Case& c, double coef) {
  RmoeConfig config;
  config.top_k = c.config.at("top_k");
  config.aux_coef = coef;
  return config;
}

MOIETY_OP("rmoe", "router_step", [](const Case& c) -> Outputs {
  const Cell cell = cell_of(c, c.config.at("router"));
  RecurrentRouter router(Linear(c.in("weight1")), Linear(c.in("weight2")), cell.module, true, config_of(c, 0.0));
  Pass pass;
  if (c.has("h_prev")) pass.state[RecurrentRouter::kState] = c.in("h_prev");
  const Routing r = router.route(c.in("x"), pass.at("ffn"), pass);
  return {{"router_logits", r.logits},
          {"h", pass.state.at(RecurrentRouter::kState)},
          {"topk_idx", r.experts},
          {"topk_weight", r.gates}};
});

MOIETY_OP("rmoe", "router_stack", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), weight1 = c.leaf("weight1"), weight2 = c.leaf("weight2");
  const Cell cell = cell_of(c, c.config.at("router"));
  Pass pass;
  pass.training = true;
  std::vector<torch::Tensor> logits, states;
  for (int64_t l = 0; l < x.size(0); ++l) {
    pass.block = l;
    RecurrentRouter router{Linear(weight1[l]), Linear(weight2[l]), cell.module, l == 0, config_of(c, 1.0)};
    logits.push_back(router.route(x[l], pass.at("ffn"), pass).logits);
    states.push_back(pass.state.at(RecurrentRouter::kState));
  }
  pass.finish();
  const auto aux = pass.losses.at(0).second;
  const auto all = torch::stack(logits);
  const auto loss = (all * c.in("logit_weight")).sum() + c.config.at("router_aux_loss_coef").get<double>() * aux;
  loss.backward();
  Outputs out = {{"router_logits", all},
                 {"h", torch::stack(states)},
                 {"aux_loss", aux},
                 {"loss", loss},
                 {"grad_x", x.grad()},
                 {"grad_weight1", weight1.grad()},
                 {"grad_weight2", weight2.grad()}};
  for (const char* name : {"weight_hn", "weight_in", "bias_hn"})
    out[std::string("grad_") + name] = cell.tensors.at(name).grad();
  return out;
});

MOIETY_OP("rmoe", "moe_block", [](const Case& c) -> Outputs {
  const Cell cell = cell_of(c, "gru");
  std::shared_ptr<FeedForward> shared;
  const bool has_shared = c.config.at("add_moe_share_expert");
  if (has_shared)
    shared = std::make_shared<FeedForward>(Linear(c.in("share_gate_proj")), Linear(c.in("share_up_proj")),
                                           Linear(c.in("share_down_proj")), activation("silu"));
  Mixture layer(std::make_shared<RecurrentRouter>(Linear(c.in("weight1")), Linear(c.in("weight2")), cell.module, true,
                                                  config_of(c, 0.0)),
                std::make_shared<GatedExperts>(LinearStack(c.in("w1")), LinearStack(c.in("w3")),
                                               LinearStack(c.in("w2")), activation("silu")),
                shared);
  if (c.has("bias")) layer.set_bias(c.in("bias"));
  if (has_shared) {
    layer.routed_scale = c.config.at("moe_weight");
    layer.shared_scale = c.config.at("share_weight");
  }
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  pass.state[RecurrentRouter::kState] = c.in("h_prev");
  const auto y = layer.forward(c.in("x"), pass);
  return {
      {"y", y}, {"h", pass.state.at(RecurrentRouter::kState)}, {"router_logits", trace.records.at(0).routing.logits}};
});

}  // namespace
}  // namespace moiety::conform
