#include "moiety/compress/expert_statistics.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/compress/assignment.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kLeastNorm = 1e-7;

/// Of `rows` tokens the indices that count; undefined: all do.
Tensor real_rows(int64_t rows, const Tensor& real) {
  if (!real.defined()) return {};
  check(real.dim() == 1 && real.size(0) == rows, "a mask of {} entries for {} tokens", real.numel(), rows);
  return real.to(torch::kCPU).ne(0).nonzero().squeeze(1);
}

Tensor only(const Tensor& t, const Tensor& rows) {
  const auto here = t.detach().to(torch::kCPU);
  return rows.defined() ? here.index_select(0, rows) : here;
}

}  // namespace

int64_t real_tokens(int64_t rows, const Tensor& real) {
  const int64_t n = real.defined() ? real_rows(rows, real).numel() : rows;
  check(n > 0, "no token to look at: the calibration text is empty, or all of it is padding");
  return n;
}

Tensor selection_counts(const Routing& routing, int64_t experts, const Tensor& real) {
  const auto chosen = only(routing.experts, real_rows(routing.experts.size(0), real)).reshape({-1});
  return torch::bincount(chosen.masked_select(chosen >= 0), {}, experts);
}

Tensor usage_of(const Tensor& counts) {
  const auto c = counts.to(torch::kFloat64);
  const double all = c.sum().item<double>();
  check(all > 0.0, "no token has chosen an expert: the calibration text is empty, or all of it is padding");
  return c / all;
}

Tensor gate_mass(const Routing& routing, int64_t experts, const Tensor& real) {
  const auto rows = real_rows(routing.experts.size(0), real);
  const auto chosen = only(routing.experts, rows).contiguous();
  const auto gates = only(routing.gates, rows).to(torch::kFloat32).contiguous();
  // Entry by entry in the order of tokens, whatever the number of threads.
  auto mass = torch::zeros({experts}, torch::kFloat64);
  double* to = mass.data_ptr<double>();
  const float* g = gates.const_data_ptr<float>();
  const int64_t* e = chosen.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < chosen.numel(); ++i)
    if (e[i] >= 0) to[e[i]] += g[i];
  return mass;
}

Tensor logit_gram(const Tensor& logits, const Tensor& real) {
  check(logits.dim() == 2, "router logits are a matrix, tokens by experts, not of {} dimensions", logits.dim());
  const auto rows = only(logits, real_rows(logits.size(0), real)).to(torch::kFloat64);
  check(!rows.isnan().any().item<bool>(), "a router logit is not a number");
  return torch::matmul(rows.t(), rows);
}

Routing route_logits(const Tensor& logits, int64_t top_k, bool normalize) {
  check(logits.dim() == 2, "router logits are a matrix, tokens by experts, not of {} dimensions", logits.dim());
  Routing out;
  out.logits = logits.detach().to(torch::kFloat32);
  check(!out.logits.isnan().any().item<bool>(), "a router logit is not a number");
  out.scores = torch::softmax(out.logits, -1);
  // The logits choose: their softmax may round two of them to one number.
  out.experts = moiety::top_k(out.logits, top_k).second;
  out.gates = out.scores.gather(1, out.experts);
  if (normalize) out.gates = out.gates / out.gates.sum(-1, true);
  return out;
}

Tensor cosine_affinity(const Tensor& gram) {
  check(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) > 0,
        "the Gram matrix of router logits is no square");
  const auto g = gram.to(torch::kFloat64);
  const auto norm = g.diagonal().clamp_min(0.0).sqrt().clamp_min(kLeastNorm);
  auto affinity = (g / norm.unsqueeze(0) / norm.unsqueeze(1)).clamp(-1.0, 1.0).add(1.0).mul(0.5);
  affinity = 0.5 * (affinity + affinity.t());  // products are symmetric to rounding only
  affinity.diagonal().fill_(1.0);
  return affinity;
}

int64_t width_of(const ExpertWeights& expert) {
  return expert.up.size(0);
}

int64_t hidden_of(const ExpertWeights& expert) {
  return expert.up.size(1);
}

void check_experts(const std::vector<ExpertWeights>& experts, bool one_width) {
  check(!experts.empty(), "there are no experts");
  const bool gated = experts[0].gate.defined();
  const int64_t h = hidden_of(experts[0]), d = width_of(experts[0]);
  for (size_t e = 0; e < experts.size(); ++e) {
    const auto& x = experts[e];
    check(x.up.dim() == 2 && x.down.dim() == 2 && x.down.size(0) == x.up.size(1) && x.down.size(1) == x.up.size(0) &&
              (!x.gate.defined() || x.gate.sizes() == x.up.sizes()),
          "expert {}: its matrices do not go together; up is [d, h], gate as up, down [h, d]", e);
    check(x.gate.defined() == gated, "expert {} has {} gate, expert 0 has {}", e, x.gate.defined() ? "a" : "no",
          gated ? "one" : "none");
    check(hidden_of(x) == h, "expert {} reads {} features, expert 0 {}", e, hidden_of(x), h);
    check(!one_width || width_of(x) == d, "expert {} has {} neurons, expert 0 {}: they have to be of one width", e,
          width_of(x), d);
  }
}

std::vector<ExpertWeights> unstack_experts(const Tensor& gate, const Tensor& up, const Tensor& down) {
  check(up.dim() == 3 && down.dim() == 3 && up.size(0) == down.size(0) && up.size(0) > 0 &&
            (!gate.defined() || (gate.dim() == 3 && gate.size(0) == up.size(0))),
        "stacked experts are gate and up [E, d, h] and down [E, h, d], of one E");
  std::vector<ExpertWeights> out;
  for (int64_t e = 0; e < up.size(0); ++e) out.push_back({gate.defined() ? gate[e] : Tensor(), up[e], down[e]});
  check_experts(out);
  return out;
}

ExpertWeights stack_experts(const std::vector<ExpertWeights>& experts) {
  check_experts(experts);
  std::vector<Tensor> gate, up, down;
  for (const auto& e : experts) {
    if (e.gate.defined()) gate.push_back(e.gate);
    up.push_back(e.up);
    down.push_back(e.down);
  }
  return {gate.empty() ? Tensor() : torch::stack(gate), torch::stack(up), torch::stack(down)};
}

ExpertWeights with_neurons(const ExpertWeights& expert, const std::vector<int64_t>& order) {
  check(static_cast<int64_t>(order.size()) == width_of(expert), "an order of {} neurons for an expert with {}",
        order.size(), width_of(expert));
  const auto index = torch::tensor(order, torch::kInt64).to(expert.up.device());
  return {expert.gate.defined() ? expert.gate.index_select(0, index) : Tensor(), expert.up.index_select(0, index),
          expert.down.index_select(1, index)};
}

std::vector<int64_t> alignment(const ExpertWeights& reference, const ExpertWeights& expert, bool by_down) {
  const torch::NoGradGuard frozen;
  check_experts({reference, expert});
  const auto f64 = [](const Tensor& t) { return t.to(torch::kFloat64); };
  auto profit = torch::matmul(f64(reference.up), f64(expert.up).t());
  if (reference.gate.defined()) profit.addmm_(f64(reference.gate), f64(expert.gate).t());
  if (by_down) profit.addmm_(f64(reference.down).t(), f64(expert.down));
  return best_assignment(profit);
}

ExpertWeights weighted_sum(const std::vector<const ExpertWeights*>& experts, const std::vector<double>& weights,
                           double divisor) {
  const torch::NoGradGuard frozen;
  check(!experts.empty() && experts.size() == weights.size(), "{} weights for {} experts", weights.size(),
        experts.size());
  const auto sum = [&](Tensor ExpertWeights::*part) {
    if (!((*experts[0]).*part).defined()) return Tensor();
    auto total = torch::zeros_like((*experts[0]).*part, torch::kFloat32);
    for (size_t i = 0; i < experts.size(); ++i) total.add_((*experts[i]).*part, weights[i] / divisor);
    return total;
  };
  return {sum(&ExpertWeights::gate), sum(&ExpertWeights::up), sum(&ExpertWeights::down)};
}

std::vector<std::vector<int64_t>> members_of(const Tensor& labels) {
  const auto l = labels.to(torch::kCPU, torch::kInt64).contiguous();
  check(l.dim() == 1 && l.numel() > 0, "labels are one number an expert");
  const int64_t* label = l.const_data_ptr<int64_t>();
  const int64_t most = *std::max_element(label, label + l.numel());
  check(*std::min_element(label, label + l.numel()) >= 0 && most < l.numel(),
        "labels of {} experts lie between 0 and {}", l.numel(), l.numel() - 1);
  std::vector<std::vector<int64_t>> members(static_cast<size_t>(most) + 1);
  for (int64_t e = 0; e < l.numel(); ++e) members[static_cast<size_t>(label[e])].push_back(e);
  for (size_t g = 0; g < members.size(); ++g) check(!members[g].empty(), "group {} has no members", g);
  return members;
}

void for_each_expert(int64_t count, const std::function<void(int64_t)>& body) {
  parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

}  // namespace moiety
