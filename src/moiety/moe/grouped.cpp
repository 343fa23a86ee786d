#include "moiety/moe/grouped.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>

#include "moiety/base/error.h"
#include "moiety/moe/dispatch.h"
#include "moiety/moe/swiglu_tasks.h"
#include "moiety/nn/products.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// Calls use(expert, first row, rows) for every expert that has rows.
template <class Use>
void for_experts(const std::vector<int64_t>& counts, Use use) {
  int64_t begin = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    if (counts[e] > 0) use(static_cast<int64_t>(e), begin, counts[e]);
    begin += counts[e];
  }
}

// The same, experts side by side where there are enough of them: `use` writes to memory of its expert only, with the
// product that it is given.
template <class Use>
void for_experts_apart(const std::vector<int64_t>& counts, torch::Device device, Use use) {
  const int64_t used = std::count_if(counts.begin(), counts.end(), [](int64_t c) { return c > 0; });
  if (!device.is_cpu() || used < 2 * at::get_num_threads())
    return for_experts(counts, [&](int64_t e, int64_t begin, int64_t n) { use(e, begin, n, multiply_by_torch); });
  std::vector<std::array<int64_t, 3>> all;
  for_experts(counts, [&](int64_t e, int64_t begin, int64_t n) { all.push_back({e, begin, n}); });
  run_tasks(used, [&](int64_t i) {
    const auto [e, begin, n] = all[static_cast<size_t>(i)];
    use(e, begin, n, multiply);
  });
}

void check_counts(const std::vector<int64_t>& counts, int64_t experts, int64_t rows) {
  check(static_cast<int64_t>(counts.size()) == experts, "counts of {} experts do not fit {} matrices", counts.size(),
        experts);
  int64_t sum = 0;
  for (const int64_t c : counts) sum += c;
  check(sum == rows, "counts of the experts add up to {}, there are {} rows", sum, rows);
}

// Gradients of stacks are large: what the products write is not cleared before.
Tensor zero_where_unused(Tensor stack, const std::vector<int64_t>& counts) {
  for (size_t e = 0; e < counts.size(); ++e)
    if (counts[e] == 0) stack.select(0, static_cast<int64_t>(e)).zero_();
  return stack;
}

struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::vector<int64_t>& counts) {
    context->save_for_backward({x, weight});
    context->saved_data["counts"] = counts;
    context->saved_data["bias"] = bias.has_value();
    auto y = torch::empty({x.size(0), weight.size(1)}, x.options().requires_grad(false));
    for_experts_apart(counts, x.device(), [&](int64_t e, int64_t begin, int64_t n, auto product) {
      const auto out = y.narrow(0, begin, n);
      if (bias) out.copy_(bias->select(0, e).expand_as(out));
      product(out, {x.narrow(0, begin, n)}, {weight.select(0, e), true}, bias.has_value());
    });
    return y;
  }
  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    const auto counts = context->saved_data["counts"].toIntVector();
    const auto grad = grads[0].contiguous();
    Tensor dx, dw, db;
    if (context->needs_input_grad(0)) dx = torch::empty_like(x);
    if (context->needs_input_grad(1)) dw = zero_where_unused(torch::empty_like(weight), counts);
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2))
      db = torch::zeros({weight.size(0), weight.size(1)}, weight.options());
    for_experts_apart(counts, x.device(), [&](int64_t e, int64_t begin, int64_t n, auto product) {
      const auto g = grad.narrow(0, begin, n);
      if (dx.defined()) product(dx.narrow(0, begin, n), {g}, {weight.select(0, e)}, false);
      if (dw.defined()) product(dw.select(0, e), {g, true}, {x.narrow(0, begin, n)}, false);
      if (db.defined()) db.select(0, e).copy_(g.sum(0, false, db.scalar_type()));
    });
    return {dx, dw, db, Tensor()};
  }
};

struct GroupedSwiglu : torch::autograd::Function<GroupedSwiglu> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& tokens, const Tensor& gates,
                        const Tensor& gate_w, const Tensor& up_w, const Tensor& down_w,
                        const std::vector<int64_t>& counts, bool keep) {
    const int64_t pairs = tokens.size(0), width = gate_w.size(1);
    const SwigluInputs in{x, tokens, gates, gate_w, up_w, down_w, counts};
    Tensor g, u;
    if (keep) {
      g = torch::empty({pairs, width}, x.options().requires_grad(false));
      u = torch::empty_like(g);
      context->save_for_backward({x, tokens, gates, gate_w, up_w, down_w, g, u});
      context->saved_data["counts"] = counts;
    }
    if (runs_as_tasks(in)) return swiglu_tasks_forward(in, g, u);
    auto y = torch::zeros({x.size(0), down_w.size(1)}, x.options().requires_grad(false));
    const auto weight_of_pair = gates.to(x.scalar_type()).unsqueeze(1);
    for_experts(counts, [&](int64_t e, int64_t begin, int64_t n) {
      const auto at = tokens.narrow(0, begin, n);
      const auto rows = x.index_select(0, at);
      auto gp = keep ? g.narrow(0, begin, n) : torch::empty({n, width}, y.options());
      auto up = keep ? u.narrow(0, begin, n) : torch::empty({n, width}, y.options());
      at::mm_out(gp, rows, gate_w.select(0, e).t());
      at::mm_out(up, rows, up_w.select(0, e).t());
      auto h = at::silu(gp).mul_(up);
      y.index_add_(0, at, at::mm(h, down_w.select(0, e).t()).mul_(weight_of_pair.narrow(0, begin, n)));
    });
    return y;
  }
  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &tokens = saved[1], &gates = saved[2], &gate_w = saved[3], &up_w = saved[4],
               &down_w = saved[5], &g = saved[6], &u = saved[7];
    const auto counts = context->saved_data["counts"].toIntVector();
    const auto dy = grads[0].contiguous();
    const SwigluInputs in{x, tokens, gates, gate_w, up_w, down_w, counts};
    const auto wanted = [&](size_t i, const Tensor& like) {
      return context->needs_input_grad(i) ? torch::empty_like(like) : Tensor();
    };
    SwigluGradients d{wanted(0, x), wanted(2, gates), wanted(3, gate_w), wanted(4, up_w), wanted(5, down_w)};
    for (const auto& stack : {d.gate, d.up, d.down})
      if (stack.defined()) zero_where_unused(stack, counts);
    if (runs_as_tasks(in)) {
      swiglu_tasks_backward(in, g, u, dy, d);
      return {d.x, Tensor(), d.gates, d.gate, d.up, d.down, Tensor(), Tensor()};
    }
    if (d.x.defined()) d.x.zero_();
    const auto weight_of_pair = gates.to(x.scalar_type()).unsqueeze(1);
    for_experts(counts, [&](int64_t e, int64_t begin, int64_t n) {
      const auto at = tokens.narrow(0, begin, n);
      const auto gp = g.narrow(0, begin, n), up = u.narrow(0, begin, n), share = weight_of_pair.narrow(0, begin, n);
      const auto grad = dy.index_select(0, at);
      const auto s = at::sigmoid(gp), a = gp * s;  // silu
      // The output's gradient through down, before the gate: also what the gate's own gradient is read from.
      auto t = at::mm(grad, down_w.select(0, e));
      const auto h = a * up;
      if (d.gates.defined()) d.gates.narrow(0, begin, n).copy_((t * h).sum(1));
      const auto product = [&](const Tensor& stack, const Tensor& left, const Tensor& right) {
        if (!stack.defined()) return;
        auto out = stack.select(0, e);
        at::mm_out(out, left.t(), right);
      };
      product(d.down, grad * share, h);
      if (!d.x.defined() && !d.gate.defined() && !d.up.defined()) return;
      t.mul_(share);
      const auto du = t * a;
      // silu'(g) = s + a (1 - s)
      const auto dg = t.mul_(up).mul_(s + a * (1.0 - s));
      const auto rows = d.gate.defined() || d.up.defined() ? x.index_select(0, at) : Tensor();
      product(d.gate, dg, rows);
      product(d.up, du, rows);
      if (d.x.defined()) d.x.index_add_(0, at, at::addmm(at::mm(dg, gate_w.select(0, e)), du, up_w.select(0, e)));
    });
    return {d.x, Tensor(), d.gates, d.gate, d.up, d.down, Tensor(), Tensor()};
  }
};

}  // namespace

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::vector<int64_t>& counts) {
  check(x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(2), "matrices {} cannot be applied to rows {}",
        weight.sizes().vec(), x.sizes().vec());
  check_counts(counts, weight.size(0), x.size(0));
  return GroupedLinear::apply(x, x.is_cpu() ? weight : weight.to(x.scalar_type()),
                              bias.defined() ? std::optional<Tensor>(bias) : std::nullopt, counts);
}

Tensor grouped_swiglu(const Tensor& x, const Tensor& tokens, const Tensor& gates, const std::vector<int64_t>& counts,
                      const Tensor& gate, const Tensor& up, const Tensor& down) {
  check_counts(counts, gate.size(0), tokens.size(0));
  const bool keep =
      torch::GradMode::is_enabled() && (x.requires_grad() || gates.requires_grad() || gate.requires_grad() ||
                                        up.requires_grad() || down.requires_grad());
  if (!keep && gate.size(0) > 0 && runs_by_rows(x, {gate.select(0, 0), up.select(0, 0), down.select(0, 0)})) {
    std::vector<SwigluMatrices> matrices(counts.size());
    for (size_t e = 0; e < counts.size(); ++e) {
      const auto at = static_cast<int64_t>(e);
      if (counts[e] > 0) matrices[e] = {gate.select(0, at), up.select(0, at), down.select(0, at)};
    }
    return swiglu_sum(x, swiglu_rows(x, tokens, counts, matrices), tokens, gates, counts);
  }
  // Only tasks compute with matrices of another type than x.
  const auto like = [&, mixed = runs_as_tasks({x, tokens, gates, gate, up, down, counts})](const Tensor& t) {
    return mixed ? t : t.to(x.scalar_type());
  };
  return GroupedSwiglu::apply(x, tokens, gates, like(gate), like(up), like(down), counts, keep);
}

namespace {

bool as_tasks(const Tensor& x, const Tensor& gates, const std::vector<int64_t>& counts) {
  return runs_as_tasks({x, x, gates, x, x, x, counts});
}

}  // namespace

Tensor swiglu_outputs(const Tensor& x, const Tensor& tokens, const Tensor& gates, const std::vector<int64_t>& counts,
                      const std::vector<int64_t>& all, const std::vector<SwigluMatrices>& matrices) {
  const auto used = std::find_if(counts.begin(), counts.end(), [](int64_t c) { return c > 0; });
  if (used != counts.end() && runs_by_rows(x, matrices[static_cast<size_t>(used - counts.begin())]))
    return swiglu_rows(x, tokens, counts, matrices);
  if (as_tasks(x, gates, all)) return swiglu_tasks_outputs(x, tokens, counts, all, matrices);
  auto outputs = torch::empty({tokens.size(0), x.size(1)}, x.options().requires_grad(false));
  for_experts(counts, [&](int64_t e, int64_t begin, int64_t n) {
    const SwigluMatrices& m = matrices[static_cast<size_t>(e)];
    const auto rows = x.index_select(0, tokens.narrow(0, begin, n));
    const auto h = at::silu(at::mm(rows, m.gate.t())).mul_(at::mm(rows, m.up.t()));
    outputs.narrow(0, begin, n).copy_(at::mm(h, m.down.t()));
  });
  return outputs;
}

Tensor swiglu_sum(const Tensor& x, const Tensor& outputs, const Tensor& tokens, const Tensor& gates,
                  const std::vector<int64_t>& counts) {
  auto y = torch::zeros({x.size(0), outputs.size(1)}, x.options().requires_grad(false));
  if (as_tasks(x, gates, counts)) {
    sum_pairs(outputs, gates.contiguous(), tokens, y);
    return y;
  }
  const auto weights = gates.to(x.scalar_type()).unsqueeze(1);
  for_experts(counts, [&](int64_t, int64_t begin, int64_t n) {
    y.index_add_(0, tokens.narrow(0, begin, n), outputs.narrow(0, begin, n) * weights.narrow(0, begin, n));
  });
  return y;
}

}  // namespace moiety
