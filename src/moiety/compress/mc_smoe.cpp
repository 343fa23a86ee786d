#include "moiety/compress/mc_smoe.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/compress/expert_statistics.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kNoLabel = -100;

/// Indices by falling value, ties by the lower index.
std::vector<int64_t> falling(const double* values, int64_t n) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  return order;
}

}  // namespace

AlignedExperts align_experts(const std::vector<ExpertWeights>& experts, int64_t reference, bool include_down) {
  const torch::NoGradGuard frozen;
  check_experts(experts);
  const auto count = static_cast<int64_t>(experts.size());
  check(reference >= 0 && reference < count, "expert {} cannot be what {} experts are aligned to", reference, count);
  AlignedExperts out{experts, torch::arange(width_of(experts[0]), torch::kInt64).repeat({count, 1})};
  for_each_expert(count, [&](int64_t e) {
    if (e == reference) return;
    const auto i = static_cast<size_t>(e);
    const auto order = alignment(experts[static_cast<size_t>(reference)], experts[i], include_down);
    std::copy(order.begin(), order.end(), out.order.data_ptr<int64_t>() + e * out.order.size(1));
    out.experts[i] = with_neurons(experts[i], order);
  });
  return out;
}

namespace {

/// How many groups every layer gets.
std::vector<int64_t> group_counts(const Tensor& usage, int64_t groups, const std::vector<bool>& merged) {
  const int64_t layers = usage.size(0), experts = usage.size(1);
  auto counted = usage.clone();
  int64_t wanted = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const bool here = merged[static_cast<size_t>(l)];
    wanted += here ? groups : experts;
    if (here)
      counted[l][falling(usage.const_data_ptr<double>() + l * experts, experts)[0]] = 1.0;
    else
      counted[l].fill_(1.0);
  }
  const auto all = std::get<0>(counted.reshape({-1}).sort(/*dim=*/0, /*descending=*/true));
  const double threshold = all[groups == experts ? wanted - 1 : wanted].item<double>();
  check(threshold < 1.0,
        "too many groups: {} on average are {} in all, so that experts that must stay reach the threshold", groups,
        wanted);
  const auto above = counted.gt(threshold).sum(1).contiguous();
  return {above.const_data_ptr<int64_t>(), above.const_data_ptr<int64_t>() + layers};
}

/// The groups of one layer: its leaders, then every other expert in order of falling use with the leader it resembles
/// most.
void group_layer(const double* usage, const double* similarity, int64_t experts, int64_t groups, int64_t capacity,
                 int64_t layer, int64_t* labels, bool* dominant) {
  const auto order = falling(usage, experts);
  std::vector<int64_t> members(static_cast<size_t>(groups), 1);
  for (int64_t g = 0; g < groups; ++g) {
    labels[order[static_cast<size_t>(g)]] = g;
    dominant[order[static_cast<size_t>(g)]] = true;
  }
  for (int64_t i = groups; i < experts; ++i) {
    const int64_t e = order[static_cast<size_t>(i)];
    int64_t best = -1;
    const auto like = [&](int64_t g) { return similarity[e * experts + order[static_cast<size_t>(g)]]; };
    for (int64_t g = 0; g < groups; ++g) {
      if (capacity > 0 && members[static_cast<size_t>(g)] >= capacity) continue;
      if (best < 0 || like(g) > like(best)) best = g;
    }
    check(best >= 0, "layer {}: {} groups of at most {} experts do not hold {}", layer, groups, capacity, experts);
    labels[e] = best;
    ++members[static_cast<size_t>(best)];
  }
}

}  // namespace

ExpertGroups group_experts(const Tensor& usage, const Tensor& similarity, int64_t groups,
                           const std::vector<int64_t>& merged, int64_t capacity) {
  check(usage.dim() == 2 && usage.numel() > 0, "use is one number a layer and expert");
  const int64_t layers = usage.size(0), experts = usage.size(1);
  check(similarity.dim() == 3 && similarity.size(0) == layers && similarity.size(1) == experts &&
            similarity.size(2) == experts,
        "the similarity of {} layers of {} experts is [{}, {}, {}]", layers, experts, layers, experts, experts);
  check(groups >= 1 && groups <= experts, "{} groups of {} experts: 1 to {} are possible", groups, experts, experts);
  check(capacity >= 0, "a group of at most {} experts holds none", capacity);
  check(!merged.empty(), "no layer to merge experts in");
  std::vector<bool> here(static_cast<size_t>(layers));
  for (const int64_t l : merged) {
    check(l >= 0 && l < layers, "there is no layer {} with experts to merge: there are {}", l, layers);
    here[static_cast<size_t>(l)] = true;
  }
  const auto u = usage.to(torch::kCPU, torch::kFloat64).contiguous();
  const auto s = similarity.to(torch::kCPU, torch::kFloat64).contiguous();
  check(torch::isfinite(u).all().item<bool>() && torch::isfinite(s).all().item<bool>(),
        "a use or similarity of experts is not a finite number");
  const auto counts = group_counts(u, groups, here);
  ExpertGroups out{torch::empty({layers, experts}, torch::kInt64), torch::tensor(counts, torch::kInt64),
                   torch::zeros({layers, experts}, torch::kBool)};
  for (int64_t l = 0; l < layers; ++l)
    group_layer(u.const_data_ptr<double>() + l * experts, s.const_data_ptr<double>() + l * experts * experts, experts,
                counts[static_cast<size_t>(l)], here[static_cast<size_t>(l)] ? capacity : 0, l,
                out.labels.data_ptr<int64_t>() + l * experts, out.dominant.data_ptr<bool>() + l * experts);
  return out;
}

ExpertWeights merge_group(const std::vector<ExpertWeights>& experts, const std::vector<int64_t>& members,
                          const Tensor& usage, double eps) {
  check(usage.dim() == 1 && usage.size(0) == static_cast<int64_t>(experts.size()), "{} uses for {} experts",
        usage.numel(), experts.size());
  const auto u = usage.to(torch::kCPU, torch::kFloat64).contiguous();
  std::vector<const ExpertWeights*> parts;
  std::vector<double> weights;
  for (const int64_t e : members) {
    parts.push_back(&experts.at(static_cast<size_t>(e)));
    weights.push_back(u.const_data_ptr<double>()[e]);
  }
  const double sum = std::accumulate(weights.begin(), weights.end(), eps);
  return weighted_sum(parts, weights, sum > 0.0 ? sum : 1.0);
}

std::vector<ExpertWeights> merge_groups(const std::vector<ExpertWeights>& experts, const Tensor& labels,
                                        const Tensor& usage, double eps) {
  check_experts(experts);
  check(labels.dim() == 1 && labels.size(0) == static_cast<int64_t>(experts.size()), "{} labels for {} experts",
        labels.numel(), experts.size());
  std::vector<ExpertWeights> out;
  const auto groups = members_of(labels);
  for (const auto& members : groups) out.push_back(merge_group(experts, members, usage, eps));
  return out;
}

LowRankSparse split_low_rank(const Tensor& weight, int64_t rank, const std::string& name) {
  const torch::NoGradGuard frozen;
  check(weight.dim() == 2, "{} has {} dimensions, not 2", name, weight.dim());
  const int64_t most = std::min(weight.size(0), weight.size(1));
  check(rank >= 1 && rank < most, "a rank of {} for {}, which is [{}, {}]: 1 to {} are possible", rank, name,
        weight.size(0), weight.size(1), most - 1);
  const auto w = weight.to(torch::kFloat32);
  check(torch::isfinite(w).all().item<bool>(), "{} holds numbers that are not finite", name);
  const auto [u, s, v] = torch::linalg_svd(w, /*full_matrices=*/false);
  const auto root = s.narrow(0, 0, rank).sqrt();
  LowRankSparse out{
      (u.narrow(1, 0, rank) * root).contiguous(), (root.unsqueeze(1) * v.narrow(0, 0, rank)).contiguous(), {}};
  out.sparse = w - torch::matmul(out.left, out.right);
  return out;
}

RowSparse compact_rows(const Tensor& sparse) {
  check(sparse.dim() == 2, "rows are looked for in a matrix, not in {} dimensions", sparse.dim());
  const torch::NoGradGuard frozen;
  const auto index = sparse.ne(0).any(1).nonzero().squeeze(1);
  return {sparse.index_select(0, index), index, sparse.size(0)};
}

Tensor dense_rows(const RowSparse& compact) {
  return torch::zeros({compact.out, compact.rows.size(1)}, compact.rows.options())
      .index_copy(0, compact.index, compact.rows);
}

Tensor multiply(const RowSparse& compact, const Tensor& x) {
  const auto y = torch::matmul(x, compact.rows.t());
  auto shape = x.sizes().vec();
  shape.back() = compact.out;
  return torch::zeros(shape, y.options()).index_copy(-1, compact.index, y);
}

std::string RowPruningConfig::problem() const {
  if (beta2 != 1.0) return fmt::format("beta2 is {}; only 1, no term for uncertainty, is known", beta2);
  if (!(final_threshold > 0.0)) return "final_threshold has to be above 0: something has to stay";
  if (final_threshold > initial_threshold)
    return fmt::format("final_threshold {} is above initial_threshold {}: rows only go", final_threshold,
                       initial_threshold);
  const int64_t warm = (initial_warmup + final_warmup) * warmup_steps;
  if (total_steps <= warm)
    return fmt::format("schedule longer than training: the two warm-ups take {} of {} steps", warm, total_steps);
  return {};
}

double remaining_share(const RowPruningConfig& c, int64_t t) {
  const int64_t first = c.initial_warmup * c.warmup_steps, last = c.total_steps - c.final_warmup * c.warmup_steps;
  if (t <= first) return c.initial_threshold;
  if (t > last) return c.final_threshold;
  const double left = 1.0 - static_cast<double>(t - first) / static_cast<double>(last - first);
  return c.final_threshold + (c.initial_threshold - c.final_threshold) * std::pow(left, 3.0);
}

RowPruning::RowPruning(std::vector<Tensor> matrices, RowPruningConfig config, int64_t step,
                       const std::vector<Tensor>& held)
    : matrices_(std::move(matrices)), config_(parse<RowPruningConfig>(dump(config), "row pruning")), step_(step) {
  check(!matrices_.empty(), "there are no matrices to prune rows of");
  check(held.empty() || held.size() == 2 * matrices_.size(), "{} tensors are not the state of {} matrices", held.size(),
        matrices_.size());
  for (size_t i = 0; i < matrices_.size(); ++i) {
    const Tensor& m = matrices_[i];
    check(m.dim() == 2 && m.numel() > 0, "rows are pruned in matrices, not in {} dimensions", m.dim());
    average_.push_back(held.empty() ? torch::zeros_like(m.detach(), torch::kFloat32) : held[2 * i]);
    latest_.push_back(held.empty() ? torch::zeros_like(average_.back()) : held[2 * i + 1]);
    check(average_[i].sizes() == m.sizes() && latest_[i].sizes() == m.sizes(),
          "the state of matrix {} has another shape", i);
  }
}

RowPruning::Step RowPruning::after_step() {
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < matrices_.size(); ++i) {
    check(matrices_[i].grad().defined(), "matrix {} has no gradient: rows are pruned before gradients are zeroed", i);
    gradients.push_back(matrices_[i].grad());
  }
  return after_step(gradients);
}

RowPruning::Step RowPruning::after_step(const std::vector<Tensor>& gradients) {
  const torch::NoGradGuard frozen;
  check(gradients.size() == matrices_.size(), "{} gradients for {} matrices", gradients.size(), matrices_.size());
  for (size_t i = 0; i < matrices_.size(); ++i) {
    check(gradients[i].sizes() == matrices_[i].sizes(), "the gradient of matrix {} has another shape", i);
    // What the last step added joins now: the average lags.
    average_[i].mul_(config_.beta1).add_(latest_[i], 1.0 - config_.beta1);
    latest_[i].copy_((matrices_[i] * gradients[i]).abs());
  }
  const int64_t t = step_++;
  Step out{remaining_share(config_, t), -1.0};
  const bool last = t > config_.total_steps - config_.final_warmup * config_.warmup_steps;
  if (last || (t > config_.initial_warmup * config_.warmup_steps && t % config_.delta_t == 0))
    out.mask_threshold = mask(out.remaining);
  return out;
}

// The threshold is the importance of the int(M (1 - remaining))-th least important of all M entries, which have that of
// their rows.
double RowPruning::mask(double remaining) {
  std::vector<Tensor> scores;
  std::vector<std::pair<float, int64_t>> rows;  // importance, entries
  int64_t entries = 0;
  for (size_t i = 0; i < matrices_.size(); ++i) {
    const auto score = average_[i].mean(1).to(torch::kCPU).contiguous();
    for (int64_t r = 0; r < score.numel(); ++r)
      rows.emplace_back(score.const_data_ptr<float>()[r], matrices_[i].size(1));
    entries += matrices_[i].numel();
    scores.push_back(score);
  }
  auto left = static_cast<int64_t>(static_cast<double>(entries) * (1.0 - remaining));
  if (left < 1) return -1.0;
  std::sort(rows.begin(), rows.end());
  float threshold = rows.back().first;
  for (const auto& [score, width] : rows) {
    left -= width;
    if (left > 0) continue;
    threshold = score;
    break;
  }
  for (size_t i = 0; i < matrices_.size(); ++i)
    matrices_[i].masked_fill_((scores[i] < threshold).to(matrices_[i].device()).unsqueeze(1), 0.0);
  return threshold;
}

std::vector<Tensor> RowPruning::state() const {
  std::vector<Tensor> out;
  for (size_t i = 0; i < matrices_.size(); ++i) {
    out.push_back(average_[i]);
    out.push_back(latest_[i]);
  }
  return out;
}

void RowPruning::restore(int64_t step, const std::vector<Tensor>& state) {
  check(step >= 0 && state.size() == 2 * matrices_.size(), "{} tensors are not the state of {} matrices", state.size(),
        matrices_.size());
  for (size_t i = 0; i < matrices_.size(); ++i) {
    check(state[2 * i].sizes() == matrices_[i].sizes() && state[2 * i + 1].sizes() == matrices_[i].sizes(),
          "the state of matrix {} has another shape", i);
    average_[i].copy_(state[2 * i]);
    latest_[i].copy_(state[2 * i + 1]);
  }
  step_ = step;
}

Tensor teacher_divergence(const Tensor& student, const Tensor& teacher, const Tensor& labels, double temperature) {
  check(student.dim() == 3 && teacher.dim() == 3 && student.size(2) == teacher.size(2),
        "the teacher has a vocabulary of {}, the student of {}", teacher.size(-1), student.size(-1));
  check(student.sizes() == teacher.sizes() && labels.sizes() == student.sizes().slice(0, 2),
        "teacher, student and labels are of different positions");
  check(temperature > 0.0, "a temperature of {}: it has to be above 0", temperature);
  const auto there = labels.reshape({-1}).ne(kNoLabel).nonzero().squeeze(1);
  check(there.numel() > 0, "no position has a label");
  const auto picked = [&](const Tensor& logits) {
    const auto rows = logits.reshape({-1, logits.size(2)}).index_select(0, there);
    return torch::log_softmax((rows.scalar_type() == torch::kFloat64 ? rows : rows.to(torch::kFloat32)) / temperature,
                              -1);
  };
  const auto target = picked(teacher.detach());
  return (target.exp() * (target - picked(student))).sum() / static_cast<double>(student.size(0));
}

Tensor recovery_loss(const Tensor& student, const Tensor& teacher, const Tensor& labels, const RecoveryConfig& config) {
  const auto divergence = teacher_divergence(student, teacher, labels, config.temperature);
  const auto flat = student.reshape({-1, student.size(2)});
  const auto task = at::cross_entropy_loss(flat.scalar_type() == torch::kFloat64 ? flat : flat.to(torch::kFloat32),
                                           labels.reshape({-1}), {}, at::Reduction::Mean, kNoLabel);
  return config.task * task + config.distillation * divergence;
}

namespace {

const RegisterMethod registered({
    .slug = "mc-smoe",
    .kind = "transform",
    .title = "MC-SMoE",
    .summary = "experts that the router treats alike are aligned and averaged by use into the most used ones",
    .paper = {"Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", "Li et al.", 2023,
              "2310.01334"},
    .sites = {"ffn"},
    .config = describe<MSmoeConfig>,
    .make = {},
});
const RegisterMethod registered_rule({
    .slug = "mc-smoe",
    .kind = "rule",
    .title = "MC-SMoE's row pruning",
    .summary = "rows of sparse residuals go by importance over all matrices, step by step, while the model trains",
    .paper = {"Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", "Li et al.", 2023,
              "2310.01334"},
    .sites = {"linear"},
    .config = describe<RowPruningConfig>,
    .make = {},
});

}  // namespace
}  // namespace moiety
