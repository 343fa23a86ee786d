// LoRAMoE: the experts beside a matrix, the localized balancing constraint, a whole feed-forward layer.
#include "moiety/adapt/loramoe.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/nn/feed_forward.h"

namespace moiety::conform {
namespace {

std::shared_ptr<RoutedLora> beside(const Case& c, const torch::Tensor& rows, const torch::Tensor& a,
                                   const torch::Tensor& b, RoutingLosses losses = {}) {
  auto router = std::make_shared<SoftRouter>(Linear(rows));
  router->losses = std::move(losses);
  return std::make_shared<RoutedLora>("gate_proj", router, a, b,
                                      c.config.at("lora_alpha").get<double>() / static_cast<double>(a.size(1)));
}

MOIETY_OP("loramoe", "loramoe_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), rows = c.leaf("router"), a = c.leaf("lora_A"), b = c.leaf("lora_B");
  Linear matrix(c.in("weight"));
  matrix->attach(beside(c, rows, a, b));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  return {{"y", y},
          {"gates", trace.records.at(0).routing.gates.view({x.size(0), x.size(1), -1})},
          {"grad_x", x.grad()},
          {"grad_router", rows.grad()},
          {"grad_lora_A", a.grad()},
          {"grad_lora_B", b.grad()}};
});

MOIETY_OP("loramoe", "loramoe_lbc", [](const Case& c) -> Outputs {
  auto logits = c.leaf("logits");
  const auto balance = localized_balance(torch::softmax(logits, -1), c.in("task_types"), c.config.at("blc_alpha"),
                                         c.config.value("form", std::string("cv2")));
  const auto loss = c.config.at("blc_weight").get<double>() * balance.loss;
  loss.backward();
  return {{"loss", loss}, {"Z", balance.z}, {"grad_logits", logits.grad()}};
});

MOIETY_OP("loramoe", "loramoe_mlp", [](const Case& c) -> Outputs {
  const auto part = [&](const std::string& name) {
    Linear matrix(c.in(name + "_weight"));
    matrix->attach(
        beside(c, c.in(name + "_router"), c.in(name + "_lora_A"), c.in(name + "_lora_B"),
               {std::make_shared<LocalizedBalanceLoss>(c.config.at("blc_weight"), c.config.at("blc_alpha"), "cv2")}));
    return matrix;
  };
  FeedForward layer(part("gate"), part("up"), part("down"), activation("silu"));
  Pass pass;
  pass.training = true;
  pass.labels = c.in("task_types");
  const auto y = layer.forward(c.in("x"), pass);
  auto loss = torch::zeros({});
  for (const auto& [name, value] : pass.losses) loss = loss + value;
  return {{"y", y}, {"loss", loss}};
});

}  // namespace
}  // namespace moiety::conform
