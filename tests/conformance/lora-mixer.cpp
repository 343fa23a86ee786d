// LoRA-Mixer: the experts beside a matrix in every mode, the specialization balance loss, staying near.
#include "moiety/adapt/lora_mixer.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

MOIETY_OP("lora-mixer", "mixer_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), rows = c.leaf("router"), a = c.leaf("lora_A"), b = c.leaf("lora_B");
  const std::string mode = c.config.at("mode");
  LoraMixerConfig config;
  config.experts = a.size(0);
  config.top_k = c.config.value("topk", int64_t{3});
  config.stage = mode == "topk" ? "soft" : mode;
  config.sbl_alpha = config.sbl_lambda = 0.0;
  LoraMixer::Target target;
  target.site = "q_proj";
  target.router = Linear(rows);
  target.a = a;
  target.b = b;
  target.scale = c.in("scale");
  Linear matrix(c.in("weight"));
  matrix->attach(std::make_shared<LoraMixer>(std::vector<LoraMixer::Target>{target}, config));
  Trace trace;
  Pass pass;
  pass.training = mode != "topk";
  pass.trace = &trace;
  if (mode == "hard") pass.labels = c.in("labels");
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  const auto grad = [](const torch::Tensor& t) { return t.grad().defined() ? t.grad() : torch::zeros_like(t); };
  return {{"y", y},
          {"weights", trace.records.at(0).routing.gates.view({x.size(0), x.size(1), -1})},
          {"grad_x", grad(x)},
          {"grad_router", grad(rows)},
          {"grad_lora_A", grad(a)},
          {"grad_lora_B", grad(b)}};
});

MOIETY_OP("lora-mixer", "sbl_loss", [](const Case& c) -> Outputs {
  auto logits = c.leaf("logits");
  const auto loss = sbl_loss(logits.view({-1, logits.size(-1)}), c.in("mask").reshape({-1}) != 0, c.config.at("alpha"),
                             c.config.at("lambda"), c.config.at("usage_topk"), c.config.at("entropy_sign"));
  loss.loss.backward();
  return {{"loss", loss.loss},
          {"balance", loss.balance},
          {"entropy", loss.entropy},
          {"usage", loss.usage},
          {"grad_logits", logits.grad()}};
});

MOIETY_OP("lora-mixer", "preserve_loss", [](const Case& c) -> Outputs {
  auto a = c.leaf("lora_A"), b = c.leaf("lora_B");
  const auto loss = preserve_loss({a, b}, {c.in("lora_A0"), c.in("lora_B0")},
                                  c.config.at("experts").get<std::vector<int64_t>>(), c.config.at("beta"));
  const auto grad = [](const torch::Tensor& t) { return t.grad().defined() ? t.grad() : torch::zeros_like(t); };
  if (loss.requires_grad()) loss.backward();
  return {{"loss", loss}, {"grad_lora_A", grad(a)}, {"grad_lora_B", grad(b)}};
});

}  // namespace
}  // namespace moiety::conform
