#include "moiety/moe/routing_counts.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"

namespace moiety {
namespace {

double ratio(double a, double b) {
  return b == 0.0 ? 0.0 : a / b;
}

}  // namespace

double entropy_of(const torch::Tensor& p) {
  return torch::special::entr(p).sum().item<double>();
}

torch::Tensor RoutingCounts::add(const Trace::Record& record, const torch::Tensor& real) {
  const torch::NoGradGuard frozen;
  const auto& routing = record.routing;
  const torch::Tensor& width = routing.scores.defined() ? routing.scores : routing.logits;
  check(width.defined(), "a router that reports neither scores nor logits has no statistics");
  const int64_t n = routing.experts.size(0), count = record.experts > 0 ? record.experts : width.size(1);
  if (experts == 0) {
    experts = count;
    load = torch::zeros({count}, torch::kInt64);
    probability = torch::zeros({count}, torch::kFloat64);
  }
  check(experts == count, "block {} has {} experts here and had {} before", record.site.block, count, experts);
  // Whole numbers below 2^24 are exact in f32.
  check(n < (1 << 24), "a batch of {} tokens is too large for routing statistics", n);
  const auto chosen = routing.experts.to(torch::kCPU);
  const auto counted = real.defined() ? real.to(torch::kCPU) : torch::ones({n}, torch::kBool);
  const auto used = (chosen >= 0) & counted.unsqueeze(1);
  // A token that names an expert twice counts once.
  const auto hot = torch::zeros({n, count}).scatter_reduce_(1, chosen.clamp_min(0), used.to(torch::kFloat32), "amax");
  load += hot.sum(0).to(torch::kInt64);
  const int64_t here = counted.sum().item<int64_t>();
  tokens += here;
  if (routing.scores.defined()) {
    const auto all = routing.scores.to(torch::kCPU, torch::kFloat64);
    const auto p = (all / all.sum(-1, true).clamp_min(1e-300)).masked_fill(~counted.unsqueeze(1), 0.0);
    probability += p.sum(0).narrow(0, 0, count);
    entropy_sum += entropy_of(p);
    scored_options = all.size(1);
    scored += here;
  }
  return hot;
}

torch::Tensor RoutingCounts::share() const {
  return load.to(torch::kFloat64) / static_cast<double>(std::max<int64_t>(load.sum().item<int64_t>(), 1));
}
double RoutingCounts::experts_per_token() const {
  return ratio(load.sum().item<double>(), static_cast<double>(tokens));
}
double RoutingCounts::load_entropy() const {
  return entropy_of(share());
}
double RoutingCounts::token_entropy() const {
  return ratio(entropy_sum, static_cast<double>(scored));
}
double RoutingCounts::evenness() const {
  return experts > 1 ? load_entropy() / std::log(static_cast<double>(experts)) : 1.0;
}
double RoutingCounts::indecision() const {
  return scored_options > 1 ? token_entropy() / std::log(static_cast<double>(scored_options)) : 0.0;
}
double RoutingCounts::imbalance() const {
  return share().max().item<double>() * static_cast<double>(experts);
}
int64_t RoutingCounts::unused() const {
  return (load == 0).sum().item<int64_t>();
}

}  // namespace moiety
