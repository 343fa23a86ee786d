#include "moiety/adapt/mola.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/moe/pooling.h"
#include "moiety/moe/topk.h"

namespace moiety {

void MolaConfig::fields(Fields& f) {
  f("experts", experts, "experts beside every matrix; a list gives every layer of the model its own number");
  f("pattern", pattern,
    "instead of experts: numbers for groups of layers of one size, from below; 2, 4, 6, 8 without either");
  f("top_k", top_k, "experts a token takes; a list gives every layer its own number");
  f("rank", rank, "rank of an expert; a list gives every layer its own number");
  f("alpha", alpha, "what an expert adds is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what the experts read, while training").min(0).max(0.99);
  f("coef", coef, "weight of the balance loss; the authors' is 0.001").min(0);
}

std::string MolaConfig::problem() const {
  return !pattern.empty() && !experts.is_null() ? "`experts` and `pattern` exclude each other" : "";
}

std::vector<int64_t> mola_allocation(const std::vector<int64_t>& pattern, int64_t layers) {
  const auto groups = static_cast<int64_t>(pattern.size());
  check(groups >= 1 && groups <= layers, "a pattern of {} values does not fit {} layers", groups, layers);
  std::vector<int64_t> out;
  for (int64_t l = 0; l < layers; ++l) {
    out.push_back(pattern[static_cast<size_t>(l * groups / layers)]);
    check(out.back() >= 1, "a layer cannot have {} experts", out.back());
  }
  return out;
}

torch::Tensor mola_balance_loss(const torch::Tensor& logits, int64_t k, const torch::Tensor& real) {
  const auto scores = torch::softmax(logits.to(torch::promoteTypes(logits.scalar_type(), torch::kFloat32)), -1);
  TokenGroups groups;
  groups.real = real;
  return balance_loss(load_of(top_k(scores, k).second, scores, groups), static_cast<double>(k));
}

MolaBalance::MolaBalance(double coef) : RoutingLoss("mola.balance", coef) {}

void MolaBalance::value(const Routing& r, const Site& site, Pass& pass) {
  const auto real = token_groups(pass, r.scores.size(0), false).real;
  // Matrices of one layer that have the same number of experts and of choices pool.
  const int64_t k = r.experts.size(1);
  const std::string key = fmt::format("{}.{}.{}.{}.{}.{}", name_, site.block, site.round, r.scores.size(1), k, coef_);
  pool(pass, key + ".logits", r.logits);
  if (real.defined()) pool(pass, key + ".real", real);
  pass.at_end(key, [key, k = r.experts.size(1), name = name_, coef = coef_](Pass& p) {
    p.add_loss(name, coef * mola_balance_loss(pooled(p, key + ".logits"), k, pooled(p, key + ".real")));
  });
}

std::shared_ptr<Router> mola_router(Linear rows, int64_t top_k, double coef) {
  TopKRouterOptions o;
  o.top_k = top_k;
  o.normalize = true;
  auto router = std::make_shared<TopKRouter>(std::move(rows), o);
  if (coef > 0.0) router->losses.push_back(std::make_shared<MolaBalance>(coef));
  return router;
}

namespace {

const RegisterMethod registered(
    {.slug = "mola",
     .kind = "part",
     .title = "MoLA",
     .summary = "mixtures of LoRA experts beside matrices, more of them in higher layers",
     .paper = {"Higher Layers Need More LoRA Experts", "Gao et al.", 2024, "2402.08562"},
     .sites = {"linear"},
     .config = describe<MolaConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<MolaConfig>(settings, "mola");
           const LinearTarget& t = site.targets.at(0);
           int64_t experts = 0;
           if (!c.experts.is_null()) {
             experts = at_layer(c.experts, "experts", 1, site);
           } else {
             const auto pattern = c.pattern.empty() ? std::vector<int64_t>{2, 4, 6, 8} : c.pattern;
             experts = mola_allocation(pattern, site.layers)[static_cast<size_t>(site.layer)];
           }
           const int64_t k = at_layer(c.top_k, "top_k", 1, site), rank = at_layer(c.rank, "rank", 1, site);
           check(k <= experts, "`top_k` is {}, and the layer has {} experts", k, experts);
           if (k == 1 && experts > 1 && c.coef == 0.0 && site.targets[0].name == "q_proj")
             log::warn(
                 "mola: one expert a token has the weight 1, so without `coef` nothing trains the routers of "
                 "layer {}",
                 site.layer);
           const auto rows = site.own.linear("router", t.in, experts, false, uniform_init());
           const auto [a, b] = lora_experts(site, experts, rank);
           return std::make_shared<RoutedLora>(t.name, mola_router(rows, k, c.coef), a, b,
                                               c.alpha / static_cast<double>(rank), c.dropout);
         }}});

}  // namespace
}  // namespace moiety
