#include "moiety/compress/expert_plans.h"

#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>

#include "moiety/base/error.h"
#include "moiety/compress/expert_statistics.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

std::vector<double> numbers(const Tensor& t) {
  const auto d = t.to(torch::kCPU, torch::kFloat64).contiguous();
  return {d.const_data_ptr<double>(), d.const_data_ptr<double>() + d.numel()};
}

std::vector<int64_t> integers(const Tensor& t) {
  const auto i = t.to(torch::kCPU, torch::kInt64).contiguous();
  return {i.const_data_ptr<int64_t>(), i.const_data_ptr<int64_t>() + i.numel()};
}

std::vector<int64_t> counting(int64_t n) {
  std::vector<int64_t> out(static_cast<size_t>(n));
  std::iota(out.begin(), out.end(), int64_t{0});
  return out;
}

using Groups = std::vector<std::vector<int64_t>>;  // members by label

/// What lambdas hold on to: they outlive the layers that a plan was made for.
using SharedLayers = std::shared_ptr<const ExpertLayers>;
SharedLayers shared(const ExpertLayers& layers) {
  return std::make_shared<ExpertLayers>(layers.checkpoint());
}

/// The calibration of a layer, where it fits.
const LayerCalibration& calibration_of(const ExpertLayers::Layer& layer, const Calibration& calibration,
                                       int64_t least_tokens) {
  check(layer.map.empty(), "layer {}: its experts were merged before; begin with the model they came from",
        layer.block);
  const auto& c = calibration.of_block(layer.block);
  check(c.load.numel() == layer.experts, "the calibration has {} experts in layer {}, the model {}", c.load.numel(),
        layer.block, layer.experts);
  check(c.tokens >= least_tokens, "layer {}: the calibration has {} tokens, {} are needed at least", layer.block,
        c.tokens, least_tokens);
  return c;
}

/// The experts named, all others left empty.
std::vector<ExpertWeights> load(const ExpertLayers& layers, size_t at, const std::set<int64_t>& which) {
  std::vector<ExpertWeights> out(static_cast<size_t>(layers.layers()[at].experts));
  for (const int64_t e : which) out[static_cast<size_t>(e)] = layers.expert(at, e);
  return out;
}

std::vector<ExpertWeights> load_all(const ExpertLayers& layers, size_t at) {
  const auto all = counting(layers.layers()[at].experts);
  return load(layers, at, {all.begin(), all.end()});
}

std::vector<int64_t> tenths(const std::vector<Tensor>& cosines) {
  std::vector<int64_t> out(10);
  for (const auto& c : cosines)
    for (const double x : numbers(c)) ++out[static_cast<size_t>(std::clamp(x * 10.0, 0.0, 9.0))];
  return out;
}

}  // namespace

PlannedExperts plan_dern(const ExpertLayers& layers, const Calibration& calibration, const KeepRule& keep,
                         const ProtectedExperts& protect, const DernConfig& config) {
  check(!keep.across, "DERN keeps the same number of experts in every layer: leave --across out");
  check(protect.empty() || protect.size() == layers.layers().size(), "protected experts of {} layers for {}",
        protect.size(), layers.layers().size());
  const auto source = shared(layers);
  PlannedExperts out;
  for (size_t at = 0; at < layers.layers().size(); ++at) {
    const auto& layer = layers.layers()[at];
    check(config.width == 0 || config.width == layer.width,
          "experts of {} neurons in place of {} in layer {}: a checkpoint has one width", config.width, layer.width,
          layer.block);
    const Tensor importance = calibration_of(layer, calibration, 1).importance();
    std::vector<int64_t> always;
    if (!protect.empty()) always.assign(protect[at].begin(), protect[at].end());
    const auto retained = dern_retained(importance, keep.of_layer(layer.block, layer.experts), always);
    json report = {{"importance", numbers(importance)}, {"retained", retained}, {"moved", 0}, {"lost", 0}};
    if (static_cast<int64_t>(retained.size()) < layer.experts) {
      auto moves = dern_reassign(load_all(layers, at), layers.router(at), retained, config);
      report.update({{"moved", moves.moved}, {"lost", moves.lost}, {"similarity", tenths(moves.similarity)}});
      NewExperts n;
      n.block = layer.block;
      n.rows = retained;
      if (config.router_transfer && moves.moved > 0) n.router = moves.router;
      std::set<int64_t> needed(moves.dropped.begin(), moves.dropped.end());
      for (const int64_t r : retained) {
        const bool gains = std::any_of(moves.target.begin(), moves.target.end(),
                                       [&](const Tensor& t) { return t.eq(r).any().item<bool>(); });
        n.from.push_back(gains ? -1 : r);
        if (gains) needed.insert(r);
      }
      n.made = [source, at, needed, retained, from = n.from, moves = std::move(moves), importance, config] {
        const auto experts = load(*source, at, needed);
        std::vector<ExpertWeights> made(retained.size());
        for (size_t i = 0; i < retained.size(); ++i)
          if (from[i] < 0) made[i] = dern_expert(experts, importance, moves, retained[i], config).expert;
        return made;
      };
      out.layers.push_back(std::move(n));
    }
    out.report.push_back(std::move(report));
  }
  return out;
}

namespace {

/// Labels of all experts where those of `alone` are clusters of their own.
Tensor cluster(const LayerCalibration& c, int64_t clusters, const std::set<int64_t>& alone) {
  const int64_t experts = c.load.numel();
  std::vector<int64_t> others;
  for (int64_t e = 0; e < experts; ++e)
    if (alone.count(e) == 0) others.push_back(e);
  const auto affinity = cosine_affinity(c.gram);
  const auto usage = c.usage();
  if (alone.empty()) return spectral_clusters(affinity, usage, clusters);
  const auto left = clusters - static_cast<int64_t>(alone.size());
  check(others.empty() || left >= 1, "{} experts are protected, but {} are to be left", alone.size(), clusters);
  std::vector<int64_t> group(static_cast<size_t>(experts), -1), number(static_cast<size_t>(experts), -1), out;
  if (!others.empty()) {
    const auto by = torch::tensor(others, torch::kInt64);
    const auto labels =
        integers(spectral_clusters(affinity.index_select(0, by).index_select(1, by), usage.index_select(0, by), left));
    for (size_t i = 0; i < others.size(); ++i) group[static_cast<size_t>(others[i])] = labels[i];
  }
  int64_t next = std::max<int64_t>(left, 0), numbered = 0;
  for (const int64_t e : alone) group[static_cast<size_t>(e)] = next++;
  // Numbered by the first expert of each.
  for (const int64_t g : group) {
    auto& n = number[static_cast<size_t>(g)];
    if (n < 0) n = numbered++;
    out.push_back(n);
  }
  return torch::tensor(out, torch::kInt64);
}

/// From a label an expert: experts alone keep their bytes, groups are made by `merge` out of their members (and of
/// `besides`).
NewExperts merged(const SharedLayers& source, size_t at, const Tensor& labels, const std::set<int64_t>& besides,
                  std::function<std::vector<ExpertWeights>(const std::vector<ExpertWeights>&, const Groups&)> merge) {
  const auto& layer = source->layers()[at];
  NewExperts n;
  n.block = layer.block;
  n.rows = counting(layer.rows);
  n.map = integers(labels);
  const auto groups = members_of(labels);
  std::set<int64_t> needed = besides;
  for (const auto& g : groups) {
    n.from.push_back(g.size() == 1 ? g[0] : -1);
    if (g.size() > 1) needed.insert(g.begin(), g.end());
  }
  n.made = [source, at, needed, groups, merge = std::move(merge)] { return merge(load(*source, at, needed), groups); };
  return n;
}

}  // namespace

PlannedExperts plan_uncurl(const ExpertLayers& layers, const Calibration& calibration, const ProtectedExperts& protect,
                           const UncurlConfig& config) {
  check(protect.empty() || protect.size() == layers.layers().size(), "protected experts of {} layers for {}",
        protect.size(), layers.layers().size());
  const auto source = shared(layers);
  PlannedExperts out;
  for (size_t at = 0; at < layers.layers().size(); ++at) {
    const auto& layer = layers.layers()[at];
    const auto& c = calibration_of(layer, calibration, layer.experts);
    const Tensor usage = c.usage();
    const auto labels =
        cluster(c, uncurl_clusters(layer.experts, config.factor), protect.empty() ? std::set<int64_t>() : protect[at]);
    const auto groups = members_of(labels);
    out.report.push_back({{"usage", numbers(usage)}, {"clusters", groups.size()}, {"labels", integers(labels)}});
    if (static_cast<int64_t>(groups.size()) == layer.experts) continue;
    auto n = merged(source, at, labels, {},
                    [usage, align = config.align](const std::vector<ExpertWeights>& experts, const Groups& groups) {
                      std::vector<ExpertWeights> made(groups.size());
                      for (size_t g = 0; g < groups.size(); ++g)
                        if (groups[g].size() > 1) made[g] = uncurl_cluster(experts, groups[g], usage, align).expert;
                      return made;
                    });
    if (config.router == "average") {
      n.router = average_rows(layers.router(at), labels, usage);
      n.map.clear();
      n.rows.clear();
      for (const auto& g : groups) n.rows.push_back(g[0]);
    }
    out.layers.push_back(std::move(n));
  }
  return out;
}

namespace {

/// The means of groups of two or more, aligned to expert 0.
std::vector<ExpertWeights> aligned_means(const std::vector<ExpertWeights>& experts, const Groups& groups,
                                         const Tensor& usage, const MSmoeConfig& config) {
  auto aligned = experts;
  for_each_expert(static_cast<int64_t>(experts.size()), [&](int64_t e) {
    const auto i = static_cast<size_t>(e);
    if (config.align && e > 0 && experts[i].up.defined())
      aligned[i] = with_neurons(experts[i], alignment(experts[0], experts[i], config.include_down));
  });
  std::vector<ExpertWeights> out(groups.size());
  for (size_t g = 0; g < groups.size(); ++g)
    if (groups[g].size() > 1) out[g] = merge_group(aligned, groups[g], usage, config.eps);
  return out;
}

}  // namespace

PlannedExperts plan_m_smoe(const ExpertLayers& layers, const Calibration& calibration, const MSmoeConfig& config) {
  const auto& all = layers.layers();
  std::vector<Tensor> usage, similarity;
  std::vector<int64_t> here;
  for (size_t at = 0; at < all.size(); ++at) {
    check(all[at].experts == all[0].experts,
          "layer {} has {} experts, layer {} has {}: groups are counted over layers of one number", all[at].block,
          all[at].experts, all[0].block, all[0].experts);
    const auto& c = calibration_of(all[at], calibration, all[at].experts);
    usage.push_back(c.usage());
    similarity.push_back(cosine_affinity(c.gram));
    if (config.layers.empty()) here.push_back(static_cast<int64_t>(at));
  }
  for (const int64_t block : config.layers) here.push_back(static_cast<int64_t>(layers.of_block(block)));
  const auto groups =
      group_experts(torch::stack(usage), torch::stack(similarity), config.groups, here, config.capacity);
  const auto source = shared(layers);
  PlannedExperts out;
  for (size_t at = 0; at < all.size(); ++at) {
    const auto labels = groups.labels[static_cast<int64_t>(at)];
    const auto count = groups.groups[static_cast<int64_t>(at)].item<int64_t>();
    out.report.push_back({{"usage", numbers(usage[at])}, {"groups", count}, {"labels", integers(labels)}});
    if (count == all[at].experts) continue;
    out.layers.push_back(
        merged(source, at, labels, {0},
               [u = usage[at], config](const std::vector<ExpertWeights>& experts, const Groups& groups) {
                 return aligned_means(experts, groups, u, config);
               }));
  }
  return out;
}

}  // namespace moiety
