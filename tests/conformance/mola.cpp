// MoLA: the experts beside a matrix, the balance loss of all layers, experts of each layer.
#include "moiety/adapt/mola.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

MOIETY_OP("mola", "mola_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), rows = c.leaf("router"), a = c.leaf("lora_A"), b = c.leaf("lora_B");
  Linear matrix(c.in("weight"));
  matrix->attach(
      std::make_shared<RoutedLora>("q_proj", mola_router(Linear(rows), c.config.at("top_k"), 0.0), a, b,
                                   c.config.at("lora_alpha").get<double>() / static_cast<double>(a.size(1))));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  const Routing& r = trace.records.at(0).routing;
  const auto grad = [](const torch::Tensor& t) { return t.grad().defined() ? t.grad() : torch::zeros_like(t); };
  return {{"y", y},
          {"router_logits", r.logits},
          {"selected_experts", r.experts},
          {"routing_weights", r.gates},
          {"grad_x", grad(x)},
          {"grad_router", grad(rows)},
          {"grad_lora_A", grad(a)},
          {"grad_lora_B", grad(b)}};
});

MOIETY_OP("mola", "mola_balance_loss", [](const Case& c) -> Outputs {
  const auto top_k = c.config.at("top_k").get<std::vector<int64_t>>();
  std::vector<torch::Tensor> logits;
  auto sum = torch::zeros({});
  for (size_t l = 0; l < top_k.size(); ++l) {
    logits.push_back(c.leaf(fmt::format("logits_{}", l)));
    sum = sum + mola_balance_loss(logits.back(), top_k[l]);
  }
  const auto loss = c.config.at("coef").get<double>() * sum;
  loss.backward();
  Outputs out = {{"aux_loss", sum}, {"loss", loss}};
  for (size_t l = 0; l < logits.size(); ++l) out[fmt::format("grad_logits_{}", l)] = logits[l].grad();
  return out;
});

MOIETY_OP("mola", "mola_allocation", [](const Case& c) -> Outputs {
  const auto experts = mola_allocation(c.config.at("pattern").get<std::vector<int64_t>>(), c.config.at("num_layers"));
  const auto t = torch::tensor(experts, torch::kInt64);
  return {{"experts", t}, {"total", t.sum()}};
});

}  // namespace
}  // namespace moiety::conform
