#include "moiety/adapt/dynmole.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/adapt/soft_router.h"
#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/pooling.h"
#include "moiety/moe/topk.h"

namespace moiety {

void DynMoleConfig::fields(Fields& f) {
  f("experts", experts, "experts beside every matrix").min(1);
  f("rank", rank, "rank of an expert").min(1);
  f("alpha", alpha, "what an expert adds is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what the experts read, while training").min(0).max(0.99);
  f("keep_top_k", rule.keep_top_k, "experts that a token takes at least").min(1);
  f("top_p", rule.top_p, "more of them while their probabilities sum up to no more").min(0).max(1);
  f("entropy_threshold", rule.entropy_threshold, "a token with a higher entropy takes all; from 1 on none does").min(0);
  f("entropy_type", rule.entropy_type, "which entropy").choices({"tsallis", "renyi"});
  f("entropy_index", rule.entropy_index, "its index; at 1 it is Shannon's").min(0).max(2);
  f("entropy_eps", rule.entropy_eps, "added to every probability in it").min(0).max(0.1);
  f("balance_coef", balance_coef, "weight of the balance loss").min(0);
  f("entropy_coef", entropy_coef, "weight of the mean entropy, which makes routers decisive").min(0);
}

std::string DynMoleConfig::problem() const {
  if (rule.keep_top_k > experts)
    return fmt::format("keep_top_k is {}, and there are {} experts", rule.keep_top_k, experts);
  if (rule.entropy_index <= 0.0) return "entropy_index has to be above 0";
  if (rule.entropy_index != 1.0 && std::abs(rule.entropy_index - 1.0) < 1e-2)
    return "an entropy_index that is nearly 1 is dominated by entropy_eps: take 1, which is Shannon's entropy";
  if (rule.entropy_eps <= 0.0) return "entropy_eps has to be above 0";
  if (rule.entropy_threshold <= 0.0) return "entropy_threshold has to be above 0";
  if (rule.top_p <= 0.0) return "top_p has to be above 0";
  return "";
}

torch::Tensor entropy(const torch::Tensor& p, double q, double eps, bool normalize, const std::string& type) {
  check(q > 0.0 && q <= 2.0, "an entropy of index {} is not defined here: above 0, and at most 2", q);
  check(eps > 0.0, "the entropy needs an eps above 0");
  check(type == "tsallis" || type == "renyi", "unknown entropy `{}`; known are tsallis and renyi", type);
  const auto shifted = p + eps;
  const auto n = static_cast<double>(p.size(-1));
  torch::Tensor h;
  double most = std::log(n);
  if (q == 1.0) {
    h = -(shifted * shifted.log()).sum(-1);
  } else if (type == "tsallis") {
    h = (1.0 - shifted.pow(q).sum(-1)) / (q - 1.0);
    most = (1.0 - std::pow(n, 1.0 - q)) / (q - 1.0);
  } else {
    h = (shifted.pow(q).sum(-1) + 1e-10).log() / (1.0 - q);
  }
  return normalize && most > 0.0 ? h / most : h;
}

DynMoleChoice dynmole_choose(const torch::Tensor& p, const DynMoleRule& rule) {
  const int64_t experts = p.size(-1);
  check(rule.keep_top_k >= 1 && rule.keep_top_k <= experts, "keep_top_k is {}, and there are {} experts",
        rule.keep_top_k, experts);
  DynMoleChoice out;
  out.entropy = entropy(p, rule.entropy_index, rule.entropy_eps, true, rule.entropy_type);
  const auto [sorted, order] = top_k(p.detach(), experts);
  auto keep = torch::arange(experts, order.options()) < rule.keep_top_k;
  // A running sum may be rounded above 1.
  keep = rule.top_p >= 1.0 ? torch::ones_like(sorted, torch::kBool) : (sorted.cumsum(-1) <= rule.top_p) | keep;
  out.mask = torch::zeros_like(sorted, torch::kBool).scatter(-1, order, keep);
  if (rule.entropy_index > 0.0 && rule.entropy_threshold < 1.0)
    out.mask = out.mask | (out.entropy.detach() > rule.entropy_threshold).unsqueeze(-1);
  out.weights = p * out.mask.to(p.scalar_type());
  return out;
}

DynMoleLoss dynmole_loss(const torch::Tensor& logits, const DynMoleRule& rule, double balance_coef, double entropy_coef,
                         const torch::Tensor& valid) {
  const auto p = torch::softmax(logits, -1);
  const auto choice = dynmole_choose(p, rule);
  DynMoleLoss out;
  out.entropy = choice.entropy.mean();
  const auto mean = [&](const torch::Tensor& t) {
    if (!valid.defined()) return t.mean(0);
    const auto v = valid.to(t.scalar_type()).unsqueeze(-1);
    return (t * v).sum(0) / (v.sum() + 1e-8);
  };
  if (valid.defined())
    check(valid.size(0) == logits.size(0), "logits have {} rows, the mask has {}", logits.size(0), valid.size(0));
  out.balance = static_cast<double>(p.size(-1)) * (mean(choice.weights) * mean(p)).sum();
  out.loss = entropy_coef * out.entropy + balance_coef * out.balance;
  return out;
}

DynMoleRouter::DynMoleRouter(Linear g, DynMoleRule r, double balance_coef, double entropy_coef)
    : rule(std::move(r)), balance_(balance_coef), entropy_(entropy_coef) {
  gate = register_module("gate", std::move(g));
  check(rule.keep_top_k >= 1 && rule.keep_top_k <= experts(), "keep_top_k is {}, and there are {} experts",
        rule.keep_top_k, experts());
}

void DynMoleRouter::set_active(int64_t k) {
  check_active(k);
  rule.keep_top_k = k;
}

Routing DynMoleRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = gate(router_input(x));
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  const auto choice = dynmole_choose(r.scores, rule);
  r.experts = every_expert(r.scores.size(0), experts(), r.scores.device()).masked_fill(~choice.mask, -1);
  r.gates = choice.weights;
  if (pass.training && has_rule()) {
    const std::string key = "dynmole." + std::to_string(experts());
    pool(pass, key + ".logits", r.logits);
    if (const auto real = token_groups(pass, x.size(0), false).real; real.defined()) pool(pass, key + ".valid", real);
    pass.at_end(key, [key, own = rule, balance = balance_, entropy = entropy_](Pass& p) {
      const auto loss = dynmole_loss(pooled(p, key + ".logits"), own, balance, entropy, pooled(p, key + ".valid"));
      if (entropy > 0.0) p.add_loss("dynmole.entropy", entropy * loss.entropy);
      if (balance > 0.0) p.add_loss("dynmole.balance", balance * loss.balance);
    });
  }
  return finish(std::move(r), site, pass);
}

namespace {

const RegisterMethod registered(
    {.slug = "dynmole",
     .kind = "part",
     .title = "DynMoLE",
     .summary = "mixtures of LoRA experts; a token takes as many as its distribution asks for, all where it is unsure",
     .paper = {"DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism", "Li et al.",
               2025, "2504.00661"},
     .sites = {"linear"},
     .config = describe<DynMoleConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<DynMoleConfig>(settings, "dynmole");
           const LinearTarget& t = site.targets.at(0);
           auto router =
               std::make_shared<DynMoleRouter>(site.own.linear("router", t.in, c.experts, false, uniform_init()),
                                               c.rule, c.balance_coef, c.entropy_coef);
           const auto [a, b] = lora_experts(site, c.experts, c.rank);
           return std::make_shared<RoutedLora>(t.name, router, a, b, c.alpha / static_cast<double>(c.rank), c.dropout);
         }}});

}  // namespace
}  // namespace moiety
