#include "moiety/moe/adamoe.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/site_experts.h"
#include "moiety/moe/topk.h"

namespace moiety {

void AdaMoeConfig::fields(Fields& f) {
  f("experts", experts, "true experts of a layer that is not a mixture already").min(1);
  f("width", width,
    "hidden units of one expert; 0 takes the dense layer's width over the expected true experts of a token")
      .min(0);
  f("null_experts", null_experts, "experts that compute nothing").min(0);
  f("top_k", top_k, "slots a token fills with true and null experts").min(1);
  f("coef", coef, "weight of the balance loss").min(0);
  f("variant", variant, "balance every layer with null experts as one class, or all layers in one table")
      .choices({"per_layer", "pooled"});
  f("jitter", jitter, "noise on the inputs while training").min(0).max(0.99);
}

NullChoice adamoe_choose(const torch::Tensor& logits, int64_t n, int64_t k) {
  check(n >= 1 && n <= logits.size(1), "{} true experts of {} are impossible", n, logits.size(1));
  NullChoice c;
  c.routing.logits = logits;
  c.routing.scores = torch::softmax(logits, -1);
  const auto [value, index] = top_k(c.routing.scores, k);
  c.slots = index;
  const auto is_true = index < n;
  const auto kept = value * is_true.to(value.scalar_type());
  const auto sum = kept.sum(-1, true);
  c.routing.gates = kept / torch::where(sum > 0, sum, torch::ones_like(sum));
  c.routing.experts = index.masked_fill(~is_true, -1);
  return c;
}

namespace {

// `slots` of the router that chose.
torch::Tensor per_layer_loss(const torch::Tensor& scores, const torch::Tensor& slots, int64_t n,
                             const torch::Tensor& real) {
  const int64_t all = scores.size(1);
  TokenGroups groups;
  groups.real = real;
  const Load load = load_of(slots, scores, groups);
  auto f = load_fraction(load, static_cast<double>(slots.size(1)));  // times n + m
  if (n < all)
    f = torch::cat({f.narrow(1, 0, n), f.narrow(1, n, all - n).mean(1, true).expand({f.size(0), all - n})}, 1);
  return (f * load.probability).sum();
}

}  // namespace

torch::Tensor adamoe_balance_loss(const torch::Tensor& logits, int64_t n, int64_t k, const torch::Tensor& real) {
  const auto scores = torch::softmax(logits, -1);
  return per_layer_loss(scores, top_k(scores, k).second, n, real);
}

torch::Tensor adamoe_pooled_loss(const torch::Tensor& logits, int64_t n, int64_t k, const torch::Tensor& real) {
  check(k <= n, "the pooled balance loss is defined for at most as many slots ({}) as true experts ({})", k, n);
  auto scores = torch::softmax(logits, -1);
  if (real.defined()) scores = scores.index_select(1, real.nonzero().squeeze(1));
  scores = scores.reshape({-1, logits.size(-1)});
  return pooled_balance_loss(top_k(scores, k).second, scores);
}

NullRouter::NullRouter(Linear g, Linear n, AdaMoeConfig c) : config(std::move(c)) {
  const int64_t nulls = n.is_empty() ? 0 : n->out();
  check(config.top_k >= 1 && config.top_k <= g->out() + nulls,
        "{} slots a token cannot be filled from {} true and {} null experts", config.top_k, g->out(), nulls);
  check(n.is_empty() || n->in() == g->in(), "the null experts' rows have {} features, the true ones' {}",
        n.is_empty() ? 0 : n->in(), g->in());
  check(config.variant != "pooled" || config.top_k <= g->out(),
        "the pooled balance loss is defined for at most as many slots ({}) as true experts ({})", config.top_k,
        g->out());
  gate = register_module("gate", std::move(g));
  if (!n.is_empty()) null_gate = register_module("gate2", std::move(n));
}

Routing NullRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  const auto input = x.to(torch::kFloat32);
  auto logits = gate(input);
  if (!null_gate.is_empty()) logits = torch::cat({logits, null_gate(input)}, -1);
  edit_logits(logits, site, pass);
  auto choice = adamoe_choose(logits, gate->out(), config.top_k);
  if (pass.training && config.coef > 0.0) {
    const auto groups = token_groups(pass, x.size(0), false);
    if (config.variant == "per_layer") {
      pass.add_loss("adamoe.balance",
                    config.coef * per_layer_loss(choice.routing.scores, choice.slots, gate->out(), groups.real));
    } else {
      Routing slots = choice.routing;
      slots.experts = choice.slots;
      PooledBalance("adamoe.balance", config.coef).add(slots, site, pass);
    }
  }
  return finish(std::move(choice.routing), site, pass);
}

torch::Tensor null_rows_of(const torch::Tensor& gate, int64_t m) {
  check(m >= 0 && m % gate.size(0) == 0,
        "{} null experts are no multiple of {} true ones, so their rows cannot be copies; initialise them at random", m,
        gate.size(0));
  return gate.repeat({m / gate.size(0), 1});
}

void AdaMoeLinearConfig::fields(Fields& f) {
  f("experts", experts, "true experts: pairs of low-rank matrices").min(1);
  f("null_experts", null_experts, "experts that compute nothing; a list gives every layer of the model its own number");
  f("top_k", top_k, "slots a token fills with true and null experts; a list gives every layer its own number");
  f("rank", rank, "rank of an expert").min(1);
  f("alpha", alpha, "what an expert adds is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what the experts read, while training").min(0).max(0.99);
  f("coef", coef, "weight of the balance loss of every matrix").min(0);
  f("jitter", jitter, "noise on what router and experts read, while training").min(0).max(0.99);
}

AdaMoeBeside::AdaMoeBeside(std::string site, std::shared_ptr<NullRouter> r, std::shared_ptr<LoraExperts> e,
                           double jitter)
    : site_(std::move(site)), jitter_(jitter) {
  router = register_module("router", std::move(r));
  experts = register_module("experts", std::move(e));
}

void AdaMoeBeside::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  auto flat = x.reshape({-1, x.size(-1)});
  if (pass.training && jitter_ > 0.0) flat = flat * torch::empty_like(flat).uniform_(1.0 - jitter_, 1.0 + jitter_);
  auto& y = outputs.at(0);
  y = y + mix(*router, *experts, flat, pass.at(site_), pass).view(y.sizes());
}

torch::Tensor AdaMoeBeside::merged(const torch::Tensor& weight, int64_t place) const {
  if (experts->count() != 1 || !router->null_gate.is_empty()) return Beside::merged(weight, place);
  const torch::NoGradGuard frozen;
  // What the expert gives for every feature alone, a row each; nothing is dropped.
  const bool training = experts->is_training();
  experts->eval();
  const auto features = torch::eye(weight.size(1), weight.options());
  const auto rows = experts->forward(features, {features.size(0)});
  experts->train(training);
  return weight + rows.t();
}

namespace {

const RegisterMethod registered_linear(
    {.slug = "adamoe-linear",
     .kind = "part",
     .title = "AdaMoE on linear layers",
     .summary = "low-rank experts beside frozen matrices, with null experts: every token chooses how many it gets",
     .paper = {"AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models", "Zeng et al.",
               2024, "2406.13233"},
     .sites = {"linear"},
     .config = describe<AdaMoeLinearConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<AdaMoeLinearConfig>(settings, "adamoe-linear");
           const LinearTarget& t = site.targets.at(0);
           AdaMoeConfig routing;
           routing.experts = c.experts;
           routing.null_experts = at_layer(c.null_experts, "null_experts", 0, site);
           routing.top_k = at_layer(c.top_k, "top_k", 1, site);
           routing.coef = c.coef;
           auto gate = site.own.linear("router.gate", t.in, c.experts, false, uniform_init());
           Linear nulls{nullptr};
           if (routing.null_experts > 0)
             nulls = site.own.linear("router.gate2", t.in, routing.null_experts, false, uniform_init());
           auto a = site.own.stack("lora_A", c.experts, t.in, c.rank, false, uniform_init());
           auto b = site.own.stack("lora_B", c.experts, c.rank, t.out, false, constant_init(0.0));
           return std::make_shared<AdaMoeBeside>(
               t.name, std::make_shared<NullRouter>(gate, nulls, routing),
               std::make_shared<LoraExperts>(a, b, c.alpha / static_cast<double>(c.rank), c.dropout), c.jitter);
         }}});

const RegisterMethod registered(
    {.slug = "adamoe",
     .kind = "part",
     .title = "AdaMoE",
     .summary = "null experts let every token choose how many true ones it gets",
     .paper = {"AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models", "Zeng et al.",
               2024, "2406.13233"},
     .sites = {"ffn"},
     .config = describe<AdaMoeConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<AdaMoeConfig>(settings, "adamoe");
       const auto own = site.mixture();
       auto gate = own ? own->router : site.own.linear("gate", site.hidden, c.experts, false, uniform_init());
       Linear nulls{nullptr};
       if (c.null_experts > 0) {
         // Null rows of a mixture start as copies of its own, where their numbers allow it.
         Init init = uniform_init();
         if (own && c.null_experts % gate->out() == 0) {
           const auto rows = null_rows_of(gate->dense(torch::kFloat32).detach(), c.null_experts);
           init = [rows](torch::Tensor t) { t.copy_(rows); };
         }
         nulls = site.own.linear("gate2", site.hidden, c.null_experts, false, init);
       }
       auto router = std::make_shared<NullRouter>(gate, nulls, c);
       const auto mixture_of = [&](std::shared_ptr<Experts> experts, std::shared_ptr<FeedForward> shared,
                                   Linear shared_gate) {
         auto mixture =
             std::make_shared<Mixture>(router, std::move(experts), std::move(shared), std::move(shared_gate));
         mixture->jitter = c.jitter;
         return mixture;
       };
       if (own) return mixture_of(own->experts, own->shared, own->shared_gate);
       const int64_t expected = std::max<int64_t>(1, c.top_k * c.experts / (c.experts + c.null_experts));
       return mixture_of(experts_at(site, c.experts, width_at(site, c.width, expected)), nullptr, nullptr);
     })});

}  // namespace
}  // namespace moiety
