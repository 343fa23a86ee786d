#include "moiety/train/routing.h"

#include <torch/torch.h>

#include <algorithm>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/models/decoder_config.h"
#include "moiety/moe/mixture.h"

namespace moiety {
namespace {

template <class T>
std::vector<T*> modules_of(torch::nn::Module& model) {
  std::vector<T*> out;
  for (const auto& module : model.modules())
    if (auto* found = dynamic_cast<T*>(module.get()); found && std::find(out.begin(), out.end(), found) == out.end())
      out.push_back(found);
  return out;
}

}  // namespace

void prepare_routing(nlohmann::json& config, const RoutingConfig& routing) {
  if (routing.bias_rate == 0.0 || parse_decoder_config(config).moe.choice_bias) return;
  config["moiety"]["choice_bias"] = true;
}

void apply_routing(CausalModel& model, const RoutingConfig& routing) {
  const auto all = modules_of<Router>(model);
  std::vector<Router*> routers;
  std::copy_if(all.begin(), all.end(), std::back_inserter(routers), [](const Router* r) { return !r->has_rule(); });
  const bool losses = routing.balance != "auto" || routing.coef || routing.z_coef;
  // Turning off what is not there is no mistake.
  const bool adds = (losses && routing.balance != "none") || routing.z_coef.value_or(0.0) > 0.0;
  const auto require = [&](bool possible, const char* key, const char* what) {
    check(possible, "routing.{}: {}", key,
          all.empty()       ? "the model has no mixture of experts"
          : routers.empty() ? "every mixture of the model belongs to a part that has a rule of its own"
                            : what);
  };
  if (losses) {
    const char* key = routing.balance != "auto" ? "balance" : routing.coef ? "coef" : "z_coef";
    if (adds) require(!routers.empty(), key, "");
    BalanceRule rule = parse_decoder_config(model.config()).moe.balance;
    if (routing.balance != "auto") rule.kind = routing.balance;
    check(routing.balance == "auto" || rule.kind == "none" || routing.coef || rule.coef > 0.0,
          "routing.balance is {}, but neither routing.coef nor the model's config gives the weight of the loss",
          routing.balance);
    rule.coef = routing.coef.value_or(rule.coef);
    rule.z_coef = routing.z_coef.value_or(rule.z_coef);
    rule.devices = routing.devices;
    for (Router* r : routers) {
      // A part without a rule stays without one unless the run names it.
      if (r->of_family || adds) r->set_balance(rule);
    }
  }
  const auto mixtures = modules_of<Mixture>(model);
  const auto for_mixtures = [&](const char* key, const auto& taken, const auto& set) {
    int64_t changed = 0;
    for (Mixture* m : mixtures) {
      if (m->router->has_rule() || taken(*m)) continue;
      set(*m);
      ++changed;
    }
    require(changed > 0, key, "no mixture of the model can take it");
  };
  if (routing.capacity_factor > 0.0)
    for_mixtures(
        "capacity_factor", [](const Mixture& m) { return m.capacity_factor > 0.0; },
        [&](Mixture& m) { m.training_capacity_factor = routing.capacity_factor; });
  if (routing.jitter && (*routing.jitter > 0.0 || !mixtures.empty()))
    for_mixtures(
        "jitter", [](const Mixture& m) { return !m.router->of_family && m.jitter > 0.0; },
        [&](Mixture& m) { m.jitter = *routing.jitter; });
  if (routing.bias_rate > 0.0) {
    int64_t changed = 0;
    for (TopKRouter* r : modules_of<TopKRouter>(model)) {
      if (r->has_rule() || !r->choice_bias.defined()) continue;
      r->set_bias_rate(routing.bias_rate);
      ++changed;
    }
    require(changed > 0, "bias_rate", "no router of the model chooses the top k of scores, which a bias could move");
  }
}

}  // namespace moiety
