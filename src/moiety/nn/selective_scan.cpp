#include "moiety/nn/selective_scan.h"

#include <torch/torch.h>

#include <algorithm>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/kernels/scan.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kMostStates = 256;

ScanRow row_of(const Tensor& u, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& what,
               int64_t index) {
  ScanRow row;
  row.tokens = u.size(1);
  row.channels = u.size(2);
  row.states = a.size(0);
  row.u = u.const_data_ptr<float>() + index * row.tokens * row.channels;
  row.dt = dt.const_data_ptr<float>() + index * row.tokens * row.channels;
  row.a = a.const_data_ptr<float>();
  row.b = b.const_data_ptr<float>() + index * row.tokens * row.states;
  row.c = c.const_data_ptr<float>() + index * row.tokens * row.states;
  if (what.numel() > 0)
    row.what = reinterpret_cast<const ScanToken*>(what.const_data_ptr<uint8_t>()) + index * row.tokens;
  return row;
}

int64_t chunks_of(int64_t tokens) {
  return (tokens + kScanChunk - 1) / kScanChunk;
}

// Calls body(row of the batch, group of channels, first, last) for all groups of all rows, on all threads. Groups do
// not depend on the number of threads, and neither does the order of any sum.
template <class Body>
void for_groups(const Tensor& u, int64_t states, const Body& body) {
  const int64_t channels = u.size(2), groups = (channels + kScanGroup - 1) / kScanGroup;
  const int64_t work = u.size(1) * states * kScanGroup;
  parallel_for(0, u.size(0) * groups, std::max<int64_t>(1, 20'000 / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i % groups;
      body(i / groups, group, group * kScanGroup, std::min(channels, (group + 1) * kScanGroup));
    }
  });
}

class Scan : public torch::autograd::Function<Scan> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& u, const Tensor& dt, const Tensor& a,
                               const Tensor& b, const Tensor& c, const Tensor& state, const Tensor& what, bool graph) {
    const int64_t batch = u.size(0), tokens = u.size(1), channels = u.size(2), states = a.size(0);
    auto y = torch::empty_like(u), last = state.clone();
    Tensor kept;
    if (graph) kept = torch::empty({batch, chunks_of(tokens), states, channels}, u.options());
    for_groups(u, states, [&](int64_t i, int64_t, int64_t first, int64_t end) {
      const int64_t size = states * channels;
      scan(row_of(u, dt, a, b, c, what, i), first, end, last.data_ptr<float>() + i * size,
           y.data_ptr<float>() + i * tokens * channels,
           graph ? kept.data_ptr<float>() + i * chunks_of(tokens) * size : nullptr);
    });
    if (graph) context->save_for_backward({u, dt, a, b, c, what, kept});
    return {y, last};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &u = saved[0], &dt = saved[1], &a = saved[2], &b = saved[3], &c = saved[4], &what = saved[5],
                 &kept = saved[6];
    const int64_t batch = u.size(0), tokens = u.size(1), channels = u.size(2), states = a.size(0);
    const int64_t groups = (channels + kScanGroup - 1) / kScanGroup, size = states * channels;
    const auto dy = grads[0].contiguous();
    auto dstate = grads[1].clone(torch::MemoryFormat::Contiguous);
    auto du = torch::empty_like(u), ddt = torch::empty_like(u);
    auto da = torch::empty({batch, states, channels}, u.options());
    auto db = torch::empty({groups, batch, tokens, states}, u.options()), dc = torch::empty_like(db);
    for_groups(u, states, [&](int64_t i, int64_t group, int64_t first, int64_t end) {
      static thread_local std::vector<float> scratch;
      scratch.resize(static_cast<size_t>(scan_scratch(states)));
      const int64_t wide = i * tokens * channels, shared = (group * batch + i) * tokens * states;
      ScanGradients out;
      out.du = du.data_ptr<float>() + wide;
      out.ddt = ddt.data_ptr<float>() + wide;
      out.da = da.data_ptr<float>() + i * size;
      out.db = db.data_ptr<float>() + shared;
      out.dc = dc.data_ptr<float>() + shared;
      scan_backward(row_of(u, dt, a, b, c, what, i), first, end, dy.const_data_ptr<float>() + wide,
                    kept.const_data_ptr<float>() + i * chunks_of(tokens) * size, dstate.data_ptr<float>() + i * size,
                    out, scratch.data());
    });
    return {du, ddt, da.sum(0), db.sum(0), dc.sum(0), dstate, Tensor(), Tensor()};
  }
};

void check_shapes(const Tensor& u, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
                  const Tensor& state, const Tensor& what) {
  check(u.dim() == 3 && a.dim() == 2 && dt.sizes() == u.sizes() && a.size(1) == u.size(2),
        "a scan needs u and dt [B, T, D] and a [N, D]");
  const std::vector<int64_t> tokens = {u.size(0), u.size(1), a.size(0)}, held = {u.size(0), a.size(0), a.size(1)};
  check(b.sizes() == tokens && c.sizes() == tokens, "a scan of {} tokens in {} states needs b and c [B, T, N]",
        u.size(1), a.size(0));
  check(!state.defined() || state.sizes() == held, "a scan of {} channels needs a state [B, N, D]", u.size(2));
  check(!what.defined() || (what.sizes() == u.sizes().slice(0, 2) && what.scalar_type() == torch::kUInt8),
        "a scan takes what tokens are as uint8 [B, T]");
  check(a.size(0) >= 1 && a.size(0) <= kMostStates, "a scan has 1 to {} states, not {}", kMostStates, a.size(0));
}

}  // namespace

std::pair<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& dt, const Tensor& a, const Tensor& b,
                                         const Tensor& c, const Tensor& state, const Tensor& what) {
  bool kernel = true, graph = false;
  for (const Tensor& t : {u, dt, a, b, c, state}) {
    if (!t.defined()) continue;
    kernel = kernel && t.is_cpu() && t.scalar_type() == torch::kFloat32;
    graph = graph || (torch::GradMode::is_enabled() && t.requires_grad());
  }
  if (!kernel) return selective_scan_composite(u, dt, a, b, c, state, what);
  check_shapes(u, dt, a, b, c, state, what);
  const auto before = state.defined() ? state : torch::zeros({u.size(0), a.size(0), a.size(1)}, u.options());
  const auto out =
      Scan::apply(u.contiguous(), dt.contiguous(), a.contiguous(), b.contiguous(), c.contiguous(), before.contiguous(),
                  what.defined() ? what.contiguous() : torch::empty({0}, torch::kUInt8), graph);
  return {out[0], out[1]};
}

std::pair<Tensor, Tensor> selective_scan_composite(const Tensor& u, const Tensor& dt, const Tensor& a, const Tensor& b,
                                                   const Tensor& c, const Tensor& state, const Tensor& what) {
  check_shapes(u, dt, a, b, c, state, what);
  auto h = state.defined() ? state : torch::zeros({u.size(0), a.size(0), a.size(1)}, u.options());
  const auto is = [&](int64_t t, ScanToken kind) {
    return (what.select(1, t) == static_cast<int64_t>(kind)).view({-1, 1, 1});
  };
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < u.size(1); ++t) {
    const auto step = dt.select(1, t).unsqueeze(1);
    const auto before = what.defined() ? h.masked_fill(is(t, ScanToken::fresh), 0.0) : h;
    auto next = (step * a).exp() * before + step * u.select(1, t).unsqueeze(1) * b.select(1, t).unsqueeze(2);
    auto y = (next * c.select(1, t).unsqueeze(2)).sum(1);
    if (what.defined()) {
      const auto skip = is(t, ScanToken::skip);
      next = torch::where(skip, h, next);
      y = y.masked_fill(skip.squeeze(2), 0.0);
    }
    h = next;
    rows.push_back(y);
  }
  return {torch::stack(rows, 1), h};
}

}  // namespace moiety
