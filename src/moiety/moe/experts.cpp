#include "moiety/moe/experts.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"
#include "moiety/moe/grouped.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/packed_gated.h"
#include "moiety/nn/shortcut.h"

namespace moiety {

namespace {

// As the grouped products take it beside x: in f32 or in x's dtype; undefined stays undefined.
torch::Tensor like(const torch::Tensor& x, const torch::Tensor& t) {
  return t.defined() && t.scalar_type() != x.scalar_type() && t.scalar_type() != torch::kFloat32 ? t.to(x.scalar_type())
                                                                                                 : t;
}

}  // namespace

namespace {

torch::Tensor by_matrices(LinearStack& stack, const torch::Tensor& x, const std::vector<int64_t>& counts) {
  if (stack->weight.defined()) return grouped_linear(x, like(x, stack->weight), like(x, stack->bias), counts);
  std::vector<torch::Tensor> pieces;
  int64_t begin = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(counts.size()); ++e) {
    if (counts[e] == 0) continue;
    pieces.push_back(stack->forward(e, x.narrow(0, begin, counts[e])));
    begin += counts[e];
  }
  return pieces.empty() ? x.new_zeros({0, stack->out()}) : torch::cat(pieces);
}

}  // namespace

torch::Tensor apply_stack(LinearStack& stack, const torch::Tensor& x, const std::vector<int64_t>& counts) {
  if (stack->beside() && stack->beside()->replaces()) return stack->beside()->apply(x, counts, {});
  auto y = by_matrices(stack, x, counts);
  return stack->beside() ? stack->beside()->apply(x, counts, std::move(y)) : y;
}

namespace {

void check_counts(const char* what, const LinearStack& a, const LinearStack& b) {
  check(a->count() == b->count(), "experts need as many {} matrices ({} and {})", what, a->count(), b->count());
}

}  // namespace

GatedExperts::GatedExperts(LinearStack g, LinearStack u, LinearStack d, Activation act)
    : GatedExperts(std::move(g), std::move(u), std::move(d), act, gate_times(act)) {}

GatedExperts::GatedExperts(LinearStack g, LinearStack u, LinearStack d, Activation act, GateTimes times)
    : act_(act), times_(std::move(times)) {
  check_counts("gate and up", g, u);
  check_counts("gate and down", g, d);
  const auto plain = [](const LinearStack& s) { return s->weight.defined() && !s->bias.defined(); };
  fused_ = (act == activation("silu") || act == activation("swish")) && plain(g) && plain(u) && plain(d);
  gate = register_module("gate_proj", std::move(g));
  up = register_module("up_proj", std::move(u));
  down = register_module("down_proj", std::move(d));
}

torch::Tensor GatedExperts::forward(const torch::Tensor& x, const std::vector<int64_t>& counts) {
  return apply_stack(down, combine(apply_stack(gate, x, counts), apply_stack(up, x, counts)), counts);
}

torch::Tensor GatedExperts::mix(const torch::Tensor& x, const Dispatch& d) {
  if (!fused_ || adapted()) return d.reduce(outputs(x, d), x.size(0)).to(x.scalar_type());
  return grouped_swiglu(x, d.tokens, d.gates, d.counts, like(x, gate->weight), like(x, up->weight),
                        like(x, down->weight));
}

torch::Tensor GatedExperts::outputs(const torch::Tensor& x, const Dispatch& d) {
  const auto y = packed(x, d);
  return y.defined() ? y : forward(d.gather(x), d.counts);
}

torch::Tensor GatedExperts::packed(const torch::Tensor& x, const Dispatch& d) {
  const auto used = static_cast<size_t>(count());
  auto &gates = gate->matrices(), &ups = up->matrices(), &downs = down->matrices();
  if (gates.size() != used || ups.size() != used || downs.size() != used) return {};
  if (adapted()) return {};
  for (const auto& bias : {gate->bias, up->bias, down->bias})
    if (bias.defined() && !plain_f32(bias)) return {};
  if (!may_shorten({d.gates, gate->bias, up->bias, down->bias})) return {};
  const auto bias_of = [](const LinearStack& s, size_t e) {
    return s->bias.defined() ? s->bias.const_data_ptr<float>() + static_cast<int64_t>(e) * s->out() : nullptr;
  };
  std::vector<PackedGated> matrices(used, PackedGated{nullptr, nullptr, nullptr});
  for (size_t e = 0; e < used; ++e) {
    if (d.counts[e] == 0) continue;
    matrices[e] = {gates[e]->packed_for(x), ups[e]->packed_for(x), downs[e]->packed_for(x),
                   bias_of(gate, e),        bias_of(up, e),        bias_of(down, e)};
    if (!matrices[e].gate || !matrices[e].up || !matrices[e].down) return {};
  }
  const auto flat = x.to(torch::kFloat32).contiguous();
  return packed_gated(
      flat, matrices, d.counts, d.tokens.const_data_ptr<int64_t>(),
      [this](torch::Tensor g, torch::Tensor u) { return act_ != nullptr ? act_times(act_, g, u) : combine(g, u); });
}

bool GatedExperts::adapted() const {
  return gate->beside() || up->beside() || down->beside();
}

ClampedExperts::ClampedExperts(LinearStack g, LinearStack u, LinearStack d, double alpha, double limit)
    : GatedExperts(std::move(g), std::move(u), std::move(d), nullptr,
                   [alpha = static_cast<float>(alpha), limit = static_cast<float>(limit)](
                       float* x, const float* y, int64_t n) { clamped_times(x, y, alpha, limit, n); }),
      alpha_(alpha),
      limit_(limit) {}

torch::Tensor ClampedExperts::combine(const torch::Tensor& g, const torch::Tensor& u) {
  if (may_shorten({g, u}) && plain_f32(g) && plain_f32(u)) return apply_times(times(), g, u);
  const auto cut = g.clamp_max(limit_);
  return (u.clamp(-limit_, limit_) + 1.0) * (cut * torch::sigmoid(alpha_ * cut));
}

MlpExperts::MlpExperts(LinearStack first, LinearStack second, Activation act, Activation out_act, double dropout)
    : act_(act), out_act_(out_act), dropout_(dropout) {
  check_counts("first and second", first, second);
  w1 = register_module("w1", std::move(first));
  w2 = register_module("w2", std::move(second));
}

torch::Tensor MlpExperts::forward(const torch::Tensor& x, const std::vector<int64_t>& counts) {
  const auto h = act_(apply_stack(w1, x, counts));
  const auto drop = [&](const torch::Tensor& t) {
    return dropout_ > 0.0 ? torch::dropout(t, dropout_, is_training()) : t;
  };
  const auto y = apply_stack(w2, drop(h), counts);
  return drop(out_act_ == nullptr ? y : out_act_(y));
}

LoraExperts::LoraExperts(LinearStack first, LinearStack second, double scale, double dropout)
    : scale_(scale), dropout_(dropout) {
  check_counts("A and B", first, second);
  a = register_module("lora_A", std::move(first));
  b = register_module("lora_B", std::move(second));
}

torch::Tensor LoraExperts::forward(const torch::Tensor& x, const std::vector<int64_t>& counts) {
  const auto dropped = dropout_ > 0.0 ? torch::dropout(x, dropout_, is_training()) : x;
  return apply_stack(b, apply_stack(a, dropped, counts), counts) * scale_;
}

}  // namespace moiety
