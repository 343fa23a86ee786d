#include "moiety/moe/losses.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/moe/pooling.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

// Rows of real tokens.
torch::Tensor real_rows(const torch::Tensor& t, const torch::Tensor& real) {
  return real.defined() ? t.index_select(0, real.nonzero().squeeze(1)) : t;
}

}  // namespace

TokenGroups token_groups(const Pass& pass, int64_t tokens, bool per_sequence) {
  TokenGroups groups;
  if (pass.mask.defined()) {
    groups.real = pass.mask.reshape({-1}).to(torch::kBool);
    check(groups.real.numel() == tokens, "a mask of {} tokens does not fit {} tokens", groups.real.numel(), tokens);
  }
  if (!per_sequence) return groups;
  const int64_t rows = std::max<int64_t>(1, pass.batch), time = tokens / rows;
  check(rows * time == tokens, "{} tokens are not {} rows of equal length", tokens, rows);
  if (pass.segments.defined()) {
    const auto segments = pass.segments.to(torch::kInt64);
    const int64_t most = segments.max().item<int64_t>() + 1;
    const auto key = torch::arange(rows, segments.options()).unsqueeze(1) * most + segments;
    const auto [unique, inverse, counts] = at::_unique2(key.reshape({-1}), true, true);
    groups.sequence = inverse;
    groups.sequences = unique.numel();
    // Segment 0 is padding where a row is packed.
    const auto packed = pass.segments.reshape({-1}) > 0;
    groups.real = groups.real.defined() ? groups.real & packed : packed;
  } else if (rows > 1) {
    const auto device = pass.mask.defined() ? pass.mask.device() : torch::Device(torch::kCPU);
    groups.sequence = torch::arange(rows, torch::TensorOptions(torch::kInt64).device(device)).repeat_interleave(time);
    groups.sequences = rows;
  }
  return groups;
}

Load load_of(const torch::Tensor& experts, const torch::Tensor& scores, const TokenGroups& groups) {
  const int64_t n = scores.size(0), count = scores.size(1), slots = experts.size(1);
  check(experts.size(0) == n, "choices of {} tokens do not belong to scores of {}", experts.size(0), n);
  const auto sequence =
      groups.sequence.defined() ? groups.sequence.to(scores.device()) : torch::zeros({n}, experts.options());
  const auto real = groups.real.defined() ? groups.real.to(scores.device(), scores.scalar_type())
                                          : torch::ones({n}, scores.options().requires_grad(false));
  Load load;
  {
    torch::NoGradGuard no_grad;
    const auto used = (experts >= 0).to(real.scalar_type()) * real.unsqueeze(1);
    const auto at = (sequence.unsqueeze(1) * count + experts.clamp_min(0)).reshape({-1});
    load.counts = torch::zeros({groups.sequences * count}, real.options())
                      .index_add_(0, at, used.expand({n, slots}).reshape({-1}))
                      .view({groups.sequences, count});
    load.tokens = torch::zeros({groups.sequences}, real.options()).index_add_(0, sequence, real);
  }
  const auto kept = groups.real.defined() ? scores * real.unsqueeze(1) : scores;
  load.probability = torch::zeros({groups.sequences, count}, kept.options()).index_add(0, sequence, kept) /
                     load.tokens.clamp_min(1.0).unsqueeze(1);
  return load;
}

torch::Tensor load_fraction(const Load& load, double slots) {
  return load.counts * (static_cast<double>(load.counts.size(1)) / slots) / load.tokens.clamp_min(1.0).unsqueeze(1);
}

namespace {

torch::Tensor mean_of_groups(const torch::Tensor& value, const torch::Tensor& tokens) {
  const auto has = (tokens > 0).to(value.scalar_type());
  return (value * has).sum() / has.sum().clamp_min(1.0);
}

}  // namespace

torch::Tensor balance_loss(const Load& load, double slots) {
  return mean_of_groups((load_fraction(load, slots) * load.probability).sum(1), load.tokens);
}

namespace {

struct Devices {
  torch::Tensor of_expert, members;  // [E] int64, [D]
  torch::Tensor sum(const torch::Tensor& t) const {
    return torch::zeros({t.size(0), members.numel()}, t.options()).index_add(1, of_expert, t);
  }
};

Devices devices_of(const Load& load, const torch::Tensor& device_of_expert) {
  const int64_t experts = load.counts.size(1);
  check(device_of_expert.dim() == 1 && device_of_expert.size(0) == experts,
        "the list of devices names {} experts, there are {}", device_of_expert.numel(), experts);
  Devices d;
  d.of_expert = device_of_expert.to(torch::kInt64).to(load.counts.device());
  check(d.of_expert.min().item<int64_t>() >= 0, "a device number is negative");
  d.members = torch::bincount(d.of_expert).to(load.counts.scalar_type());
  check((d.members > 0).all().item<bool>(), "one of {} devices has no expert", d.members.numel());
  return d;
}

}  // namespace

torch::Tensor device_load(const Load& load, double slots, const torch::Tensor& device_of_expert) {
  const Devices d = devices_of(load, device_of_expert);
  return d.sum(load_fraction(load, slots)) / d.members;
}

torch::Tensor device_balance_loss(const Load& load, double slots, const torch::Tensor& device_of_expert) {
  const Devices d = devices_of(load, device_of_expert);
  return mean_of_groups((d.sum(load_fraction(load, slots)) / d.members * d.sum(load.probability)).sum(1), load.tokens);
}

torch::Tensor z_loss(const torch::Tensor& logits, const TokenGroups& groups) {
  const auto rows = real_rows(logits, groups.real);
  return rows.size(0) == 0 ? rows.sum() : rows.logsumexp(-1).square().mean();
}

torch::Tensor entropy_loss(const torch::Tensor& logits, const TokenGroups& groups) {
  const auto rows = real_rows(logits, groups.real);
  if (rows.size(0) == 0) return rows.sum();
  // p * log p with both from log_softmax: where p is 0 the product is 0 and so is its gradient, also for a logit of
  // -inf.
  const auto log_p = torch::log_softmax(rows, -1).clamp_min(-1e4);
  return -(log_p.exp() * log_p).sum(-1).mean();
}

torch::Tensor pooled_balance_loss(const torch::Tensor& experts, const torch::Tensor& scores) {
  const int64_t rows = scores.size(0), count = scores.size(1);
  if (rows == 0) return scores.sum();
  torch::Tensor chosen;
  {
    torch::NoGradGuard no_grad;
    const auto used = (experts >= 0).to(scores.scalar_type());
    chosen =
        torch::zeros({count}, used.options()).index_add_(0, experts.clamp_min(0).reshape({-1}), used.reshape({-1})) /
        static_cast<double>(rows);
  }
  return static_cast<double>(count) * (chosen * scores.mean(0)).sum();
}

RoutingLoss::RoutingLoss(std::string name, double coef) : name_(std::move(name)), coef_(coef) {
  check(coef >= 0.0 && std::isfinite(coef), "the weight {} of the {} loss must be a number of at least 0", coef, name_);
}

void RoutingLoss::add(const Routing& r, const Site& site, Pass& pass) {
  if (coef_ != 0.0) value(r, site, pass);
}

ExpertBalance::ExpertBalance(std::string name, double coef, bool per_sequence, Slots slots)
    : RoutingLoss(std::move(name), coef), per_sequence_(per_sequence), slots_(slots) {}

void ExpertBalance::value(const Routing& r, const Site& site, Pass& pass) {
  const auto load = load_of(r.experts, r.scores, token_groups(pass, r.scores.size(0), per_sequence_));
  const double slots = slots_ == Slots::per_choice ? static_cast<double>(r.experts.size(1)) : 1.0;
  // f of balance_loss carries the factor E in both cases.
  pass.add_loss(name_, coef_ * balance_loss(load, slots));
}

DeviceBalance::DeviceBalance(std::string name, double coef, torch::Tensor device_of_expert)
    : RoutingLoss(std::move(name), coef), device_of_expert_(std::move(device_of_expert)) {}

void DeviceBalance::value(const Routing& r, const Site& site, Pass& pass) {
  const auto load = load_of(r.experts, r.scores, token_groups(pass, r.scores.size(0), false));
  pass.add_loss(name_, coef_ * device_balance_loss(load, static_cast<double>(r.experts.size(1)), device_of_expert_));
}

ZLoss::ZLoss(double coef, std::string name) : RoutingLoss(std::move(name), coef) {}

void ZLoss::value(const Routing& r, const Site& site, Pass& pass) {
  pass.add_loss(name_, coef_ * z_loss(r.logits, token_groups(pass, r.logits.size(0), false)));
}

EntropyLoss::EntropyLoss(std::string name, double coef) : RoutingLoss(std::move(name), coef) {}

void EntropyLoss::value(const Routing& r, const Site& site, Pass& pass) {
  pass.add_loss(name_, coef_ * entropy_loss(r.logits, token_groups(pass, r.logits.size(0), false)));
}

PooledBalance::PooledBalance(std::string name, double coef) : RoutingLoss(std::move(name), coef) {}

void PooledBalance::value(const Routing& r, const Site& site, Pass& pass) {
  const auto groups = token_groups(pass, r.scores.size(0), false);
  const std::string key = fmt::format("{}.{}.{}", name_, r.scores.size(1), r.experts.size(1));
  pool(pass, key + ".experts", real_rows(r.experts, groups.real));
  pool(pass, key + ".scores", real_rows(r.scores, groups.real));
  pass.at_end(key, [key, name = name_, coef = coef_](Pass& p) {
    p.add_loss(name, coef * pooled_balance_loss(pooled(p, key + ".experts"), pooled(p, key + ".scores")));
  });
}

ByScores::ByScores(std::shared_ptr<RoutingLoss> loss)
    : RoutingLoss(loss->name(), loss->coef()), loss_(std::move(loss)) {}

void ByScores::value(const Routing& r, const Site& site, Pass& pass) {
  Routing own = r;
  own.scores = r.scores / r.scores.sum(-1, true).clamp_min(1e-20);
  own.experts = top_k(r.scores.detach(), r.experts.size(1)).second;
  loss_->add(own, site, pass);
}

RoutingLosses losses_of(const BalanceRule& rule, int64_t experts, bool by_scores) {
  RoutingLosses out;
  std::shared_ptr<RoutingLoss> balance;
  const std::string name = "balance";
  if (rule.kind == "switch" || rule.kind == "sequence") {
    balance = std::make_shared<ExpertBalance>(name, rule.coef, rule.kind == "sequence");
  } else if (rule.kind == "pooled") {
    balance = std::make_shared<PooledBalance>(name, rule.coef);
  } else if (rule.kind == "device") {
    check(rule.devices >= 1 && experts % rule.devices == 0, "{} experts cannot be shared evenly by {} devices", experts,
          rule.devices);
    balance = std::make_shared<DeviceBalance>(
        name, rule.coef, torch::arange(experts, torch::kInt64).div(experts / rule.devices, "floor"));
  } else {
    check(rule.kind == "none", "unknown balance `{}`; known are none, switch, sequence, pooled and device", rule.kind);
  }
  if (balance && rule.coef > 0.0) out.push_back(by_scores ? std::make_shared<ByScores>(balance) : balance);
  if (rule.z_coef > 0.0) out.push_back(std::make_shared<ZLoss>(rule.z_coef, "router_z"));
  return out;
}

void update_choice_bias(torch::Tensor bias, const torch::Tensor& counts, double rate) {
  torch::NoGradGuard no_grad;
  const auto c = counts.to(bias.scalar_type());
  bias.add_(torch::sign(c.mean() - c), rate);
}

}  // namespace moiety
