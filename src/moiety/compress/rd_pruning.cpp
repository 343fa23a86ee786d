#include "moiety/compress/rd_pruning.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int64_t kFinestGrid = 65535;  // a choice takes 16 bits

// Puts weights back as they were, whatever happens.
class Restored {
 public:
  explicit Restored(Tensor weight) : weight_(std::move(weight)), saved_(weight_.detach().clone()) {}
  ~Restored() {
    const torch::NoGradGuard frozen;
    if (weight_.defined()) weight_.copy_(saved_);
  }
  Restored(Restored&& other) noexcept = default;
  Restored(const Restored&) = delete;
  Restored& operator=(const Restored&) = delete;
  const Tensor& saved() const { return saved_; }

 private:
  Tensor weight_, saved_;
};

// Indices from the smallest |w| on, ties by the lower one; those of `mask` 0 before all.
Tensor order_of(const Tensor& weight, const Tensor& mask) {
  auto key = weight.detach().abs().to(torch::kFloat32).flatten();
  if (mask.defined()) key = key.masked_fill(mask.to(torch::kBool).logical_not().flatten(), -1.0);
  return std::get<1>(torch::sort(key, /*stable=*/true, /*dim=*/0, /*descending=*/false));
}

int64_t zeros_of(const Tensor& mask) {
  return mask.defined() ? mask.numel() - mask.to(torch::kBool).sum().item<int64_t>() : 0;
}

// The sum over samples of the mean square, or the largest.
double distance(const Tensor& y, const Tensor& reference, bool worst_case) {
  const auto per_sample = (y.to(torch::kFloat32) - reference).square().flatten(1).mean(1).to(torch::kFloat64);
  return (worst_case ? per_sample.max() : per_sample.sum()).item<double>();
}

Tensor run_from(const StagedModel& model, Tensor x, size_t stage) {
  for (size_t s = stage; s < model.stages.size(); ++s) x = model.stages[s](x);
  return x;
}

int64_t samples_of(const std::vector<Tensor>& batches) {
  int64_t samples = 0;
  for (const Tensor& b : batches) samples += b.size(0);
  return samples;
}

// Distance of all batches, `from` what the first stage that runs reads.
double distance_of(const StagedModel& model, const std::vector<Tensor>& from, size_t stage,
                   const std::vector<Tensor>& outputs, bool worst_case) {
  double all = 0.0;
  for (size_t b = 0; b < from.size(); ++b) {
    const double one = distance(run_from(model, from[b], stage), outputs[b], worst_case);
    if (!std::isfinite(one)) return kNever;
    all = worst_case ? std::max(all, one) : all + one;
  }
  return worst_case ? all : all / static_cast<double>(samples_of(outputs));
}

void check_model(const StagedModel& model, const std::vector<Tensor>& batches) {
  check(!model.layers.empty(), "there is no layer that could be pruned");
  check(samples_of(batches) > 0, "there are no samples to measure with");
  for (const auto& layer : model.layers)
    check(layer.stage >= 0 && layer.stage < static_cast<int64_t>(model.stages.size()), "{} belongs to no stage",
          layer.name);
}

std::string name_of(const RdProblem& problem, size_t l) {
  return l < problem.names.size() ? problem.names[l] : fmt::format("layer {}", l);
}

const RegisterMethod registered(
    {.slug = "rd-pruning",
     .kind = "transform",
     .title = "RD-pruning",
     .summary = "magnitude pruning whose layer sparsities disturb the output least, found by dynamic programming",
     .paper = {"Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", "Xu et al.",
               2023, "2308.10438"},
     .sites = {},
     .config = describe<RdPruningConfig>,
     .make = {}});

}  // namespace

void RdPruningConfig::fields(Fields& f) {
  f("sparsity", sparsity, "share of all prunable weights that is zero in the end, from 0 and below 1").min(0).max(1);
  f("grid", grid, "steps of a curve").min(1).max(static_cast<double>(kFinestGrid));
  f("worst_case", worst_case, "the largest distortion of a sample, else the mean");
  f("iterations", iterations, "times to measure and prune, each the same share of what is left").min(1);
  f("floor", floor, "share of every layer that stays whatever its curve says").min(0).max(1);
}

std::string RdPruningConfig::problem() const {
  return sparsity < 1.0 ? "" : fmt::format("a sparsity of {} leaves nothing; it has to be below 1", sparsity);
}

double rd_round_target(double before, double sparsity, int64_t round, int64_t rounds) {
  if (round == rounds || before >= 1.0) return sparsity;
  const double share = static_cast<double>(round) / static_cast<double>(rounds);
  return 1.0 - (1.0 - before) * std::pow((1.0 - sparsity) / (1.0 - before), share);
}

int64_t rd_pruned(int64_t j, int64_t n, int64_t grid) {
  check(grid >= 1 && j >= 0 && j <= grid && n >= 0, "there is no point {} of {} on a curve of {} weights", j, grid, n);
  // j n / grid without leaving 64 bits.
  return n / grid * j + n % grid * j / grid;
}

int64_t rd_min_index(int64_t zeros, int64_t n, int64_t grid) {
  check(zeros >= 0 && zeros <= n, "{} of {} weights cannot be zero", zeros, n);
  int64_t j = 0;
  while (rd_pruned(j, n, grid) < zeros) ++j;
  return j;
}

Tensor rd_mask(const Tensor& weight, const Tensor& mask, int64_t pruned) {
  const torch::NoGradGuard frozen;
  const int64_t before = zeros_of(mask);
  check(!mask.defined() || mask.sizes() == weight.sizes(), "a mask has another shape than its weight");
  check(pruned >= before, "{} weights are to be zero, and {} are already: masks only grow", pruned, before);
  check(pruned <= weight.numel(), "{} weights are to be zero, and there are {}", pruned, weight.numel());
  auto out = torch::ones({weight.numel()}, weight.options().dtype(torch::kBool));
  out.index_fill_(0, order_of(weight, mask).slice(0, 0, pruned), false);
  return out.view(weight.sizes());
}

StagedModel relu_mlp(std::vector<Tensor> weights, const std::vector<Tensor>& biases) {
  check(weights.size() == biases.size(), "{} matrices have {} biases", weights.size(), biases.size());
  StagedModel out;
  for (size_t l = 0; l < weights.size(); ++l) {
    const bool last = l + 1 == weights.size();
    out.stages.push_back([w = weights[l], b = biases[l], last](const Tensor& x) {
      const auto y = torch::linear(x, w, b);
      return last ? y : y.relu();
    });
    out.layers.push_back({fmt::format("layer {}", l), std::move(weights[l]), static_cast<int64_t>(l)});
  }
  return out;
}

RdCurves rd_curves(const StagedModel& model, const std::vector<Tensor>& batches, int64_t grid, bool worst_case,
                   const std::function<void(int64_t, int64_t)>& progress) {
  const torch::NoGradGuard frozen;
  check_model(model, batches);
  check(grid >= 1 && grid <= kFinestGrid, "a curve of {} steps: 1 to {} are possible", grid, kFinestGrid);
  // What every stage reads while nothing is pruned.
  std::vector<std::vector<Tensor>> inputs{batches};
  for (const auto& stage : model.stages) {
    std::vector<Tensor> next;
    for (const Tensor& x : inputs.back()) next.push_back(stage(x));
    inputs.push_back(std::move(next));
  }
  RdCurves out;
  for (const Tensor& y : inputs.back()) {
    check(torch::isfinite(y).all().item<bool>(), "the model's output is not finite before anything is pruned");
    out.output.push_back(y.to(torch::kFloat32));
  }
  const auto layers = static_cast<int64_t>(model.layers.size());
  out.distortion = torch::zeros({layers, grid + 1}, torch::kFloat64);
  out.pruned = torch::zeros({layers, grid + 1}, torch::kInt64);
  auto d = out.distortion.accessor<double, 2>();
  auto k = out.pruned.accessor<int64_t, 2>();
  for (int64_t l = 0; l < layers; ++l) {
    const PrunableLayer& layer = model.layers[static_cast<size_t>(l)];
    const int64_t n = layer.weight.numel();
    const Restored restored(layer.weight);
    const auto order = order_of(restored.saved(), {});
    auto left = restored.saved().flatten().clone();
    for (int64_t j = 1; j <= grid; ++j) {
      k[l][j] = rd_pruned(j, n, grid);
      const auto more = order.slice(0, k[l][j - 1], k[l][j]);
      if (left.index_select(0, more).count_nonzero().item<int64_t>() == 0) {
        d[l][j] = d[l][j - 1];
      } else {
        left.index_fill_(0, more, 0.0);
        Tensor(layer.weight).copy_(left.view(layer.weight.sizes()));
        d[l][j] = distance_of(model, inputs[static_cast<size_t>(layer.stage)], static_cast<size_t>(layer.stage),
                              out.output, worst_case);
      }
      if (progress) progress(l * grid + j, layers * grid);
    }
  }
  return out;
}

double rd_joint_distortion(const StagedModel& model, const std::vector<Tensor>& batches, const RdCurves& curves,
                           const std::vector<Tensor>& masks, bool worst_case) {
  const torch::NoGradGuard frozen;
  check_model(model, batches);
  check(masks.size() == model.layers.size(), "{} masks for {} layers", masks.size(), model.layers.size());
  std::vector<Restored> restored;
  restored.reserve(masks.size());
  for (size_t l = 0; l < masks.size(); ++l) {
    Tensor weight = model.layers[l].weight;
    restored.emplace_back(weight);
    weight.masked_fill_(masks[l].to(torch::kBool).logical_not(), 0.0);
  }
  return distance_of(model, batches, 0, curves.output, worst_case);
}

int64_t rd_budget(const std::vector<int64_t>& num_weights, double target) {
  check(target >= 0.0 && target < 1.0, "a target sparsity of {}: it lies from 0 to below 1", target);
  const int64_t all = std::accumulate(num_weights.begin(), num_weights.end(), int64_t{0});
  return static_cast<int64_t>(std::floor((1.0 - target) * static_cast<double>(all) + 1e-6));
}

int64_t rd_unit(int64_t budget) {
  constexpr int64_t kBuckets = 1 << 16;
  return std::max<int64_t>(1, (budget + kBuckets - 1) / kBuckets);
}

namespace {

// One layer's choices: index, units that survive, distortion.
struct Choice {
  int64_t index, units;
  double distortion;
};
std::vector<Choice> choices_of(const RdProblem& p, size_t l, int64_t grid, int64_t unit) {
  const auto row = p.distortion[static_cast<int64_t>(l)].to(torch::kFloat64).contiguous();
  const int64_t low = p.min_index.empty() ? 0 : p.min_index[l], high = p.max_index.empty() ? grid : p.max_index[l];
  check(low >= 0 && high <= grid, "{}: points {} to {} of a curve of {} steps", name_of(p, l), low, high, grid);
  std::vector<Choice> out;
  for (int64_t j = low; j <= high; ++j) {
    const double d = row.const_data_ptr<double>()[j];
    if (!std::isfinite(d)) continue;
    const int64_t survivors = p.num_weights[l] - rd_pruned(j, p.num_weights[l], grid);
    out.push_back({j, (survivors + unit - 1) / unit, d});
  }
  check(!out.empty(), "{}: no point of its curve may be chosen", name_of(p, l));
  return out;
}

// Error when even the most pruning leaves too much.
void check_feasible(const RdProblem& p, const std::vector<std::vector<Choice>>& choices, int64_t grid, int64_t units) {
  int64_t least = 0;
  std::vector<std::string> bound;
  for (size_t l = 0; l < choices.size(); ++l) {
    const auto few = std::min_element(choices[l].begin(), choices[l].end(),
                                      [](const Choice& a, const Choice& b) { return a.units < b.units; });
    least += few->units;
    if (few->index < grid) bound.push_back(name_of(p, l));
  }
  if (least <= units) return;
  if (bound.size() > 5) bound.resize(5);
  fail("more than the budget of {} survives, at least {}, for these cannot be pruned further: {}", units, least,
       list_of(bound, "and"));
}

// best[s + units] = min(best[s] + distortion) over choices in their order; the first of equals stays.
void extend(const std::vector<Choice>& choices, const std::vector<double>& best, int64_t reach,
            std::vector<double>& next, uint16_t* chosen) {
  const auto units = static_cast<int64_t>(best.size()) - 1;
  for (const Choice& c : choices) {
    if (c.units > units) continue;
    const int64_t end = std::min(reach, units - c.units);
    double* to = next.data() + c.units;
    uint16_t* which = chosen + c.units;
    for (int64_t s = 0; s <= end; ++s) {
      const double v = best[static_cast<size_t>(s)] + c.distortion;
      if (v < to[s]) {
        to[s] = v;
        which[s] = static_cast<uint16_t>(c.index);
      }
    }
  }
}

}  // namespace

RdAllocation rd_allocate(const RdProblem& p, double target, int64_t unit) {
  const size_t layers = p.num_weights.size();
  check(layers > 0 && p.distortion.dim() == 2 && p.distortion.size(0) == static_cast<int64_t>(layers),
        "every layer has a number of weights and a curve");
  check(unit >= 1, "survivors cannot be counted in units of {}", unit);
  check((p.min_index.empty() || p.min_index.size() == layers) && (p.max_index.empty() || p.max_index.size() == layers),
        "every layer has bounds, or none");
  const int64_t grid = p.distortion.size(1) - 1;
  check(grid >= 1 && grid <= kFinestGrid, "a curve of {} steps: 1 to {} are possible", grid, kFinestGrid);
  RdAllocation out;
  out.budget = rd_budget(p.num_weights, target);
  const int64_t units = out.budget / unit;
  std::vector<std::vector<Choice>> choices;
  for (size_t l = 0; l < layers; ++l) choices.push_back(choices_of(p, l, grid, unit));
  check_feasible(p, choices, grid, units);
  const auto cells = static_cast<size_t>(units) + 1;
  std::vector<std::vector<uint16_t>> chosen(layers, std::vector<uint16_t>(cells));
  std::vector<double> best(cells, kNever), next;
  best[0] = 0.0;
  int64_t reach = 0;  // no more survivors than that so far
  for (size_t l = 0; l < layers; ++l) {
    next.assign(cells, kNever);
    extend(choices[l], best, reach, next, chosen[l].data());
    int64_t most = 0;
    for (const Choice& c : choices[l]) most = std::max(most, c.units);
    reach = std::min(units, reach + most);
    best.swap(next);
  }
  int64_t s = std::min_element(best.begin(), best.end()) - best.begin();
  out.distortion = best[static_cast<size_t>(s)];
  out.index.resize(layers);
  out.pruned.resize(layers);
  for (size_t l = layers; l-- > 0;) {
    const int64_t j = chosen[l][static_cast<size_t>(s)];
    out.index[l] = j;
    out.pruned[l] = rd_pruned(j, p.num_weights[l], grid);
    s -= (p.num_weights[l] - out.pruned[l] + unit - 1) / unit;
  }
  return out;
}

// ---- What it is compared with ----

namespace {

// Half to even.
double rounded(double x) {
  return std::nearbyint(x);
}

struct Counted {
  std::vector<double> nonzeros, sizes, sums;  // of each layer: non-zeros, elements, sum of its dimensions
  double all = 0.0;                           // non-zeros
};
Counted count(const std::vector<Tensor>& weights) {
  Counted c;
  for (const Tensor& w : weights) {
    c.nonzeros.push_back(static_cast<double>(w.count_nonzero().item<int64_t>()));
    c.sizes.push_back(static_cast<double>(w.numel()));
    const auto sizes = w.sizes();
    c.sums.push_back(static_cast<double>(std::accumulate(sizes.begin(), sizes.end(), int64_t{0})));
    c.all += c.nonzeros.back();
  }
  return c;
}

double share_of(double pruned, double nonzeros) {
  return nonzeros > 0.0 ? pruned / nonzeros : 0.0;
}

// Scores of all layers' non-zeros and the layer of each, in the order of layers and indices.
struct Scores {
  Tensor scores, layer;
};
template <class Score>
Scores scores_of(const std::vector<Tensor>& weights, const Score& score) {
  std::vector<Tensor> all, layer;
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto flat = weights[l].detach().to(torch::kCPU, torch::kFloat64).abs().flatten();
    all.push_back(score(flat.index_select(0, flat.nonzero().squeeze(1))));
    layer.push_back(torch::full({all.back().numel()}, static_cast<int64_t>(l), torch::kInt64));
  }
  return {torch::cat(all), torch::cat(layer)};
}

std::vector<double> counts_by_layer(const Tensor& layer, size_t layers) {
  const auto n = torch::bincount(layer, {}, static_cast<int64_t>(layers)).to(torch::kFloat64).contiguous();
  return {n.const_data_ptr<double>(), n.const_data_ptr<double>() + n.numel()};
}

std::vector<double> global_shares(const std::vector<Tensor>& weights, const Counted& c, double amount) {
  const auto [scores, layer] = scores_of(weights, [](const Tensor& w) { return w; });
  const auto order = std::get<1>(torch::sort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const auto gone = static_cast<int64_t>(rounded(c.all * amount));
  auto out = counts_by_layer(layer.index_select(0, order.slice(0, 0, gone)), weights.size());
  for (size_t l = 0; l < out.size(); ++l) out[l] = share_of(out[l], c.nonzeros[l]);
  return out;
}

// w^2 over the sum of those of the layer that are at least as large.
Tensor lamp_scores(const Tensor& sizes) {
  if (sizes.numel() == 0) return sizes;
  const auto [sorted, order] = torch::sort(sizes, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const auto sums = sorted.square().cumsum(0);
  // Equals count each other: the sum behind the last of them.
  const auto last = torch::searchsorted(-sorted, -sorted, /*out_int32=*/false, /*right=*/true) - 1;
  auto out = torch::empty_like(sizes);
  out.index_copy_(0, order, sorted.square() / sums.index_select(0, last));
  return out;
}

std::vector<double> lamp_shares(const std::vector<Tensor>& weights, const Counted& c, double amount) {
  const auto [scores, layer] = scores_of(weights, lamp_scores);
  const auto keep = static_cast<int64_t>(rounded(c.all * (1.0 - amount)));
  std::vector<double> out(weights.size(), 1.0);
  if (keep == 0) return out;
  const double least = std::get<0>(torch::kthvalue(scores, scores.numel() - keep + 1)).item<double>();
  const auto kept = counts_by_layer(layer.masked_select(scores >= least), weights.size());
  for (size_t l = 0; l < out.size(); ++l) out[l] = share_of(c.nonzeros[l] - kept[l], c.nonzeros[l]);
  return out;
}

std::vector<double> erk_shares(const Counted& c, double amount) {
  const size_t layers = c.nonzeros.size();
  std::vector<bool> dense(layers, false);
  for (;;) {
    double left = c.all * (1.0 - amount), sums = 0.0;  // survivors and dimensions of layers that are not dense
    for (size_t l = 0; l < layers; ++l) {
      if (dense[l])
        left -= c.nonzeros[l];
      else
        sums += c.sums[l];
    }
    std::vector<double> out(layers, 0.0);
    size_t fullest = layers;
    double ratio = 1.0;
    for (size_t l = 0; l < layers; ++l) {
      if (dense[l]) continue;
      const double kept = std::max(0.0, rounded(left * c.sums[l] / sums));
      const double own = c.nonzeros[l] > 0.0 ? kept / c.nonzeros[l] : (kept > 0.0 ? kNever : 0.0);
      out[l] = share_of(c.nonzeros[l] - kept, c.nonzeros[l]);
      if (own > ratio) {
        ratio = own;
        fullest = l;
      }
    }
    if (fullest == layers) return out;
    dense[fullest] = true;
  }
}

std::vector<double> uniform_plus_shares(const std::vector<Tensor>& weights, const Counted& c, double amount) {
  const size_t layers = weights.size(), last = layers - 1;
  const bool convolutional = std::any_of(weights.begin(), weights.end(), [](const Tensor& w) { return w.dim() > 2; });
  const size_t first = convolutional ? 1 : 0;
  const double gone = rounded(c.all * amount);
  const auto common = [&](double pruned, size_t end) {
    const double there = std::accumulate(c.nonzeros.begin() + static_cast<std::ptrdiff_t>(std::min(first, end)),
                                         c.nonzeros.begin() + static_cast<std::ptrdiff_t>(end), 0.0);
    check(pruned <= there, "uniform+ cannot prune {} weights: {} may go", gone, there);
    return share_of(pruned, there);
  };
  std::vector<double> out(layers, 0.0);
  const double share = common(gone, layers);
  std::fill(out.begin() + static_cast<std::ptrdiff_t>(std::min(first, layers)), out.end(), share);
  const double least = rounded(0.2 * c.sizes[last]);
  if (last < first || rounded((1.0 - share) * c.nonzeros[last]) >= least) return out;
  const double from_last = std::max(0.0, c.nonzeros[last] - least);
  const double rest = common(gone - from_last, last);
  std::fill(out.begin() + static_cast<std::ptrdiff_t>(first), out.end() - 1, rest);
  out[last] = share_of(from_last, c.nonzeros[last]);
  return out;
}

}  // namespace

std::vector<double> pruning_baseline(const std::string& name, const std::vector<Tensor>& weights, double amount) {
  const torch::NoGradGuard frozen;
  check(!weights.empty(), "there is no layer that could be pruned");
  check(amount >= 0.0 && amount <= 1.0, "a share of {} cannot be pruned: 0 to 1", amount);
  const Counted c = count(weights);
  if (name == "uniform") return std::vector<double>(weights.size(), amount);
  if (name == "global") return global_shares(weights, c, amount);
  if (name == "lamp") return lamp_shares(weights, c, amount);
  if (name == "erk") return erk_shares(c, amount);
  check(name == "uniform+", "unknown allocation `{}`; known are uniform, uniform+, global, lamp and erk", name);
  return uniform_plus_shares(weights, c, amount);
}

int64_t pruned_by_share(const Tensor& weight, double share) {
  const int64_t nonzeros = weight.count_nonzero().item<int64_t>();
  return weight.numel() - nonzeros + static_cast<int64_t>(rounded(share * static_cast<double>(nonzeros)));
}

}  // namespace moiety
