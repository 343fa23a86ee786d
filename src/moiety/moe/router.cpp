#include "moiety/moe/router.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/dots.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// -inf outside the best groups.
torch::Tensor inside_groups(const torch::Tensor& scores, const TopKRouterOptions& o) {
  const int64_t n = scores.size(0), experts = scores.size(1);
  const auto grouped = scores.detach().view({n, o.groups, experts / o.groups});
  const auto best = o.group_by_top2 ? top_k(grouped, 2).first.sum(-1) : grouped.amax(-1);
  const auto keep = torch::zeros_like(best, torch::kBool).scatter_(1, top_k(best, o.top_groups).second, true);
  return grouped.masked_fill(~keep.unsqueeze(-1), -kInfinity).reshape({n, experts});
}

// Forward: multiplier * share; backward: the gradient of the softmax over the unmasked logits.
class HeunMultiplier : public torch::autograd::Function<HeunMultiplier> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& scores,
                               const torch::Tensor& multiplier, const torch::Tensor& chosen, const torch::Tensor& gates,
                               const torch::Tensor& share) {
    context->save_for_backward({multiplier, chosen, gates});
    return multiplier * share;
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const auto g = grads[0] * saved[0];
    return {(-saved[2] * g).scatter_add(-1, saved[1], g), torch::Tensor(), torch::Tensor(), torch::Tensor(),
            torch::Tensor()};
  }
};

}  // namespace

bool Router::has_rule() const {
  if (of_family) return false;
  return std::any_of(losses.begin(), losses.end(), [](const auto& loss) { return loss->coef() > 0.0; });
}

void Router::set_balance(const BalanceRule& rule) {
  losses = losses_of(rule, experts(), balance_by_scores());
}

void Router::check_active(int64_t k) const {
  check(k >= 1 && k <= experts(), "{} active experts are impossible: there are {} to choose from", k, experts());
}

void set_active_experts(torch::nn::Module& model, int64_t k) {
  // Routers of adapters are asked only where the model has no others.
  std::vector<Router*> own, beside;
  std::vector<Beside*> parts;
  for (const auto& module : model.named_modules()) {
    if (auto* router = dynamic_cast<Router*>(module.value().get()))
      (module.key().find(".adapter") == std::string::npos ? own : beside).push_back(router);
    else if (auto* part = dynamic_cast<Beside*>(module.value().get()))
      parts.push_back(part);
  }
  for (Router* router : own.empty() ? beside : own) router->set_active(k);
  bool any = !own.empty() || !beside.empty();
  if (own.empty())
    for (Beside* part : parts) any = part->set_active(k) || any;
  check(any, "the model has no mixture of experts, so the number of active experts cannot be chosen");
}

void Router::edit_logits(torch::Tensor& logits, const Site& site, Pass& pass) {
  for (const auto& edit : pass.edits) edit->logits(site, pass, logits);
}

void Router::edit_scores(torch::Tensor& scores, const Site& site, Pass& pass) {
  for (const auto& edit : pass.edits) edit->distribution(site, pass, scores);
}

Routing Router::finish(Routing routing, const Site& site, Pass& pass) {
  for (const auto& edit : pass.edits) edit->choice(site, pass, routing);
  if (pass.training)
    for (const auto& loss : losses) loss->add(routing, site, pass);
  return routing;
}

TopKRouter::TopKRouter(Linear p, TopKRouterOptions o, torch::Tensor bias) : options(o) {
  projection = register_module("projection", std::move(p));
  if (bias.defined()) choice_bias = register_buffer("choice_bias", bias.to(torch::kFloat32));
  check(o.top_k >= 1 && o.top_k <= experts(), "a router of {} experts cannot choose {}", experts(), o.top_k);
  check(o.groups <= 1 || (experts() % o.groups == 0 && o.top_groups >= 1 && o.top_groups <= o.groups),
        "{} experts cannot be routed in the best {} of {} groups", experts(), o.top_groups, o.groups);
}

void TopKRouter::choose_row(const float* logits, float* scores, int64_t* chosen, float* gates) const {
  const int64_t n = experts(), k = options.top_k;
  if (options.scoring == Scoring::sigmoid) {
    for (int64_t e = 0; e < n; ++e) scores[e] = 1.f / (1.f + std::exp(-logits[e]));
  } else {
    const float most = *std::max_element(logits, logits + n);
    float sum = 0.f;
    for (int64_t e = 0; e < n; ++e) sum += scores[e] = std::exp(logits[e] - most);
    for (int64_t e = 0; e < n; ++e) scores[e] /= sum;
  }
  if (choice_bias.defined()) {
    static thread_local std::vector<float> by;
    by.resize(static_cast<size_t>(n));
    const float* bias = choice_bias.const_data_ptr<float>();
    for (int64_t e = 0; e < n; ++e) by[static_cast<size_t>(e)] = scores[e] + bias[e];
    largest(by.data(), n, k, chosen);
  } else {
    largest(scores, n, k, chosen);
  }
  float sum = 0.f, scale = static_cast<float>(options.scale);
  for (int64_t i = 0; i < k; ++i) sum += gates[i] = scores[chosen[i]];
  if (options.scoring == Scoring::softmax_kept || options.normalize) {
    sum += static_cast<float>(options.normalize_eps);
    if (options.normalize_min > 0.0) sum = std::max(sum, static_cast<float>(options.normalize_min));
    scale /= sum;
  }
  for (int64_t i = 0; i < k; ++i) gates[i] *= scale;
}

void TopKRouter::choose(Routing& r) const {
  auto by = r.scores;
  if (choice_bias.defined()) by = by + choice_bias;
  if (options.groups > 1) by = inside_groups(by, options);
  r.experts = top_k(by, options.top_k).second;
  r.gates = r.scores.gather(1, r.experts);
  if (options.scoring == Scoring::softmax_kept || options.normalize) {
    auto sum = r.gates.sum(-1, true) + options.normalize_eps;
    if (options.normalize_min > 0.0) sum = sum.clamp_min(options.normalize_min);
    r.gates = r.gates / sum;
  }
  if (options.scale != 1.0) r.gates = r.gates * options.scale;
}

Routing TopKRouter::by_rows(torch::Tensor logits) const {
  const int64_t rows = logits.size(0), n = logits.size(1), k = options.top_k;
  Routing r;
  r.logits = logits.contiguous();
  r.scores = torch::empty_like(r.logits);
  r.experts = torch::empty({rows, k}, torch::kInt64);
  r.gates = torch::empty({rows, k}, r.logits.options());
  for (int64_t i = 0; i < rows; ++i)
    choose_row(r.logits.const_data_ptr<float>() + i * n, r.scores.data_ptr<float>() + i * n,
               r.experts.data_ptr<int64_t>() + i * k, r.gates.data_ptr<float>() + i * k);
  return r;
}

Routing TopKRouter::decide(const torch::Tensor& logits) const {
  if (chooses_by_rows() && logits.is_cpu() && logits.scalar_type() == torch::kFloat32) return by_rows(logits);
  Routing r;
  r.logits = logits;
  r.scores = options.scoring == Scoring::sigmoid ? torch::sigmoid(logits) : torch::softmax(logits, -1);
  choose(r);
  return r;
}

Routing TopKRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = multiply_narrow(projection, x.to(torch::kFloat32));
  if (!pass.training && pass.edits.empty() && chooses_by_rows() && x.size(0) <= 64 && r.logits.is_cpu() &&
      may_shorten({r.logits, choice_bias}))
    return by_rows(r.logits);
  edit_logits(r.logits, site, pass);
  r.scores = options.scoring == Scoring::sigmoid ? torch::sigmoid(r.logits) : torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  choose(r);
  r = finish(std::move(r), site, pass);
  if (bias_rate_ > 0.0 && pass.training && !pass.recomputing) {
    const torch::NoGradGuard frozen;
    load_ += load_of(r.experts, r.scores, token_groups(pass, r.scores.size(0), false)).counts[0].to(load_.device());
  }
  return r;
}

void TopKRouter::row_logits(const float* x, int64_t first, int64_t last, float* logits) const {
  const auto& w = projection->weight;
  rows_times(w.const_data_ptr<float>() + first * w.size(1), last - first, w.size(1), x, logits + first);
  if (!projection->bias.defined()) return;
  const float* bias = projection->bias.const_data_ptr<float>();
  for (int64_t e = first; e < last; ++e) logits[e] += bias[e];
}

void TopKRouter::set_active(int64_t k) {
  check_active(k);
  if (options.groups > 1) {
    const int64_t most = experts() / options.groups * options.top_groups;
    check(k <= most, "{} active experts are impossible: a token chooses among {} of {}, those of its best {} groups", k,
          most, experts(), options.top_groups);
  }
  options.top_k = k;
}

void TopKRouter::set_bias_rate(double rate) {
  check(choice_bias.defined(), "a router without a bias on its choice cannot be balanced by one");
  check(rate > 0.0 && std::isfinite(rate), "a rate of {} for the bias of a router is not above 0", rate);
  bias_rate_ = rate;
  load_ = torch::zeros_like(choice_bias);
}

void TopKRouter::before_step(int64_t step, int64_t steps) {
  if (load_.defined()) load_.zero_();
}

std::vector<torch::Tensor> TopKRouter::counts() {
  return load_.defined() ? std::vector<torch::Tensor>{load_} : std::vector<torch::Tensor>();
}

void TopKRouter::after_step() {
  if (bias_rate_ > 0.0) update_choice_bias(choice_bias, load_, bias_rate_);
}

SparseMixerRouter::SparseMixerRouter(Linear p, int64_t top_k, double jitter) : top_k_(top_k), jitter_(jitter) {
  projection = register_module("projection", std::move(p));
  check(top_k >= 1 && top_k <= experts(), "a router of {} experts cannot choose {}", experts(), top_k);
}

void SparseMixerRouter::set_active(int64_t k) {
  check_active(k);
  top_k_ = k;
}

Routing SparseMixerRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = projection(x.to(torch::kFloat32));
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  auto left = r.logits;
  std::vector<torch::Tensor> chosen, gates;
  for (int64_t i = 0; i < top_k_; ++i) {
    torch::Tensor best, far;
    {
      torch::NoGradGuard frozen;
      auto top = top_k(left, 1);
      best = top.second;
      // Relative distance to the best expert left, on the scale of the original logits.
      far = (top.first - left) / torch::maximum(r.logits.abs(), top.first) > 2.0 * jitter_;
    }
    const auto masked = left.masked_fill(far, -kInfinity);
    const auto p = torch::softmax(masked, -1);
    auto pick = best;
    if (pass.training) {
      torch::NoGradGuard frozen;
      pick = (masked - torch::empty_like(masked).exponential_().log()).argmax(-1, true);
    }
    auto gate = p.gather(-1, pick);
    if (pass.training) {
      torch::Tensor share;
      {
        torch::NoGradGuard frozen;
        const auto one = (pick == p.argmax(-1, true)) | (torch::rand_like(gate) > 0.75);
        share = 0.3333 + 0.6667 * one.to(p.scalar_type());
      }
      gate = HeunMultiplier::apply(r.logits, gate, pick, p, share);
    }
    chosen.push_back(pick);
    gates.push_back(gate);
    left = r.logits.scatter(-1, torch::cat(chosen, -1), -kInfinity);
  }
  r.experts = torch::cat(chosen, -1);
  r.gates = torch::cat(gates, -1);
  return finish(std::move(r), site, pass);
}

}  // namespace moiety
