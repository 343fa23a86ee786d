// EAQuant: smoothing, outlier channels, a matrix between quantized numbers, the router, balanced calibration.
#include "moiety/compress/eaquant.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

// Roundings of quantization are decided by digits that f32 does not have.
torch::Tensor exact(const Case& c, const std::string& name) {
  return c.in(name).to(torch::kFloat64);
}

MOIETY_OP("eaquant", "smooth", [](const Case& c) -> Outputs {
  SmoothingLayer layer;
  layer.act_max = exact(c, "act_max");
  layer.router = exact(c, "router");
  layer.gate = exact(c, "gate_proj");
  layer.up = exact(c, "up_proj");
  layer.tokens = c.in("tokens");
  layer.router_prob = exact(c, "router_prob");
  const auto s =
      smoothing_scale(layer, c.config.at("alpha"), c.config.at("aggregate"), c.config.value("with_router", false));
  const auto norm = exact(c, "norm_weight");
  fold_smoothing(s, {norm}, {layer.router, layer.gate, layer.up});
  return {{"scale", s},
          {"norm_weight", norm},
          {"router_out", layer.router},
          {"gate_out", layer.gate},
          {"up_out", layer.up}};
});

MOIETY_OP("eaquant", "outlier_scale", [](const Case& c) -> Outputs {
  return {{"scale", outlier_scale(exact(c, "channel_max"), exact(c, "channel_min"), c.config.at("otsu_ratio"),
                                  c.config.at("otsu_smooth_rate"))}};
});

MOIETY_OP("eaquant", "router_calibrate", [](const Case& c) -> Outputs {
  const auto r = calibrate_router(exact(c, "router"), exact(c, "x"), c.config.at("bits"), c.config.at("top_k"),
                                  c.config.at("loss"), c.config.at("kl_ratio"));
  return {{"ratio", r.ratio},
          {"scale", r.scale},
          {"zero", r.zero},
          {"router_q", r.values},
          {"overlap", torch::tensor(r.overlap, torch::kFloat64)}};
});

MOIETY_OP("eaquant", "balance", [](const Case& c) -> Outputs {
  const int64_t experts = c.config.at("num_experts");
  const auto b =
      balance_tokens(c.in("selected"), experts,
                     balance_cap(experts, c.config.at("top_k"), c.config.at("seq_length"), c.config.at("ratio")));
  return {{"index", b.index}, {"count", b.count}, {"fallback", b.fallback}};
});

MOIETY_OP("eaquant", "quant_linear", [](const Case& c) -> Outputs {
  const auto x = exact(c, "x");
  const Rotation r = rotation_by(x, exact(c, "rotation_1"), exact(c, "rotation_2"));
  const auto rotated = r.apply(x);
  const auto w = quantize_weight(r.apply(exact(c, "weight")), c.config.at("w_bits"), c.config.at("w_method"),
                                 c.config.value("swc", 0.8));
  const auto y = torch::matmul(quantize_activations(rotated, c.config.at("a_bits"), c.config.at("lac")), w.values.t());
  return {{"perm", r.perm}, {"x_rotated", rotated}, {"weight_q", w.values}, {"ratio", w.ratio}, {"y", y}};
});

}  // namespace
}  // namespace moiety::conform
