#include "moiety/nn/packed_gated.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

// Kept from call to call, by thread: their memory is asked for again for every layer of every token.
struct Tiles {
  std::vector<QuantizedTiles> in, between;
};

QuantizedTiles& sized(std::vector<QuantizedTiles>& all, size_t& used, ActivationKind kind, int64_t n, int64_t cols) {
  if (used == all.size()) all.emplace_back();
  QuantizedTiles& t = all[used++];
  t.resize(kind, n, cols);
  return t;
}

}  // namespace

torch::Tensor packed_gated(const torch::Tensor& x, std::span<const PackedGated> experts,
                           std::span<const int64_t> counts, const int64_t* tokens, const Combine& combine) {
  check(experts.size() == counts.size(), "counts of {} experts do not fit {}", counts.size(), experts.size());
  static thread_local Tiles memory;
  int64_t pairs = 0, width = 0, out_width = 0;
  for (size_t e = 0; e < experts.size(); ++e) {
    pairs += counts[e];
    if (counts[e] == 0) continue;
    width = experts[e].up->rows();
    out_width = experts[e].down->rows();
  }
  if (pairs == 0) return torch::zeros({0, x.size(1)}, x.options());
  auto g = torch::empty({pairs, width}, x.options()), u = torch::empty({pairs, width}, x.options());
  float *gate = g.data_ptr<float>(), *up = u.data_ptr<float>();

  // Reserved, for jobs point into them.
  memory.in.reserve(2 * experts.size());
  memory.between.reserve(experts.size());
  std::vector<TileJob> fills;
  std::vector<PackedJob> jobs;
  size_t used = 0;
  const QuantizedTiles* shared[2] = {nullptr, nullptr};  // one token: all experts read the same, by kind
  const auto tiles_of = [&](const PackedMatrix& m, int64_t begin, int64_t n) -> const QuantizedTiles* {
    const ActivationKind kind = activation_kind(m.format());
    const QuantizedTiles*& same = shared[kind == ActivationKind::Blocks32 ? 0 : 1];
    if (x.size(0) == 1 && n == 1 && same != nullptr) return same;
    QuantizedTiles& t = sized(memory.in, used, kind, n, m.cols());
    fills.push_back({&t, x.const_data_ptr<float>() + (tokens == nullptr ? begin * x.size(1) : 0), x.size(1),
                     tokens == nullptr ? nullptr : tokens + begin});
    same = &t;
    return &t;
  };
  int64_t begin = 0;
  for (size_t e = 0; e < experts.size(); begin += counts[e], ++e) {
    if (counts[e] == 0) continue;
    const PackedGated& m = experts[e];
    const QuantizedTiles* in = tiles_of(*m.gate, begin, counts[e]);
    const bool alike = activation_kind(m.gate->format()) == activation_kind(m.up->format());
    jobs.push_back({m.gate, in, gate + begin * width, width});
    jobs.push_back({m.up, alike ? in : tiles_of(*m.up, begin, counts[e]), up + begin * width, width});
  }
  quantize_all(fills);
  run_jobs(jobs);

  const auto h = combine(g, u).contiguous();
  auto y = torch::empty({pairs, out_width}, x.options());
  fills.clear();
  jobs.clear();
  used = 0;
  begin = 0;
  for (size_t e = 0; e < experts.size(); begin += counts[e], ++e) {
    if (counts[e] == 0) continue;
    const PackedMatrix& down = *experts[e].down;
    QuantizedTiles& t = sized(memory.between, used, activation_kind(down.format()), counts[e], width);
    fills.push_back({&t, h.const_data_ptr<float>() + begin * width, width});
    jobs.push_back({&down, &t, y.data_ptr<float>() + begin * out_width, out_width});
  }
  quantize_all(fills);
  run_jobs(jobs);
  return y;
}

torch::Tensor act_times(Activation act, torch::Tensor g, const torch::Tensor& u) {
  const GateTimes times = gate_times(act);
  if (times == nullptr) return act(g).mul_(u);
  float* to = g.data_ptr<float>();
  const float* by = u.const_data_ptr<float>();
  constexpr int64_t kGrain = 16384;
  if (g.numel() <= kGrain)
    times(to, by, g.numel());
  else
    parallel_for(0, g.numel(), kGrain,
                 [&](int64_t first, int64_t last) { times(to + first, by + first, last - first); });
  return g;
}

}  // namespace moiety
