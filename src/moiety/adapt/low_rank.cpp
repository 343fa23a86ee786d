#include "moiety/adapt/low_rank.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/moe/dispatch.h"
#include "moiety/moe/grouped.h"

namespace moiety {
namespace {

using torch::Tensor;

// Ranks of all experts from which on grouped products may pay, and how many times fewer are then chosen.
constexpr int64_t kManyRanks = 256, kFewer = 4;

// u [N, R] times gates [N, E], each for R / E neighbours.
Tensor gated(const Tensor& u, const Tensor& gates) {
  const int64_t n = u.size(0), e = gates.size(1), ranks = u.size(1);
  if (e == ranks) return u * gates;
  return (u.view({n, e, ranks / e}) * gates.unsqueeze(-1)).view({n, ranks});
}

class AddLowRank : public torch::autograd::Function<AddLowRank> {
 public:
  // `gates` without elements: none.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& y, const Tensor& v, const Tensor& a,
                        const Tensor& b, const Tensor& gates, double scale) {
    const bool has = gates.numel() > 0;
    const auto x = v.reshape({-1, v.size(-1)});
    const auto u = at::matmul(x, like(a, x).t());
    const auto w = has ? gated(u, like(gates, u)) : u;
    auto flat = y.view({-1, y.size(-1)});
    flat.addmm_(w, like(b, w).t(), 1.0, scale);
    context->mark_dirty({y});
    context->saved_data["scale"] = scale;
    context->save_for_backward({x, a, b, gates, u, w});
    context->saved_data["shape"] = v.sizes().vec();
    return y;
  }

  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &a = saved[1], &b = saved[2], &gates = saved[3], &u = saved[4], &w = saved[5];
    const double scale = context->saved_data["scale"].toDouble();
    const auto dy = grads[0].reshape({-1, grads[0].size(-1)});
    Tensor dv, da, db, dgates;
    if (context->needs_input_grad(3)) db = at::matmul(dy.t(), w).mul_(scale).to(b.scalar_type());
    if (context->needs_input_grad(1) || context->needs_input_grad(2) || context->needs_input_grad(4)) {
      const auto dw = at::matmul(dy, like(b, dy)).mul_(scale);
      const bool has = gates.numel() > 0;
      const auto du = has ? gated(dw, like(gates, dw)) : dw;
      if (context->needs_input_grad(1))
        dv = at::matmul(du, like(a, du)).view(context->saved_data["shape"].toIntVector());
      if (context->needs_input_grad(2)) da = at::matmul(du.t(), x).to(a.scalar_type());
      if (has && context->needs_input_grad(4)) {
        dgates = dw * u;
        if (gates.size(1) != u.size(1)) dgates = dgates.view({u.size(0), gates.size(1), -1}).sum(-1);
        dgates = dgates.to(gates.scalar_type());
      }
    }
    return {grads[0], dv, da, db, dgates, Tensor()};
  }
};

}  // namespace

Tensor joined_a(const Tensor& a) {
  return a.reshape({a.size(0) * a.size(1), a.size(2)});
}

Tensor joined_b(const Tensor& b) {
  return b.permute({1, 0, 2}).reshape({b.size(1), b.size(0) * b.size(2)});
}

Tensor add_low_rank(Tensor y, const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& gates, double scale) {
  check(a.size(1) == v.size(-1) && b.size(0) == y.size(-1) && a.size(0) == b.size(1),
        "low-rank matrices [{}, {}] and [{}, {}] do not lead from {} features to {}", a.size(0), a.size(1), b.size(0),
        b.size(1), v.size(-1), y.size(-1));
  check(!gates.defined() || (a.size(0) % gates.size(1) == 0 && gates.size(0) * v.size(-1) == v.numel()),
        "gates [{}, {}] do not fit {} ranks of {} rows", gates.defined() ? gates.size(0) : 0,
        gates.defined() ? gates.size(1) : 0, a.size(0), v.numel() / v.size(-1));
  if (!y.is_contiguous() || (y.is_leaf() && y.requires_grad())) y = y.contiguous().clone();
  return AddLowRank::apply(y, v, a, b, gates.defined() ? gates : torch::empty({0}, a.options().requires_grad(false)),
                           scale);
}

Tensor gate_table(const Routing& r, int64_t experts) {
  const auto used = r.experts >= 0;
  return torch::zeros({r.experts.size(0), experts}, r.gates.options())
      .scatter_add(1, r.experts.clamp_min(0), r.gates * used.to(r.gates.scalar_type()));
}

Tensor add_routed(Tensor y, const Tensor& v, const Tensor& a, const Tensor& b, const Routing& routing, double factor,
                  const Tensor& scale) {
  const int64_t experts = a.size(0), ranks = experts * a.size(1), chosen = routing.experts.size(1);
  if (!torch::GradMode::is_enabled() && y.is_cpu() && routing.experts.numel() <= experts) {
    // Decoding: fewer pairs than experts. Nothing is joined for them.
    auto rows = y.view({-1, y.size(-1)});
    const auto x = v.reshape({-1, v.size(-1)});
    for (int64_t n = 0; n < rows.size(0); ++n)
      for (int64_t k = 0; k < chosen; ++k) {
        const auto e = routing.experts[n][k].item<int64_t>();
        if (e < 0) continue;
        const double gate = routing.gates[n][k].item<double>() * (scale.defined() ? scale[e].item<double>() : 1.0);
        const auto u = at::mv(like(a[e], x), x[n]);
        rows[n].addmv_(like(b[e], x), u, 1.0, gate * factor);
      }
    return y;
  }
  if (ranks < kManyRanks || chosen * kFewer > experts) {
    auto table = gate_table(routing, experts);
    if (scale.defined()) table = table * scale;
    return add_low_rank(std::move(y), v, joined_a(a), joined_b(b), table, factor);
  }
  auto d = Dispatch::of(routing, experts);
  if (scale.defined()) {
    std::vector<int64_t> of;
    for (int64_t e = 0; e < experts; ++e) of.insert(of.end(), static_cast<size_t>(d.counts[static_cast<size_t>(e)]), e);
    d.gates = d.gates * scale.index_select(0, torch::tensor(of, torch::kInt64).to(scale.device()));
  }
  const auto x = v.reshape({-1, v.size(-1)});
  const auto u = grouped_linear(d.gather(x), like(a, x), {}, d.counts);
  const auto out = d.reduce(grouped_linear(u, like(b, x), {}, d.counts), x.size(0));
  return y + (out * factor).to(y.scalar_type()).view(y.sizes());
}

}  // namespace moiety
