#include "moiety/compress/dern.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/compress/expert_statistics.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kLeastNorm = 1e-12;
constexpr int64_t kBlock = 1024;    // neurons whose similarities are in memory at a time
constexpr float kRounding = 1e-5f;  // of a cosine by products in f32

Tensor indices(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kInt64);
}

/// The chosen parts of every neuron side by side: [d, parts * h].
Tensor neurons_of(const ExpertWeights& expert, const std::vector<std::string>& components) {
  std::vector<Tensor> parts;
  for (const char* name : {"gate", "up", "down"}) {
    if (std::find(components.begin(), components.end(), name) == components.end()) continue;
    const std::string part = name;
    const Tensor t = part == "gate" ? expert.gate : part == "up" ? expert.up : expert.down.t();
    check(t.defined(), "neurons cannot be compared by their gate: these experts have none");
    parts.push_back(t.to(torch::kFloat32));
  }
  check(!parts.empty(), "neurons are compared by gate, up or down; none of them was named");
  return torch::cat(parts, 1);
}

std::vector<std::string> all_parts(const ExpertWeights& expert) {
  return expert.gate.defined() ? std::vector<std::string>{"gate", "up", "down"}
                               : std::vector<std::string>{"up", "down"};
}

/// Rows with their norms and, for products, at length 1.
struct Rows {
  Tensor v, unit;  // [n, p] f32, contiguous
  Tensor norm;     // [n] f64
  explicit Rows(const Tensor& rows) : v(rows.contiguous()), norm(v.to(torch::kFloat64).norm(2, {1})) {
    check(torch::isfinite(norm).all().item<bool>(), "the weights of an expert are not finite numbers");
    unit = v / norm.clamp_min(kLeastNorm).to(torch::kFloat32).unsqueeze(1);
  }
  int64_t count() const { return v.size(0); }
};

/// The row of `to` with the largest cosine for every row of `from`, ties to the lowest, and that cosine.
struct Nearest {
  Tensor cosine;  // [n] f32, in [-1, 1]
  Tensor index;   // [n] int64
};
Nearest nearest(const Rows& from, const Rows& to) {
  const int64_t n = from.count(), m = to.count(), p = from.v.size(1);
  Nearest out{torch::zeros({n}, torch::kFloat32), torch::zeros({n}, torch::kInt64)};
  const float *a = from.v.const_data_ptr<float>(), *b = to.v.const_data_ptr<float>();
  const double *a_norm = from.norm.const_data_ptr<double>(), *b_norm = to.norm.const_data_ptr<double>();
  const auto cosine = [&](int64_t i, int64_t j) {
    double dot = 0.0;
    for (int64_t c = 0; c < p; ++c) dot += static_cast<double>(a[i * p + c]) * static_cast<double>(b[j * p + c]);
    return static_cast<float>(dot / std::max(a_norm[i], kLeastNorm) / std::max(b_norm[j], kLeastNorm));
  };
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t rows = std::min(kBlock, n - first);
    const auto about = torch::matmul(from.unit.narrow(0, first, rows), to.unit.t()).contiguous();
    const float* near = about.const_data_ptr<float>();
    parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t i = first + r;
        if (a_norm[i] == 0.0) continue;  // as near to all
        const float least = *std::max_element(near + r * m, near + (r + 1) * m) - kRounding;
        float best = -2.f;
        int64_t which = 0;
        // A product's rounding depends on where a row lies in it; among those that it cannot tell apart f64 decides, so
        // that copies tie.
        for (int64_t j = 0; j < m; ++j) {
          if (near[r * m + j] < least) continue;
          const float exact = cosine(i, j);
          if (!(exact > best)) continue;
          best = exact;
          which = j;
        }
        // Not above 1: an exact copy must not pass a threshold of 1.
        out.cosine.data_ptr<float>()[i] = std::clamp(best, -1.f, 1.f);
        out.index.data_ptr<int64_t>()[i] = which;
      }
    });
  }
  return out;
}

void check_retained(const std::vector<int64_t>& retained, int64_t experts) {
  check(!retained.empty(), "an expert has to be retained at least");
  for (size_t i = 0; i < retained.size(); ++i)
    check(retained[i] >= 0 && retained[i] < experts && (i == 0 || retained[i] > retained[i - 1]),
          "retained experts are given ascending, each once, between 0 and {}", experts - 1);
}

/// For every row the retained expert that holds the nearest neuron, ties to the first.
Nearest best_expert(const Rows& from, const std::vector<Rows>& retained) {
  Nearest best{torch::full({from.count()}, -2.0, torch::kFloat32), torch::zeros({from.count()}, torch::kInt64)};
  for (size_t r = 0; r < retained.size(); ++r) {
    const auto cosine = nearest(from, retained[r]).cosine;
    best.index.masked_fill_(cosine > best.cosine, static_cast<int64_t>(r));
    best.cosine = torch::maximum(best.cosine, cosine);
  }
  return best;
}

}  // namespace

std::vector<int64_t> dern_retained(const Tensor& importance, int64_t keep, const std::vector<int64_t>& always) {
  const int64_t experts = importance.numel();
  check(importance.dim() == 1 && experts > 0, "importance is one number an expert");
  check(keep >= 1 && keep <= experts, "{} of {} experts cannot be kept: 1 to {} are possible", keep, experts, experts);
  auto rank = importance.to(torch::kCPU, torch::kFloat64).clone();
  check(torch::isfinite(rank).all().item<bool>(), "the importance of an expert is not a finite number");
  std::vector<int64_t> kept = always;
  std::sort(kept.begin(), kept.end());
  kept.erase(std::unique(kept.begin(), kept.end()), kept.end());
  for (const int64_t e : kept) check(e >= 0 && e < experts, "expert {} cannot be protected: there are {}", e, experts);
  check(static_cast<int64_t>(kept.size()) <= keep, "{} experts are protected, but {} are kept", kept.size(), keep);
  const auto order = moiety::top_k(rank, experts).second.contiguous();
  for (int64_t i = 0; static_cast<int64_t>(kept.size()) < keep; ++i) {
    const int64_t e = order.const_data_ptr<int64_t>()[i];
    if (std::find(kept.begin(), kept.end(), e) == kept.end()) kept.push_back(e);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

DernMoves dern_reassign(const std::vector<ExpertWeights>& experts, const Tensor& router,
                        const std::vector<int64_t>& retained, const DernConfig& config) {
  const torch::NoGradGuard frozen;
  check_experts(experts, /*one_width=*/false);
  const auto count = static_cast<int64_t>(experts.size());
  check_retained(retained, count);
  check(router.dim() == 2 && router.size(0) == count, "the router has {} rows for {} experts", router.size(0), count);
  check(config.threshold >= -1.0 && config.threshold <= 1.0, "a threshold of {}: cosines lie between -1 and 1",
        config.threshold);
  DernMoves out;
  for (int64_t e = 0; e < count; ++e)
    if (!std::binary_search(retained.begin(), retained.end(), e)) out.dropped.push_back(e);
  const auto rows = router.to(torch::kFloat32);
  out.router = rows.index_select(0, indices(retained)).clone();
  if (out.dropped.empty()) return out;
  std::vector<Rows> there;
  for (const int64_t r : retained) there.emplace_back(neurons_of(experts[static_cast<size_t>(r)], config.components));
  const auto original = indices(retained);
  for (const int64_t e : out.dropped) {
    const auto& expert = experts[static_cast<size_t>(e)];
    const auto [best, which] = best_expert(Rows(neurons_of(expert, config.components)), there);
    const auto moves = best.to(torch::kFloat64) > config.threshold;
    if (config.router_transfer) {
      const auto taken = torch::bincount(which.masked_select(moves), {}, static_cast<int64_t>(retained.size()));
      const auto share = taken.to(torch::kFloat32) / static_cast<double>(width_of(expert));
      out.router.add_(share.unsqueeze(1) * rows[e]);
    }
    const int64_t stay = moves.sum().item<int64_t>();
    out.moved += stay;
    out.lost += width_of(expert) - stay;
    out.target.push_back(original.index_select(0, which).masked_fill(~moves, -1));
    out.similarity.push_back(best);
  }
  return out;
}

namespace {

/// Positions of the `width` neurons of largest peak among the first `pool`, ascending.
Tensor first_centres(const ExpertWeights& neurons, int64_t pool, int64_t width) {
  const auto& by = neurons.gate.defined() ? neurons.gate : neurons.up;
  const auto peak = by.narrow(0, 0, pool).abs().amax(1).to(torch::kFloat32);
  return std::get<0>(moiety::top_k(peak, width).second.sort());
}

/// Every centre that has members of some weight: the mean norm of its members times their mean direction by weight. The
/// order of the sums does not depend on the number of threads.
void update(Tensor& centres, const Rows& rows, const Tensor& weight, const Tensor& label) {
  const int64_t width = centres.size(0), p = centres.size(1), n = rows.count();
  std::vector<std::vector<int64_t>> members(static_cast<size_t>(width));
  const int64_t* l = label.const_data_ptr<int64_t>();
  for (int64_t a = 0; a < n; ++a) members[static_cast<size_t>(l[a])].push_back(a);
  const float* from = rows.v.const_data_ptr<float>();
  const double *size = rows.norm.const_data_ptr<double>(), *w = weight.const_data_ptr<double>();
  float* to = centres.data_ptr<float>();
  parallel_for(0, width, 16, [&](int64_t first, int64_t last) {
    std::vector<double> sum(static_cast<size_t>(p));
    for (int64_t k = first; k < last; ++k) {
      double mass = 0.0, sizes = 0.0;
      std::fill(sum.begin(), sum.end(), 0.0);
      const auto& of = members[static_cast<size_t>(k)];
      for (const int64_t a : of) {
        mass += w[a];
        sizes += size[a];
        const double by = w[a] / std::max(size[a], kLeastNorm);
        for (int64_t i = 0; i < p; ++i) sum[static_cast<size_t>(i)] += by * from[a * p + i];
      }
      if (!(mass > 0.0)) continue;
      const double scale = sizes / static_cast<double>(of.size()) / mass;
      for (int64_t i = 0; i < p; ++i) to[k * p + i] = static_cast<float>(scale * sum[static_cast<size_t>(i)]);
    }
  });
}

ExpertWeights expert_of(const Tensor& centres, const ExpertWeights& like) {
  const int64_t h = hidden_of(like);
  const auto part = [&](int64_t i) { return centres.narrow(1, i * h, h).contiguous(); };
  if (!like.gate.defined()) return {{}, part(0), part(1).t().contiguous()};
  return {part(0), part(1), part(2).t().contiguous()};
}

}  // namespace

DernClusters dern_recluster(const ExpertWeights& neurons, const Tensor& weight, int64_t own, int64_t width,
                            const std::string& init, int64_t iterations) {
  const torch::NoGradGuard frozen;
  check_experts({neurons});
  const int64_t n = width_of(neurons), pool = init == "own" ? own : n;
  check(init == "own" || init == "peak", "unknown init `{}`; known are own and peak", init);
  check(own >= 0 && own <= n, "{} of {} neurons cannot be an expert's own", own, n);
  check(width >= 1 && width <= pool, "an expert of {} neurons cannot begin with {}", width, pool);
  check(weight.dim() == 1 && weight.size(0) == n, "{} weights for {} neurons", weight.numel(), n);
  check(iterations >= 1, "clustering takes a round at least, not {}", iterations);
  const auto w = weight.to(torch::kCPU, torch::kFloat64).contiguous();
  check(torch::isfinite(w).all().item<bool>() && w.min().item<double>() >= 0.0,
        "the weight of a neuron is negative or no finite number");
  if (n == own && n == width) return {neurons, torch::arange(n, torch::kInt64)};

  const Rows rows(neurons_of(neurons, all_parts(neurons)));
  auto centres = rows.v.index_select(0, first_centres(neurons, pool, width));
  Tensor label;
  for (int64_t round = 0; round < iterations; ++round) {
    const auto now = nearest(rows, Rows(centres)).index;
    if (label.defined() && torch::equal(now, label)) break;
    label = now;
    update(centres, rows, w, label);
  }
  return {expert_of(centres, neurons), label};
}

namespace {

/// The own neurons of expert r, then those that moved to it, with their weights.
struct Gathered {
  ExpertWeights neurons;
  Tensor weight;
};
Gathered gather(const std::vector<ExpertWeights>& experts, const Tensor& importance, const DernMoves& moves,
                int64_t r) {
  const auto& own = experts[static_cast<size_t>(r)];
  std::vector<Tensor> gate, up = {own.up}, down = {own.down};
  if (own.gate.defined()) gate.push_back(own.gate);
  std::vector<Tensor> weight = {importance[r].expand({width_of(own)})};
  for (size_t i = 0; i < moves.dropped.size(); ++i) {
    const auto come = moves.target[i].eq(r).nonzero().squeeze(1);
    if (come.numel() == 0) continue;
    const auto& from = experts[static_cast<size_t>(moves.dropped[i])];
    if (from.gate.defined()) gate.push_back(from.gate.index_select(0, come));
    up.push_back(from.up.index_select(0, come));
    down.push_back(from.down.index_select(1, come));
    weight.push_back(importance[moves.dropped[i]].expand({come.numel()}));
  }
  return {{gate.empty() ? Tensor() : torch::cat(gate), torch::cat(up), torch::cat(down, 1)}, torch::cat(weight)};
}

/// How many clusters hold a neuron beyond the first `own`.
int64_t clusters_with_foreign(const Tensor& label, int64_t own) {
  return std::get<0>(at::_unique2(label.slice(0, own))).numel();
}

}  // namespace

DernClusters dern_expert(const std::vector<ExpertWeights>& experts, const Tensor& importance, const DernMoves& moves,
                         int64_t r, const DernConfig& config) {
  const torch::NoGradGuard frozen;
  check(r >= 0 && r < static_cast<int64_t>(experts.size()) && importance.dim() == 1 &&
            importance.size(0) == static_cast<int64_t>(experts.size()),
        "{} importances for {} experts, of which {} is clustered", importance.numel(), experts.size(), r);
  const auto [neurons, weight] = gather(experts, importance.to(torch::kCPU, torch::kFloat64), moves, r);
  const int64_t own = width_of(experts[static_cast<size_t>(r)]), width = config.width > 0 ? config.width : own;
  check(own >= width, "expert {} has {} neurons, fewer than the {} it shall have", r, own, width);
  return dern_recluster(neurons, weight, own, width, config.init, config.iterations);
}

DernLayer dern_layer(const std::vector<ExpertWeights>& experts, const Tensor& router, const Tensor& importance,
                     const std::vector<int64_t>& retained, const DernConfig& config) {
  DernLayer out;
  out.moves = dern_reassign(experts, router, retained, config);
  out.retained = retained;
  for (const int64_t r : retained) {
    auto clusters = dern_expert(experts, importance, out.moves, r, config);
    out.mixed += clusters_with_foreign(clusters.label, width_of(experts[static_cast<size_t>(r)]));
    out.experts.push_back(std::move(clusters.expert));
    out.label.push_back(std::move(clusters.label));
  }
  return out;
}

namespace {

const RegisterMethod registered({
    .slug = "dern",
    .kind = "transform",
    .title = "DERN",
    .summary = "the least used experts go, their neurons move into the experts left that hold similar ones",
    .paper = {"Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs",
              "Zhou et al.", 2025, "2509.10377"},
    .sites = {"ffn"},
    .config = describe<DernConfig>,
    .make = {},
});

}  // namespace
}  // namespace moiety
