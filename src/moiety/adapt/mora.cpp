#include "moiety/adapt/mora.h"

#include <torch/torch.h>

#include <algorithm>
#include <limits>

#include "moiety/adapt/low_rank.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"

namespace moiety {

void MoraConfig::fields(Fields& f) {
  f("rank", rank, "ranks of the task that learns").min(1);
  f("old_ranks", old_ranks, "ranks of the tasks before it, which are frozen").min(0);
  f("top_k", top_k, "ranks of all tasks together that a token takes; at least 2").min(1);
  f("temperature", temperature, "of the softmax over the scores of those").min(1e-6);
  f("threshold", threshold, "outside of training, ranks whose score is lower do nothing; 0: off").min(0);
  f("scaling", scaling, "what new ranks add is multiplied by it").min(0);
  f("dropout", dropout, "on what the ranks read, while training").min(0).max(0.99);
  f("eps", eps, "least norm of the activations").min(1e-30);
}

MoraChoice mora_choose(const torch::Tensor& z, int64_t k, double temperature, double threshold, bool training,
                       double eps) {
  check(temperature > 0.0, "a temperature of {} is impossible: above 0", temperature);
  check(threshold >= 0.0, "a threshold of {} is impossible: 0 or above", threshold);
  check(k >= 1, "top_k is {}: at least 1 is needed", k);
  const int64_t kept = std::min(std::max<int64_t>(k, 2), z.size(-1));
  MoraChoice out;
  // The root of what is at least eps^2 has a gradient everywhere.
  out.scores = z / z.square().sum(-1, true).clamp_min(eps * eps).sqrt();
  const auto order = top_k(out.scores.detach(), kept).second;
  const auto out_of = torch::ones_like(out.scores, torch::kBool).scatter_(-1, order, false);
  out.weights =
      torch::softmax((out.scores / temperature).masked_fill(out_of, -std::numeric_limits<double>::infinity()), -1);
  if (!training && threshold > 0.0) out.weights = out.weights * (out.scores >= threshold).to(z.scalar_type());
  return out;
}

Mora::Mora(std::string site, torch::Tensor old_a, torch::Tensor old_b, torch::Tensor a, torch::Tensor b,
           const MoraConfig& config)
    : site_(std::move(site)), config_(config) {
  check(old_a.defined() == old_b.defined() && (!old_a.defined() || old_a.size(0) == old_b.size(1)),
        "A of old ranks has {} rows, B {} columns", old_a.defined() ? old_a.size(0) : 0,
        old_b.defined() ? old_b.size(1) : 0);
  if (old_a.defined()) {
    old_a_ = register_buffer("old_A", old_a.detach());
    old_b_ = register_buffer("old_B", old_b.detach());
  }
  a_ = register_parameter("lora_A", a, a.requires_grad());
  b_ = register_parameter("lora_B", b, b.requires_grad());
}

bool Mora::set_active(int64_t k) {
  const int64_t ranks = a_.size(0) + (old_a_.defined() ? old_a_.size(0) : 0), least = std::min<int64_t>(2, ranks);
  check(k >= least && k <= ranks, "{} active ranks are impossible: a token takes {} to {}", k, least, ranks);
  config_.top_k = k;
  return true;
}

void Mora::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  const auto v = dropped(x, config_.dropout, pass.training);
  const auto flat = v.reshape({-1, v.size(-1)});
  const auto a = old_a_.defined() ? torch::cat({old_a_, a_}) : a_;
  const auto b = old_b_.defined() ? torch::cat({old_b_, config_.scaling * b_}, 1) : config_.scaling * b_;
  auto z = torch::matmul(flat, a.to(flat.scalar_type()).t());
  if (z.scalar_type() != torch::kFloat64) z = z.to(torch::kFloat32);
  const auto choice = mora_choose(z, config_.top_k, config_.temperature, config_.threshold, pass.training, config_.eps);
  auto& y = outputs.at(0);
  const auto active = (choice.weights * z).to(y.scalar_type());
  y = y + torch::matmul(active, b.to(y.scalar_type()).t()).view(y.sizes());
  if (pass.trace) {
    const int64_t kept = std::min(std::max<int64_t>(config_.top_k, 2), z.size(1));
    Routing r{top_k(choice.weights, kept).second, {}, choice.scores, z};
    r.gates = choice.weights.gather(1, r.experts);
    r.experts = r.experts.masked_fill(r.gates == 0, -1);
    report_beside(pass, pass.at(site_), r, z.size(1), flat, y);
  }
}

MoraBlocks mora_consolidate(const torch::Tensor& old_a, const torch::Tensor& old_b, const torch::Tensor& a,
                            const torch::Tensor& b, double scaling, const std::string& mode) {
  check(mode == "fold" || mode == "raw", "unknown way to consolidate `{}`; known are fold and raw", mode);
  const torch::NoGradGuard frozen;
  const auto own = (mode == "fold" ? scaling * b : b).detach();
  MoraBlocks out{a.detach().clone(), own.clone()};
  if (old_a.defined() && old_a.size(0) > 0) {
    out.a = torch::cat({old_a, out.a});
    out.b = torch::cat({old_b, out.b}, 1);
  }
  return out;
}

StreamMetrics stream_metrics(const torch::Tensor& acc) {
  check(acc.dim() == 2 && acc.size(0) == acc.size(1) && acc.size(0) >= 1,
        "accuracies of a stream are a square: a row after every task, a column for every task");
  const auto a = acc.to(torch::kFloat64);
  const int64_t tasks = a.size(0);
  StreamMetrics out;
  for (int64_t j = 1; j < tasks; ++j) {
    out.transfer_per_task.push_back(a.narrow(0, 0, j).select(1, j).mean().item<double>());
    out.transfer += out.transfer_per_task.back() / static_cast<double>(tasks - 1);
  }
  out.average = a.mean().item<double>();
  out.last = a[tasks - 1].mean().item<double>();
  out.bwt = (a[tasks - 1] - a.diagonal()).clamp_max(0.0).mean().item<double>();
  return out;
}

namespace {

const RegisterMethod registered(
    {.slug = "mora",
     .kind = "part",
     .title = "MoRA (MoRAM)",
     .summary = "rank-1 experts that choose themselves, a block of them for every task of a stream",
     .paper = {"Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning",
               "Lu et al.", 2025, "2506.21035"},
     .sites = {"linear"},
     .config = describe<MoraConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<MoraConfig>(settings, "mora");
           const LinearTarget& t = site.targets.at(0);
           torch::Tensor old_a, old_b;
           if (c.old_ranks > 0) {
             const Init none = [](torch::Tensor) {
               fail("`old_ranks` says that tasks have been learned before, but the checkpoint holds none of them");
             };
             old_a = site.own.get("old_A", {c.old_ranks, t.in}, none);
             old_b = site.own.get("old_B", {t.out, c.old_ranks}, none);
           }
           return std::make_shared<Mora>(t.name, old_a, old_b, site.own.get("lora_A", {c.rank, t.in}, uniform_init()),
                                         site.own.get("lora_B", {t.out, c.rank}, constant_init(0.0)), c);
         }}});

}  // namespace
}  // namespace moiety
