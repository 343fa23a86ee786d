#include "moiety/moe/chain_of_experts.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/moe/site_experts.h"

namespace moiety {

void ChainOfExpertsConfig::fields(Fields& f) {
  f("rounds", rounds, "how often the experts run one after another").min(1);
  f("experts", experts, "routed experts").min(1);
  f("shared", shared, "shared experts, which run in every round").min(0);
  f("top_k", top_k, "experts a token and round").min(1);
  f("width", width, "hidden units of one expert; 0 takes the dense layer's width over the active experts of all rounds")
      .min(0);
  f("per_round_router", per_round_router, "every round has a router of its own");
  f("inner_residual", inner_residual, "every round adds its input");
  f("outer_residual", outer_residual, "the input of the site is added at the end");
  f("norm_topk_prob", norm_topk_prob, "divide the gates of the chosen by their sum (then they are not scaled)");
  f("routed_scaling_factor", routed_scaling_factor, "factor of the gates");
  f("groups", groups, "groups of experts, of which only the best are chosen from; 0: no groups").min(0);
  f("top_groups", top_groups, "groups that a token chooses from").min(0);
  f("aux_loss_alpha", aux_loss_alpha, "weight of the balance loss").min(0);
  f("seq_aux", seq_aux, "balance within every sequence instead of the whole batch");
}

std::string ChainOfExpertsConfig::problem() const {
  if (top_k > experts) return fmt::format("`top_k` is {}, but there are {} routed experts", top_k, experts);
  if (groups == 0)
    return top_groups > 0 ? fmt::format("`top_groups` is {}, but there are no `groups`", top_groups) : "";
  if (experts % groups != 0) return fmt::format("{} experts are not divisible by {} groups", experts, groups);
  if (top_groups < 1 || top_groups > groups)
    return fmt::format("`top_groups` is {}: it must be 1 to {}, the number of groups", top_groups, groups);
  const int64_t open = experts / groups * top_groups;
  return top_k > open ? fmt::format("`top_k` is {}, but {} group(s) hold {} experts", top_k, top_groups, open) : "";
}

std::shared_ptr<TopKRouter> chain_router(Linear projection, const ChainOfExpertsConfig& c, torch::Tensor choice_bias) {
  TopKRouterOptions options;
  options.top_k = c.top_k;
  options.groups = c.groups;
  options.top_groups = c.top_groups;
  options.normalize = c.norm_topk_prob && c.top_k > 1;
  options.normalize_eps = 1e-20;
  options.scale = options.normalize ? 1.0 : c.routed_scaling_factor;
  auto router = std::make_shared<TopKRouter>(std::move(projection), options, std::move(choice_bias));
  router->losses.push_back(std::make_shared<ExpertBalance>("chain-of-experts.balance", c.aux_loss_alpha, c.seq_aux));
  return router;
}

ChainOfExperts::ChainOfExperts(std::shared_ptr<Norm> n, std::vector<std::shared_ptr<Router>> r,
                               std::shared_ptr<Experts> e, std::shared_ptr<FeedForward> s, ChainOfExpertsConfig c)
    : routers(std::move(r)), config(std::move(c)) {
  const int64_t wanted = config.per_round_router ? config.rounds : 1;
  check(static_cast<int64_t>(routers.size()) == wanted, "{} rounds need {} router(s), there are {}", config.rounds,
        wanted, routers.size());
  if (!config.inner_residual && !config.outer_residual)
    log::warn("a chain of experts without an inner and an outer residual has no path around its experts");
  norm = register_module("norm", std::move(n));
  for (size_t i = 0; i < routers.size(); ++i) register_module("gate" + std::to_string(i), routers[i]);
  experts = register_module("experts", std::move(e));
  if (s) shared = register_module("shared_experts", std::move(s));
}

torch::Tensor ChainOfExperts::forward(const torch::Tensor& x, Pass& pass) {
  pass.batch = x.size(0);
  const int64_t outer = pass.round;
  auto h = norm->forward(x).reshape({-1, x.size(-1)});
  for (int64_t t = 0; t < config.rounds; ++t) {
    pass.round = outer * config.rounds + t;
    Router& router = *routers[config.per_round_router ? static_cast<size_t>(t) : 0];
    auto y = mix(router, *experts, h, pass.at("ffn"), pass);
    if (shared) y = y + shared->apply(h, pass);
    h = config.inner_residual ? y + h : y;
  }
  pass.round = outer;
  const auto y = h.view(x.sizes());
  return config.outer_residual ? y + x : y;
}

namespace {

const RegisterMethod registered(
    {.slug = "chain-of-experts",
     .kind = "part",
     .title = "Chain-of-Experts",
     .summary = "one expert set runs several times inside a layer, routed anew every time",
     .paper = {"Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models", "Wang et al.", 2025,
               "2506.18945"},
     .sites = {"ffn"},
     .config = describe<ChainOfExpertsConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<ChainOfExpertsConfig>(settings, "chain-of-experts");
       const int64_t width = width_at(site, c.width, c.rounds * (c.top_k + c.shared));
       std::vector<std::shared_ptr<Router>> routers;
       for (int64_t t = 0; t < (c.per_round_router ? c.rounds : 1); ++t) {
         const std::string name = c.per_round_router ? "gate." + std::to_string(t) : "gate";
         auto rows = site.own.linear(name, site.hidden, c.experts, false, uniform_init());
         routers.push_back(chain_router(rows, c, choice_bias_at(site, name, c.experts, c.aux_loss_alpha > 0.0)));
       }
       auto experts = experts_at(site, c.experts, width);
       return std::make_shared<ChainOfExperts>(site.norm, routers, experts, shared_at(site, c.shared * width), c);
     })});

}  // namespace
}  // namespace moiety
