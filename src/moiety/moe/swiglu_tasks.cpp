#include "moiety/moe/swiglu_tasks.h"

#include <torch/torch.h>

#include <algorithm>
#include <deque>

#include "moiety/kernels/swiglu.h"
#include "moiety/moe/dispatch.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/products.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

using torch::Tensor;

// Rows of a piece: enough for the products to run at full speed, few enough that threads end together.
constexpr int64_t kFewRows = 32, kManyRows = 280;
// Weight gradients of an expert are cut into blocks of at least so many rows; those of the last, behind which there is
// nothing to do for a thread that is through, into smaller ones.
constexpr int64_t kBlockRows = 256, kLastRows = 84;

struct Piece {
  int64_t expert, begin, rows;
};

int64_t rows_of_a_piece(const std::vector<int64_t>& counts) {
  int64_t pairs = 0;
  for (const int64_t c : counts) pairs += c;
  return std::clamp(pairs / many_tasks(), kFewRows, kManyRows);
}

// The rows of every expert in pieces of nearly equal size.
std::vector<Piece> pieces_of(const std::vector<int64_t>& counts, int64_t most) {
  int64_t begin = 0;
  std::vector<Piece> pieces;
  for (size_t e = 0; e < counts.size(); ++e) {
    const int64_t parts = (counts[e] + most - 1) / most;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = counts[e] * i / parts, to = counts[e] * (i + 1) / parts;
      pieces.push_back({static_cast<int64_t>(e), begin + from, to - from});
    }
    begin += counts[e];
  }
  return pieces;
}

std::vector<Piece> pieces_of(const std::vector<int64_t>& counts) {
  return pieces_of(counts, rows_of_a_piece(counts));
}

// What is between the products of one piece: h (weighted), dg and du from t; dg takes t's place.
template <class T>
void elementwise(const Tensor& g, const Tensor& u, const Tensor& t, const float* share, const Tensor& h,
                 const Tensor& du, float* dgates) {
  const int64_t n = g.size(0), width = g.size(1);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t at = r * width;
    const float sum =
        swiglu_backward(bits<T>(g) + at, bits<T>(u) + at, bits<T>(t) + at, share[r],
                        h.defined() ? bits<T>(h) + at : nullptr, bits<T>(t) + at, bits<T>(du) + at, width);
    if (dgates != nullptr) dgates[r] = sum;
  }
}

// An expert during the backward pass. What its pieces leave for its weight gradients lives from the first piece to the
// last block.
struct Running {
  int64_t begin = 0, rows = 0;
  std::once_flag first;
  Tensor h, dg, du;
  Countdown pieces;
  std::atomic<int64_t> blocks{0};
};

struct Task {
  int64_t expert;
  int64_t begin, rows;  // of a piece: rows of the pairs; of a block: rows of the weight
  int which;            // 0: a piece; 1, 2, 3: a block of the gradient of gate, up, down
};

}  // namespace

bool runs_as_tasks(const SwigluInputs& in) {
  const auto type = in.x.scalar_type();
  if (!in.x.device().is_cpu() || (type != torch::kFloat32 && type != torch::kBFloat16)) return false;
  for (const Tensor* w : {&in.gate, &in.up, &in.down})
    if (w->scalar_type() != type && w->scalar_type() != torch::kFloat32) return false;
  if (in.gates.scalar_type() != torch::kFloat32 || !in.x.is_contiguous()) return false;
  return static_cast<int64_t>(pieces_of(in.counts).size()) >= 2 * at::get_num_threads();
}

Tensor swiglu_tasks_outputs(const Tensor& x, const Tensor& tokens, const std::vector<int64_t>& counts,
                            const std::vector<int64_t>& all, const std::vector<SwigluMatrices>& matrices) {
  const auto pieces = pieces_of(counts, rows_of_a_piece(all));
  const auto options = x.options().requires_grad(false);
  auto outputs = torch::empty({tokens.size(0), x.size(1)}, options);
  run_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const auto [e, begin, n] = pieces[static_cast<size_t>(i)];
    const SwigluMatrices& m = matrices[static_cast<size_t>(e)];
    const auto at = tokens.narrow(0, begin, n);
    const auto g = torch::empty({n, m.gate.size(0)}, options), u = torch::empty_like(g);
    multiply(g, {x, false, at}, {m.gate, true});
    multiply(u, {x, false, at}, {m.up, true});
    multiply(outputs.narrow(0, begin, n), {at::silu(g).mul_(u)}, {m.down, true});
  });
  return outputs;
}

bool runs_by_rows(const Tensor& x, const SwigluMatrices& m) {
  constexpr int64_t kTokens = 16;  // of which an expert has a few
  return runs_by_rows(x, m.gate, kTokens) && runs_by_rows(x, m.up, kTokens) && plain_rows_of(m.down).data != nullptr;
}

Tensor swiglu_rows(const Tensor& x, const Tensor& tokens, const std::vector<int64_t>& counts,
                   const std::vector<SwigluMatrices>& matrices) {
  // Rows [first, last) of a matrix times the rows of its expert.
  struct Part {
    PlainRows rows;
    int64_t in, first, last;
    const float* x;
    int64_t n;
    float* y;
    int64_t stride;
  };
  std::vector<Part> parts;
  const auto add = [&](const Tensor& w, const float* from, int64_t n, float* to) {
    const int64_t out = w.size(0), each = std::max<int64_t>(16, out / many_tasks());
    for (int64_t first = 0; first < out; first += each)
      parts.push_back({plain_rows_of(w), w.size(1), first, std::min(out, first + each), from, n, to, out});
  };
  const auto run = [&] {
    run_tasks(static_cast<int64_t>(parts.size()), [&](int64_t i) {
      const Part& p = parts[static_cast<size_t>(i)];
      plain_products(p.rows, p.in, p.first, p.last, p.x, p.n, p.y, p.stride);
    });
    parts.clear();
  };
  const auto each_expert = [&](auto use) {
    int64_t begin = 0;
    for (size_t e = 0; e < counts.size(); begin += counts[e], ++e)
      if (counts[e] > 0) use(matrices[e], begin, counts[e]);
  };
  const auto rows = x.index_select(0, tokens).to(torch::kFloat32);
  const int64_t d = x.size(1);
  int64_t width = 0;
  each_expert([&](const SwigluMatrices& m, int64_t, int64_t) { width = m.gate.size(0); });
  auto g = torch::empty({rows.size(0), width}, rows.options()), u = torch::empty_like(g), y = torch::empty_like(rows);
  each_expert([&](const SwigluMatrices& m, int64_t begin, int64_t n) {
    const float* from = rows.const_data_ptr<float>() + begin * d;
    add(m.gate, from, n, g.data_ptr<float>() + begin * width);
    add(m.up, from, n, u.data_ptr<float>() + begin * width);
  });
  run();
  const auto h = at::silu_(g).mul_(u);
  each_expert([&](const SwigluMatrices& m, int64_t begin, int64_t n) {
    add(m.down, h.const_data_ptr<float>() + begin * width, n, y.data_ptr<float>() + begin * d);
  });
  run();
  return y.to(x.scalar_type());
}

Tensor swiglu_tasks_forward(const SwigluInputs& in, const Tensor& g, const Tensor& u) {
  auto pieces = pieces_of(in.counts);
  // Large ones first: what is left at the end is small.
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.rows > b.rows; });
  const auto options = in.x.options().requires_grad(false);
  auto outputs = torch::empty({in.tokens.size(0), in.down.size(1)}, options);
  run_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const auto [e, begin, n] = pieces[static_cast<size_t>(i)];
    const auto at = in.tokens.narrow(0, begin, n);
    const auto gp = g.defined() ? g.narrow(0, begin, n) : torch::empty({n, in.gate.size(1)}, options);
    const auto up = u.defined() ? u.narrow(0, begin, n) : torch::empty_like(gp);
    multiply(gp, {in.x, false, at}, {in.gate.select(0, e), true});
    multiply(up, {in.x, false, at}, {in.up.select(0, e), true});
    multiply(outputs.narrow(0, begin, n), {at::silu(gp).mul_(up)}, {in.down.select(0, e), true});
  });
  auto y = torch::empty({in.x.size(0), in.down.size(1)}, options);
  sum_pairs(outputs, in.gates.contiguous(), in.tokens, y);
  return y;
}

void swiglu_tasks_backward(const SwigluInputs& in, const Tensor& g, const Tensor& u, const Tensor& dy,
                           SwigluGradients& out) {
  const auto gates = in.gates.contiguous();
  const auto options = dy.options();
  const int64_t width = in.gate.size(1);
  const bool f32 = dy.scalar_type() == torch::kFloat32;
  // Pieces of an expert, then the blocks of the expert before it: when a block is taken, what it needs is mostly done.
  std::deque<Running> experts(in.counts.size());
  std::vector<Task> tasks;
  const auto pieces = pieces_of(in.counts);
  const auto add_blocks = [&](int64_t e, int64_t least) {
    for (const auto& [which, stack] : {std::pair{1, out.gate}, std::pair{2, out.up}, std::pair{3, out.down}}) {
      if (!stack.defined()) continue;
      const int64_t size = stack.size(1), parts = std::max<int64_t>(1, size / least);
      for (int64_t i = 0; i < parts; ++i)
        tasks.push_back({e, size * i / parts, size * (i + 1) / parts - size * i / parts, which});
      experts[static_cast<size_t>(e)].blocks += parts;
    }
  };
  int64_t before = -1;
  for (size_t i = 0; i < pieces.size();) {
    const int64_t e = pieces[i].expert;
    Running& r = experts[static_cast<size_t>(e)];
    r.begin = pieces[i].begin;
    r.rows = in.counts[static_cast<size_t>(e)];
    int64_t count = 0;
    for (; i < pieces.size() && pieces[i].expert == e; ++i, ++count)
      tasks.push_back({e, pieces[i].begin, pieces[i].rows, 0});
    r.pieces.expect(count);
    if (before >= 0) add_blocks(before, kBlockRows);
    before = e;
  }
  if (before >= 0) add_blocks(before, kLastRows);

  const auto dx = out.x.defined() ? torch::empty({in.tokens.size(0), dy.size(1)}, options) : Tensor();
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const auto [e, begin, n, which] = tasks[static_cast<size_t>(i)];
    Running& r = experts[static_cast<size_t>(e)];
    if (which == 0) {
      const Countdown::Done done(r.pieces);
      if (r.blocks > 0)
        std::call_once(r.first, [&] {
          if (out.down.defined()) r.h = torch::empty({r.rows, width}, options);
          r.dg = torch::empty({r.rows, width}, options);
          r.du = torch::empty_like(r.dg);
        });
      const auto part = [&](const Tensor& kept) {
        return kept.defined() ? kept.narrow(0, begin - r.begin, n) : torch::empty({n, width}, options);
      };
      const auto t = part(r.dg), du = part(r.du), h = r.h.defined() ? part(r.h) : Tensor();
      multiply(t, {dy, false, in.tokens.narrow(0, begin, n)}, {in.down.select(0, e)});
      (f32 ? elementwise<float> : elementwise<at::BFloat16>)(g.narrow(0, begin, n), u.narrow(0, begin, n), t,
                                                             gates.const_data_ptr<float>() + begin, h, du,
                                                             out.gates.defined() ? out.gates.data_ptr<float>() + begin
                                                                                 : nullptr);
      if (!dx.defined()) return;
      auto to = dx.narrow(0, begin, n);
      multiply(to, {t}, {in.gate.select(0, e)});
      multiply(to, {du}, {in.up.select(0, e)}, /*add=*/true);
      return;
    }
    r.pieces.wait();
    const auto at = in.tokens.narrow(0, r.begin, r.rows);
    const auto block = [&](const Tensor& stack) { return stack.select(0, e).narrow(0, begin, n); };
    if (which == 3)
      multiply(block(out.down), {dy.narrow(1, begin, n), true, at}, {r.h});
    else
      multiply(block(which == 1 ? out.gate : out.up), {(which == 1 ? r.dg : r.du).narrow(1, begin, n), true},
               {in.x, false, at});
    if (--r.blocks == 0) r.h = r.dg = r.du = Tensor();
  });
  if (dx.defined()) sum_pairs(dx, {}, in.tokens, out.x);
}

}  // namespace moiety
