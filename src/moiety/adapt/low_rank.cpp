#include "moiety/adapt/low_rank.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/moe/dispatch.h"
#include "moiety/moe/grouped.h"
#include "moiety/nn/dense.h"
#include "moiety/nn/products.h"
#include "moiety/nn/tasks.h"

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

// AddLowRank's work as tasks: what belongs to some rows is done on one thread. Few ranks are few rows of a product, but
// would be a small part of the columns that it is computed in: u, w and their gradients lie as [R, N].
class LowRankTasks {
 public:
  // x [N, in], a [R, in], b [out, R], gates [N, E] or without elements.
  LowRankTasks(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& gates, double scale)
      : x_(x),
        a_(like(a, x).contiguous()),
        b_(like(scale == 1.0 ? b : b * scale, x).contiguous()),
        gates_(gates.numel() > 0 ? like(gates, x) : Tensor()),
        scale_(scale),
        ranges_(tile_ranges(x.size(0), many_tasks())) {}

  static bool run(const Tensor& x, const Tensor& y, const Tensor& a) {
    return runs_dense(x, {a, {}}) && y.scalar_type() == x.scalar_type();
  }

  // y [N, out] += scale * w b^T with w = u times gates and u = x a^T, which are filled: [R, N], w may be u.
  void forward(const Tensor& y, const Tensor& u, const Tensor& w) const {
    for_rows([&](auto r) {
      multiply(columns(u, r), {a_}, {rows(x_, r), true});
      if (gates_.defined()) gate(columns(u, r), r, columns(w, r));
      multiply(rows(y, r), {columns(w, r), true}, {b_, true}, /*add=*/true);
    });
  }

  // The gradients of w and of u [R, N], u's may be w's, and of x where dx is defined.
  void backward(const Tensor& dy, const Tensor& dw, const Tensor& du, const Tensor& dx) const {
    for_rows([&](auto r) {
      multiply(columns(dw, r), {b_, true}, {rows(dy, r), true});
      if (gates_.defined()) gate(columns(dw, r), r, columns(du, r));
      if (dx.defined()) multiply(rows(dx, r), {columns(du, r), true}, {a_});
    });
  }

  // The gradients of a [R, in], and of b as [R, out], in f32; what is undefined is not wanted.
  void backward_matrices(const Tensor& dy, const Tensor& w, const Tensor& du, const Tensor& da,
                         const Tensor& db) const {
    std::vector<OutputBlock> blocks;
    if (da.defined()) blocks = output_blocks(da.size(0), {da.size(1)});
    const size_t of_a = blocks.size();
    if (db.defined())
      for (const OutputBlock& b : output_blocks(db.size(0), {db.size(1)})) blocks.push_back(b);
    run_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const OutputBlock& b = blocks[static_cast<size_t>(i)];
      const bool first = static_cast<size_t>(i) < of_a;
      multiply(block_of(first ? da : db, b), {rows(first ? du : w, b.rows)}, {columns(first ? x_ : dy, b.columns)});
    });
    if (db.defined() && scale_ != 1.0) Tensor(db).mul_(scale_);
  }

 private:
  using Range = std::pair<int64_t, int64_t>;
  static Tensor columns(const Tensor& t, Range r) { return part_of(t, 1, r); }
  static Tensor rows(const Tensor& t, Range r) { return part_of(t, 0, r); }
  template <class Task>
  void for_rows(Task task) const {
    run_tasks(static_cast<int64_t>(ranges_.size()), [&](int64_t i) { task(ranges_[static_cast<size_t>(i)]); });
  }
  void gate(const Tensor& u, Range r, const Tensor& to) const {
    const int64_t e = gates_.size(1), each = u.size(0) / e;
    auto out = to.view({e, each, -1});
    at::mul_out(out, u.view({e, each, -1}), rows(gates_, r).t().unsqueeze(1));
  }

  Tensor x_, a_, b_, gates_;  // of x's type, b times the scale
  double scale_;
  std::vector<Range> ranges_;
};

class AddLowRank : public torch::autograd::Function<AddLowRank> {
 public:
  // `gates` without elements: none.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& y, const Tensor& v, const Tensor& a,
                        const Tensor& b, const Tensor& gates, double scale) {
    const bool has = gates.numel() > 0;
    const auto x = v.reshape({-1, v.size(-1)});
    auto flat = y.view({-1, y.size(-1)});
    const bool tasks = LowRankTasks::run(x, flat, a);
    Tensor u, w;
    if (tasks) {
      u = torch::empty({a.size(0), x.size(0)}, x.options().requires_grad(false));
      w = has ? torch::empty_like(u) : u;
      LowRankTasks(x, a, b, gates, scale).forward(flat, u, w);
    } else {
      u = at::matmul(x, like(a, x).t());
      w = has ? gated(u, like(gates, u)) : u;
      flat.addmm_(w, like(b, w).t(), 1.0, scale);
    }
    context->saved_data["tasks"] = tasks;
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
    if (context->saved_data["tasks"].toBool()) return backward_by_tasks(context, grads[0], dy);
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

  static torch::autograd::tensor_list backward_by_tasks(torch::autograd::AutogradContext* context, const Tensor& grad,
                                                        const Tensor& dy) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &a = saved[1], &b = saved[2], &gates = saved[3], &u = saved[4], &w = saved[5];
    const bool has = gates.numel() > 0, of_gates = has && context->needs_input_grad(4);
    const LowRankTasks tasks(x, a, b, gates, context->saved_data["scale"].toDouble());
    const auto f32 = x.options().dtype(torch::kFloat32);
    Tensor dv, da, db, dgates, dw, du;
    if (context->needs_input_grad(1) || context->needs_input_grad(2) || of_gates) {
      dw = torch::empty_like(u);
      du = has ? torch::empty_like(u) : dw;
      if (context->needs_input_grad(1)) dv = torch::empty_like(x);
      tasks.backward(dy, dw, du, dv);
      if (dv.defined()) dv = dv.view(context->saved_data["shape"].toIntVector());
    }
    if (context->needs_input_grad(2)) da = torch::empty(a.sizes(), f32);
    if (context->needs_input_grad(3)) db = torch::empty({b.size(1), b.size(0)}, f32);
    tasks.backward_matrices(dy, w, du, da, db);
    if (da.defined()) da = da.to(a.scalar_type());
    if (db.defined()) db = db.t().to(b.scalar_type()).contiguous();
    if (of_gates)
      dgates = (dw * u).view({gates.size(1), -1, x.size(0)}).sum(1, false, torch::kFloat32).t().to(gates.scalar_type());
    return {grad, dv, da, db, dgates, Tensor()};
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
