// SMoE-Dropout: the schedule of k, the frozen gate, the layer, cutting a dense layer.
#include "moiety/moe/smoe_dropout.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/moe/mixture.h"

namespace moiety::conform {
namespace {

MOIETY_OP("smoe-dropout", "top_k_schedule", [](const Case& c) -> Outputs {
  const auto steps = c.in("step");
  auto k = torch::empty_like(steps);
  for (int64_t i = 0; i < steps.numel(); ++i)
    k[i] = smoe_dropout_k(c.config.at("mode"), c.config.at("k_min"), c.config.at("k_max"), c.config.at("total_steps"),
                          steps[i].item<int64_t>());
  return {{"top_k", k}};
});

MOIETY_OP("smoe-dropout", "gate", [](const Case& c) -> Outputs {
  FixedRouter router(Linear(c.in("weight"), c.in("bias")), c.config.at("top_k"));
  Pass pass;
  const Routing r = router.route(c.in("x"), pass.at("ffn"), pass);
  return {{"logits", r.logits}, {"topk_idx", r.experts}, {"gates", r.gates}};
});

MOIETY_OP("smoe-dropout", "moe_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), w1 = c.leaf("w1"), b2 = c.leaf("b2");
  Mixture layer(std::make_shared<FixedRouter>(Linear(c.in("gate_weight"), c.in("gate_bias")), c.config.at("top_k")),
                std::make_shared<MlpExperts>(LinearStack(w1, c.in("b1")), LinearStack(c.in("w2"), b2),
                                             activation(c.config.at("activation").get<std::string>())));
  Pass pass;
  pass.training = true;
  const auto y = layer.forward(x, pass);
  (y * c.in("grad_y")).sum().backward();
  return {{"y", y}, {"grad_x", x.grad()}, {"grad_w1", w1.grad()}, {"grad_b2", b2.grad()}};
});

MOIETY_OP("smoe-dropout", "modularize", [](const Case& c) -> Outputs {
  const int64_t experts = c.config.at("experts");
  const auto x = c.in("x");
  const MlpTensors t = modularize({c.in("w1"), c.in("b1"), c.in("w2"), c.in("b2")}, experts, c.config.at("rescale"));
  // A router of zeros gives even gates over all experts.
  Mixture layer(
      std::make_shared<FixedRouter>(Linear(torch::zeros({experts, x.size(1)}), torch::zeros({experts})), experts),
      std::make_shared<MlpExperts>(LinearStack(t.w1, t.b1), LinearStack(t.w2, t.b2),
                                   activation(c.config.at("activation").get<std::string>())));
  Pass pass;
  return {{"w1", t.w1},
          {"b1", t.b1},
          {"w2", t.w2},
          {"b2", t.b2},
          {"y_uniform", layer.forward(x.unsqueeze(0), pass).squeeze(0)}};
});

}  // namespace
}  // namespace moiety::conform
