#include "moiety/compress/uncurl.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/compress/expert_statistics.h"
#include "moiety/moe/mixture.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kLeastLength = 1e-12, kSymmetry = 1e-4;
constexpr int kRounds = 100;

/// The first of those with the largest use.
int64_t most_used(const Tensor& usage, const std::vector<int64_t>& among) {
  const double* u = usage.const_data_ptr<double>();
  int64_t best = among[0];
  for (const int64_t e : among)
    if (u[e] > u[best]) best = e;
  return best;
}

Tensor usage_on_cpu(const Tensor& usage, int64_t experts) {
  check(usage.dim() == 1 && usage.size(0) == experts, "{} uses for {} experts", usage.numel(), experts);
  auto u = usage.to(torch::kCPU, torch::kFloat64).contiguous();
  check(torch::isfinite(u).all().item<bool>() && u.min().item<double>() >= 0.0,
        "the use of an expert is negative or no finite number");
  return u;
}

}  // namespace

int64_t uncurl_clusters(int64_t experts, double factor) {
  check(factor >= 1.0 && std::isfinite(factor), "a factor of {}: it has to be 1 at least", factor);
  return std::max<int64_t>(1, std::llround(static_cast<double>(experts) / factor));
}

namespace {

/// Rows of the eigenvectors of the largest eigenvalues, at length 1: [E, clusters] f64.
Tensor embedding(const Tensor& affinity, int64_t clusters) {
  const auto scale = affinity.sum(1).clamp_min(kLeastLength).rsqrt();
  const auto normal = scale.unsqueeze(1) * affinity * scale.unsqueeze(0);
  // Eigenvalues ascend.
  const auto vectors = std::get<1>(torch::linalg_eigh(0.5 * (normal + normal.t())));
  const auto rows = vectors.narrow(1, vectors.size(1) - clusters, clusters);
  return (rows / rows.norm(2, {1}, true).clamp_min(kLeastLength)).contiguous();
}

/// Squared distances of all rows to one: [E].
Tensor distances_to(const Tensor& rows, const Tensor& centre) {
  return (rows - centre).square().sum(1);
}

/// `first`, then again and again the row farthest from those chosen.
Tensor spread_centres(const Tensor& rows, int64_t first, int64_t clusters) {
  std::vector<Tensor> centres = {rows[first]};
  auto nearest = distances_to(rows, rows[first]);
  while (static_cast<int64_t>(centres.size()) < clusters) {
    const double* d = nearest.const_data_ptr<double>();
    const int64_t farthest = std::max_element(d, d + nearest.numel()) - d;
    centres.push_back(rows[farthest]);
    nearest = torch::minimum(nearest, distances_to(rows, rows[farthest]));
  }
  return torch::stack(centres);
}

/// The nearest centre of every row, ties to the lowest.
std::vector<int64_t> nearest_centres(const Tensor& rows, const Tensor& centres) {
  std::vector<int64_t> out;
  for (int64_t e = 0; e < rows.size(0); ++e) {
    const auto d = distances_to(centres, rows[e]).contiguous();
    const double* to = d.const_data_ptr<double>();
    out.push_back(std::min_element(to, to + d.numel()) - to);
  }
  return out;
}

std::vector<int64_t> k_means(const Tensor& rows, Tensor centres) {
  std::vector<int64_t> labels;
  for (int round = 0; round < kRounds; ++round) {
    auto now = nearest_centres(rows, centres);
    if (now == labels) break;
    labels = std::move(now);
    for (int64_t k = 0; k < centres.size(0); ++k) {
      std::vector<int64_t> members;
      for (size_t e = 0; e < labels.size(); ++e)
        if (labels[e] == k) members.push_back(static_cast<int64_t>(e));
      if (!members.empty()) centres[k].copy_(rows.index_select(0, torch::tensor(members)).mean(0));
    }
  }
  return labels;
}

/// Numbers in the order in which they appear.
Tensor renumbered(const std::vector<int64_t>& labels) {
  std::vector<int64_t> number(labels.size(), -1), out;
  int64_t next = 0;
  for (const int64_t l : labels) {
    auto& n = number[static_cast<size_t>(l)];
    if (n < 0) n = next++;
    out.push_back(n);
  }
  return torch::tensor(out, torch::kInt64);
}

}  // namespace

Tensor spectral_clusters(const Tensor& affinity, const Tensor& usage, int64_t clusters) {
  const torch::NoGradGuard frozen;
  check(affinity.dim() == 2 && affinity.size(0) == affinity.size(1) && affinity.numel() > 0,
        "the affinity of experts is no square");
  const int64_t experts = affinity.size(0);
  check(clusters >= 1 && clusters <= experts, "{} clusters of {} experts: 1 to {} are possible", clusters, experts,
        experts);
  const auto a = affinity.to(torch::kCPU, torch::kFloat64);
  check(torch::isfinite(a).all().item<bool>(), "an affinity of experts is not a finite number");
  check((a - a.t()).abs().max().item<double>() <= kSymmetry * a.abs().max().item<double>(),
        "the affinity of experts is not symmetric");
  const auto u = usage_on_cpu(usage, experts);
  std::vector<int64_t> all;
  for (int64_t e = 0; e < experts; ++e) all.push_back(e);
  const auto rows = embedding(a, clusters);
  return renumbered(k_means(rows, spread_centres(rows, most_used(u, all), clusters)));
}

namespace {

/// Use inside a cluster: shares that add up to 1.
std::vector<double> shares(const Tensor& usage, const std::vector<int64_t>& members) {
  double sum = 0.0;
  for (const int64_t e : members) sum += usage.const_data_ptr<double>()[e];
  std::vector<double> out;
  for (const int64_t e : members)
    out.push_back(sum > 0.0 ? usage.const_data_ptr<double>()[e] / sum : 1.0 / static_cast<double>(members.size()));
  return out;
}

}  // namespace

UncurlCluster uncurl_cluster(const std::vector<ExpertWeights>& experts, const std::vector<int64_t>& members,
                             const Tensor& usage, bool align) {
  check(!members.empty(), "a cluster without members has no expert");
  const auto u = usage_on_cpu(usage, static_cast<int64_t>(experts.size()));
  const int64_t reference = most_used(u, members);
  std::vector<ExpertWeights> aligned;
  for (const int64_t e : members) aligned.push_back(experts.at(static_cast<size_t>(e)));
  UncurlCluster out;
  out.order.resize(members.size());
  for_each_expert(static_cast<int64_t>(members.size()), [&](int64_t m) {
    const auto i = static_cast<size_t>(m);
    auto& order = out.order[i];
    if (align && members[i] != reference) {
      order = alignment(experts[static_cast<size_t>(reference)], aligned[i]);
      aligned[i] = with_neurons(aligned[i], order);
    } else {
      order.resize(static_cast<size_t>(width_of(aligned[i])));
      std::iota(order.begin(), order.end(), int64_t{0});
    }
  });
  if (members.size() == 1) {
    out.expert = aligned[0];
    return out;
  }
  std::vector<const ExpertWeights*> parts;
  for (const auto& a : aligned) parts.push_back(&a);
  out.expert = weighted_sum(parts, shares(u, members), 1.0);
  return out;
}

Tensor average_rows(const Tensor& router, const Tensor& labels, const Tensor& usage) {
  const torch::NoGradGuard frozen;
  check(router.dim() == 2 && labels.dim() == 1 && router.size(0) == labels.size(0),
        "the router has no row for each of {} experts", labels.numel());
  const auto u = usage_on_cpu(usage, router.size(0));
  const auto rows = router.to(torch::kFloat32);
  std::vector<Tensor> out;
  const auto groups = members_of(labels);
  for (const auto& members : groups) {
    const auto weights = shares(u, members);
    auto row = torch::zeros_like(rows[0]);
    for (size_t i = 0; i < members.size(); ++i) row.add_(rows[members[i]], weights[i]);
    out.push_back(row);
  }
  return torch::stack(out);
}

UncurlMerge uncurl_merge(const std::vector<ExpertWeights>& experts, const Tensor& router, const Tensor& labels,
                         const Tensor& usage, bool align) {
  check_experts(experts);
  const auto count = static_cast<int64_t>(experts.size());
  check(labels.dim() == 1 && labels.size(0) == count, "{} labels for {} experts", labels.numel(), count);
  const auto groups = members_of(labels);
  UncurlMerge out;
  if (router.defined()) out.router = average_rows(router, labels, usage);
  out.experts.resize(groups.size());
  out.order = torch::empty({count, width_of(experts[0])}, torch::kInt64);
  for_each_expert(static_cast<int64_t>(groups.size()), [&](int64_t g) {
    const auto& members = groups[static_cast<size_t>(g)];
    auto cluster = uncurl_cluster(experts, members, usage, align);
    for (size_t i = 0; i < members.size(); ++i)
      std::copy(cluster.order[i].begin(), cluster.order[i].end(),
                out.order.data_ptr<int64_t>() + members[i] * out.order.size(1));
    out.experts[static_cast<size_t>(g)] = std::move(cluster.expert);
  });
  return out;
}

AliasedMixture route_aliases(const Tensor& x, const Tensor& router, const Tensor& labels,
                             const std::vector<ExpertWeights>& experts, int64_t top_k, bool normalize) {
  const torch::NoGradGuard frozen;
  const auto stacked = stack_experts(experts);
  check(stacked.gate.defined(), "experts without a gate are not mixed here");
  const auto count = static_cast<int64_t>(experts.size());
  check(labels.dim() == 1 && labels.size(0) == router.size(0), "{} labels for {} rows of the router", labels.numel(),
        router.size(0));
  check(static_cast<int64_t>(members_of(labels).size()) == count, "the labels name another number of experts than {}",
        count);
  TopKRouterOptions options;
  options.top_k = top_k;
  options.normalize = normalize;
  TopKRouter rule(Linear(router), options);
  GatedExperts set(LinearStack(stacked.gate), LinearStack(stacked.up), LinearStack(stacked.down), activation("silu"));
  Pass pass;
  const auto dispatch = Dispatch::of(rule.route(x, {}, pass), count, labels);
  AliasedMixture out;
  out.y = set.mix(x, dispatch);
  out.weights = torch::zeros({x.size(0), count}, torch::kFloat32);
  int64_t pair = 0;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < dispatch.counts[static_cast<size_t>(k)]; ++i, ++pair) {
      const float weight = dispatch.gates[pair].item<float>();
      out.weights[dispatch.tokens[pair].item<int64_t>()][k] = weight;
      out.calls += weight > 0.f ? 1 : 0;
    }
  return out;
}

namespace {

const RegisterMethod registered({
    .slug = "uncurl",
    .kind = "transform",
    .title = "UNCURL",
    .summary = "experts that the router treats alike on one task are clustered, and every cluster becomes one expert",
    .paper = {"Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning",
              "Sarkar et al.", 2024, "2409.01483"},
    .sites = {"ffn"},
    .config = describe<UncurlConfig>,
    .make = {},
});

}  // namespace
}  // namespace moiety
