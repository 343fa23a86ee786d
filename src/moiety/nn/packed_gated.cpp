#include "moiety/nn/packed_gated.h"

#include <torch/torch.h>

#include <algorithm>
#include <tuple>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

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

// Adds its expert's bias to every row of y.
void add_biases(std::span<const PackedGated> experts, std::span<const int64_t> counts, const float* PackedGated::*bias,
                torch::Tensor& y) {
  const int64_t width = y.size(1);
  float* to = y.data_ptr<float>();
  for (size_t e = 0; e < experts.size(); to += counts[e] * width, ++e) {
    if (experts[e].*bias == nullptr || counts[e] == 0) continue;
    parallel_for(0, counts[e], std::max<int64_t>(1, kGrain / width), [&](int64_t first, int64_t last) {
      add_bias(experts[e].*bias, last - first, width, to + first * width);
    });
  }
}

// Some pairs of one expert, which a task takes through all three matrices: what lies between these stays in the second
// cache, and threads meet once instead of after every matrix.
struct Part {
  size_t expert;
  int64_t begin, rows;
};
constexpr int64_t kPartRows = 32;                 // the weights are read again for every part
constexpr int64_t kBetween = int64_t{512} << 10;  // bytes of a part's gate and up rows
constexpr int64_t kTile = QuantizedTiles::kRows;

// Largest first and the last ones small, so that all threads end together; none where whole matrices one after another
// are better.
std::vector<Part> parts_of(std::span<const int64_t> counts, int64_t width) {
  std::vector<Part> parts;
  if (kPartRows * width * 2 * static_cast<int64_t>(sizeof(float)) > kBetween) return parts;
  int64_t begin = 0;
  for (size_t e = 0; e < counts.size(); begin += counts[e], ++e) {
    const int64_t tiles = (counts[e] + kTile - 1) / kTile, n = (counts[e] + kPartRows - 1) / kPartRows;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t first = tiles * i / n * kTile, last = std::min(tiles * (i + 1) / n * kTile, counts[e]);
      parts.push_back({e, begin + first, last - first});
    }
  }
  if (static_cast<int64_t>(parts.size()) < many_tasks()) return {};
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.rows > b.rows; });
  const std::vector<Part> last(parts.end() - many_tasks() / 2, parts.end());
  parts.resize(parts.size() - last.size());
  for (const Part& part : last)
    for (int64_t at = 0; at < part.rows; at += kTile)
      parts.push_back({part.expert, part.begin + at, std::min(kTile, part.rows - at)});
  return parts;
}

void run_part(const Part& part, const PackedGated& m, const torch::Tensor& x, const int64_t* tokens,
              const Combine& combine, float* y, int64_t out_width) {
  struct Own {
    TilesByKind in;
    QuantizedTiles between;
    torch::Tensor rows;
  };
  static thread_local Own own;
  const int64_t n = part.rows, width = m.up->rows();
  if (!own.rows.defined() || own.rows.numel() < 2 * n * width)
    own.rows = torch::empty({2 * kPartRows * width}, torch::kFloat32);
  const auto rows = own.rows.narrow(0, 0, 2 * n * width).view({2, n, width});
  const auto g = rows.select(0, 0), u = rows.select(0, 1);
  const auto fill = [](QuantizedTiles& t, const float* from, int64_t stride, const int64_t* index) {
    for (int64_t i = 0; i < t.tiles(); ++i) t.fill(i, from, stride, index);
  };
  const auto multiply = [](const PackedMatrix& matrix, const QuantizedTiles& t, float* to, int64_t stride) {
    packed_products(matrix.format(), matrix.data(), matrix.rows(), matrix.cols(), 0, matrix.groups(), t, to, stride);
  };
  own.in.forget();
  for (const auto& [matrix, bias, to] : {std::tuple(m.gate, m.gate_bias, g), std::tuple(m.up, m.up_bias, u)}) {
    const QuantizedTiles* in = own.in.get(matrix->format(), n, matrix->cols(), [&](QuantizedTiles& t) {
      fill(t, x.const_data_ptr<float>() + (tokens == nullptr ? part.begin * x.size(1) : 0), x.size(1),
           tokens == nullptr ? nullptr : tokens + part.begin);
    });
    multiply(*matrix, *in, to.data_ptr<float>(), width);
    add_bias(bias, n, width, to.data_ptr<float>());
  }
  const auto h = combine(g, u).contiguous();
  own.between.resize(activation_kind(m.down->format()), n, width);
  fill(own.between, h.const_data_ptr<float>(), width, nullptr);
  multiply(*m.down, own.between, y + part.begin * out_width, out_width);
  add_bias(m.down_bias, n, out_width, y + part.begin * out_width);
}

}  // namespace

torch::Tensor packed_gated(const torch::Tensor& x, std::span<const PackedGated> experts,
                           std::span<const int64_t> counts, const int64_t* tokens, const Combine& combine) {
  check(experts.size() == counts.size(), "counts of {} experts do not fit {}", counts.size(), experts.size());
  int64_t pairs = 0, width = 0, out_width = 0;
  for (size_t e = 0; e < experts.size(); ++e) {
    pairs += counts[e];
    if (counts[e] == 0) continue;
    width = experts[e].up->rows();
    out_width = experts[e].down->rows();
  }
  if (pairs == 0) return torch::zeros({0, x.size(1)}, x.options());
  auto y = torch::empty({pairs, out_width}, x.options());
  if (const auto parts = parts_of(counts, width); !parts.empty()) {
    run_tasks(static_cast<int64_t>(parts.size()), [&](int64_t i) {
      const Part& part = parts[static_cast<size_t>(i)];
      run_part(part, experts[part.expert], x, tokens, combine, y.data_ptr<float>(), out_width);
    });
    return y;
  }
  auto g = torch::empty({pairs, width}, x.options()), u = torch::empty({pairs, width}, x.options());
  float *gate = g.data_ptr<float>(), *up = u.data_ptr<float>();

  static thread_local Tiles memory;
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
  add_biases(experts, counts, &PackedGated::gate_bias, g);
  add_biases(experts, counts, &PackedGated::up_bias, u);

  const auto h = combine(g, u).contiguous();
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
  add_biases(experts, counts, &PackedGated::down_bias, y);
  return y;
}

void add_bias(const float* bias, int64_t rows, int64_t width, float* y) {
  for (float* row = y; bias != nullptr && row != y + rows * width; row += width)
    for (int64_t i = 0; i < width; ++i) row[i] += bias[i];
}

torch::Tensor apply_times(const GateTimes& times, torch::Tensor g, const torch::Tensor& u) {
  float* to = g.data_ptr<float>();
  const float* by = u.const_data_ptr<float>();
  if (g.numel() <= kGrain)
    times(to, by, g.numel());
  else
    parallel_for(0, g.numel(), kGrain,
                 [&](int64_t first, int64_t last) { times(to + first, by + first, last - first); });
  return g;
}

torch::Tensor act_times(Activation act, torch::Tensor g, const torch::Tensor& u) {
  const GateTimes times = gate_times(act);
  return times == nullptr ? act(g).mul_(u) : apply_times(times, std::move(g), u);
}

}  // namespace moiety
