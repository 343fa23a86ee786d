// Compressed Experts: the mixture forward and backward, and what a token uses of a model.
#include "moiety/moe/compressed_experts.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

torch::Tensor grad_or_zeros(const torch::Tensor& t) {
  return t.grad().defined() ? t.grad() : torch::zeros_like(t);
}

MOIETY_OP("compressed-experts", "forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), router = c.leaf("router"), ces = c.leaf("ces");
  TopKRouterOptions options;
  options.top_k = c.config.at("top_k");
  options.normalize = c.config.at("norm_topk_prob");
  const GatedExperts experts(LinearStack(c.in("gate_proj")), LinearStack(c.in("up_proj")),
                             LinearStack(c.in("down_proj")), activation("silu"));
  CompressedExperts layer(std::make_shared<TopKRouter>(Linear(router), options), experts, ces, c.config.at("n_ce"));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = layer.forward(x, pass);
  (y * c.in("dy")).sum().backward();
  return {{"y", y},
          {"router_logits", trace.records.at(0).routing.logits},
          {"d_x", x.grad()},
          {"d_ces", grad_or_zeros(ces)},
          {"d_router", grad_or_zeros(router)}};
});

MOIETY_OP("compressed-experts", "active_params", [](const Case& c) -> Outputs {
  ActiveSizes s;
  s.hidden = c.config.at("hidden_size");
  s.intermediate = c.config.at("intermediate_size");
  s.experts = c.config.at("num_experts");
  s.top_k = c.config.at("top_k");
  s.n_ce = c.config.at("n_ce");
  s.layers = c.config.at("num_layers");
  s.heads = c.config.at("num_heads");
  s.kv_heads = c.config.at("num_kv_heads");
  s.head_dim = c.config.at("head_dim");
  s.vocab = c.config.at("vocab_size");
  s.tied = c.config.at("tie");
  s.qk_norm = c.config.at("qk_norm") == "full";
  const auto p = active_parameters(s);
  const auto scalar = [](int64_t n) { return torch::tensor(n, torch::kInt64); };
  return {{"active_full", scalar(p.full)}, {"active_ce", scalar(p.compressed)}, {"added", scalar(p.added)}};
});

}  // namespace
}  // namespace moiety::conform
