// SMoRA: the routed ranks beside a matrix, the step of the bias, LoRAs as blocks of ranks.
#include "moiety/adapt/smora.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

MOIETY_OP("smora", "smora_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), rows = c.leaf("router"), a = c.leaf("lora_A"), b = c.leaf("lora_B");
  SmoraConfig config;
  config.rank = a.size(0);
  config.active = c.config.at("activate_r");
  config.block = c.config.at("rank_partition");
  config.alpha = c.config.at("lora_alpha");
  config.bias_in_gate = c.config.at("bias_in_gate");
  Linear matrix(c.in("weight"));
  matrix->attach(std::make_shared<Smora>("q_proj", Linear(rows), a, b, c.in("bias"), config));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  const Routing& r = trace.records.at(0).routing;
  return {{"y", y},
          {"indices", r.experts},
          {"gates", r.gates},
          {"grad_x", x.grad()},
          {"grad_router", rows.grad()},
          {"grad_lora_A", a.grad()},
          {"grad_lora_B", b.grad()}};
});

MOIETY_OP("smora", "smora_bias_update", [](const Case& c) -> Outputs {
  const auto bias = c.in("bias");
  const auto counts = rank_counts(c.in("indices"), bias.size(0));
  return {{"bias", moved_bias(bias, counts, c.config.at("rate"))}, {"counts", counts}};
});

MOIETY_OP("smora", "smora_blocks", [](const Case& c) -> Outputs {
  const auto x = c.in("x");
  const auto blocks = smora_blocks(x, c.in("expert_A"), c.in("expert_B"), c.in("gates"));
  const auto base = Linear(c.in("weight"))->multiply(x);
  const double scale = c.config.at("lora_alpha").get<double>() / c.config.at("block").get<double>();
  return {{"y", base + scale * blocks.by_experts},
          {"y_single", base + scale * blocks.by_ranks},
          {"lora_A", blocks.a},
          {"lora_B", blocks.b}};
});

}  // namespace
}  // namespace moiety::conform
