#include "moiety/moe/dynamic_routing.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/site_experts.h"

namespace moiety {

void DynamicRoutingConfig::fields(Fields& f) {
  f("experts", experts, "experts of a layer that is not a mixture already").min(1);
  f("width", width, "hidden units of one expert; 0 takes half of the dense layer's width").min(0);
  f("p", p, "experts are taken until their probabilities sum up to more than this").min(0).max(1);
  f("balance_coef", balance_coef, "weight of the balance loss").min(0);
  f("dynamic_coef", dynamic_coef, "weight of the entropy of the router").min(0);
  f("min_k", min_k, "least experts a token").min(1);
  f("max_k", max_k, "most experts a token; 0: no cap").min(0);
  f("renormalize", renormalize, "divide gates by their sum");
}

std::string DynamicRoutingConfig::problem() const {
  if (max_k > 0 && min_k > max_k) return fmt::format("`min_k` {} is above `max_k` {}", min_k, max_k);
  return "";
}

Routing top_p_choice(const torch::Tensor& probabilities, double p, int64_t min_k, int64_t max_k) {
  check(p >= 0.0 && p <= 1.0, "p is {}; it must lie between 0 and 1", p);
  const int64_t experts = probabilities.size(1), most = max_k > 0 ? std::min(max_k, experts) : experts;
  check(min_k >= 1 && min_k <= most, "at least {} and at most {} experts a token is impossible", min_k, most);
  const auto [sorted, order] = at::sort(probabilities, /*stable=*/true, -1, /*descending=*/true);
  Routing r;
  r.scores = probabilities;
  {
    torch::NoGradGuard no_grad;
    const auto place = torch::arange(experts, order.options());
    torch::Tensor count;
    if (p >= 1.0) {
      count = torch::full({probabilities.size(0)}, experts, order.options());
    } else {
      // The first running sum above p: as many as are not above it, and one more.
      const auto below = sorted.detach().cumsum(-1) <= torch::scalar_tensor(p, sorted.options());
      count = (below.sum(-1) + 1).clamp_max(experts);
    }
    count = count.clamp(min_k, most);
    r.experts = order.masked_fill(place.unsqueeze(0) >= count.unsqueeze(1), -1);
  }
  r.gates = sorted * (r.experts >= 0).to(sorted.scalar_type());
  return r;
}

torch::Tensor dynamic_balance_loss(const torch::Tensor& experts, const torch::Tensor& probabilities,
                                   const TokenGroups& groups) {
  return balance_loss(load_of(experts, probabilities, groups), 1.0);
}

TopPRouter::TopPRouter(Linear p, DynamicRoutingConfig c) : config(c) {
  projection = register_module("projection", std::move(p));
  losses.push_back(std::make_shared<ExpertBalance>("dynamic-routing.balance", c.balance_coef, false,
                                                   ExpertBalance::Slots::per_token));
  losses.push_back(std::make_shared<EntropyLoss>("dynamic-routing.entropy", c.dynamic_coef));
}

Routing TopPRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  auto logits = projection(x.to(torch::kFloat32));
  edit_logits(logits, site, pass);
  auto scores = torch::softmax(logits, -1);
  edit_scores(scores, site, pass);
  Routing r = top_p_choice(scores, config.p, config.min_k, config.max_k);
  r.logits = logits;
  if (config.renormalize) r.gates = r.gates / r.gates.sum(-1, true);
  return finish(std::move(r), site, pass);
}

namespace {

const RegisterMethod registered(
    {.slug = "dynamic-routing",
     .kind = "part",
     .title = "Dynamic top-p routing",
     .summary = "a token takes experts until their probabilities sum up to p",
     .paper = {"Harder Tasks Need More Experts: Dynamic Routing in MoE Models", "Huang et al.", 2024, "2403.07652"},
     .sites = {"ffn"},
     .config = describe<DynamicRoutingConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<DynamicRoutingConfig>(settings, "dynamic-routing");
       if (const auto own = site.mixture())
         return std::make_shared<Mixture>(std::make_shared<TopPRouter>(own->router, c), own->experts, own->shared,
                                          own->shared_gate);
       auto rows = site.own.linear("router", site.hidden, c.experts, false, uniform_init());
       return std::make_shared<Mixture>(std::make_shared<TopPRouter>(rows, c),
                                        experts_at(site, c.experts, width_at(site, c.width, 2)));
     })});

}  // namespace
}  // namespace moiety
