#include "moiety/moe/compressed_experts.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/nn/dots.h"
#include "moiety/nn/part.h"

namespace moiety {

using torch::Tensor;

void CompressedExpertsConfig::fields(Fields& f) {
  f("n_ce", n_ce, "experts of a token that three vectors stand for, of its top k; -1: half of them").min(-1);
}

int64_t auxiliary_experts(int64_t n_ce, int64_t k) {
  const int64_t n = n_ce < 0 ? k / 2 : n_ce;
  check(n < k, "at least one main expert is needed: top_k={}, n_ce={}", k, n);
  return n;
}

Tensor compressed_inputs(const Routing& routing, int64_t n, const Tensor& ces) {
  const int64_t tokens = routing.experts.size(0), main = routing.experts.size(1) - n;
  check(n >= 1 && main >= 1, "at least one main expert is needed: top_k={}, n_ce={}", routing.experts.size(1), n);
  const auto index = routing.experts.narrow(1, main, n);
  const auto gates = routing.gates.narrow(1, main, n) * (index >= 0).to(routing.gates.scalar_type());
  const auto sum = gates.sum(-1, true);
  const auto weights = (gates / torch::where(sum > 0, sum, torch::ones_like(sum))).to(ces.scalar_type());
  // Weights sum to 1, so that 1 + sum a (C - 1) is sum a C, and exactly 1 where C is.
  const auto offsets = torch::arange(0, tokens * n, n, index.options());
  const auto [mean, unused1, unused2, unused3] =
      at::embedding_bag(ces.flatten(1) - 1.0, index.clamp_min(0).reshape({-1}), offsets, /*scale_grad_by_freq=*/false,
                        /*mode=sum*/ 0, /*sparse=*/false, weights.reshape({-1}));
  return (mean + 1.0).view({tokens, 3, -1});
}

Tensor ScaledExperts::mix_scaled(const Tensor& x, const Tensor& c, const Dispatch& d) {
  const auto typed = c.to(x.scalar_type());
  const auto scale = [&](int64_t which, int64_t width) { return typed.select(1, which).narrow(1, 0, width); };
  const auto rows = [&](int64_t which) { return d.gather(x * scale(which, x.size(1))); };
  const auto inner = combine(apply_stack(gate, rows(0), d.counts), apply_stack(up, rows(2), d.counts));
  const auto h = inner * d.gather(scale(1, down->in()));
  return d.reduce(apply_stack(down, h, d.counts), x.size(0));
}

CompressedExperts::CompressedExperts(std::shared_ptr<Router> r, const GatedExperts& e, Tensor c, int64_t n,
                                     std::shared_ptr<FeedForward> s, Linear g)
    : n_ce(n) {
  check(e.act() != nullptr, "experts whose gate is no plain activation cannot be compressed");
  const std::vector<int64_t> shape = {e.count(), 3, std::max(e.gate->in(), e.gate->out())};
  check(c.sizes().vec() == shape, "the vectors of compressed experts have shape {}, {} is right", c.sizes().vec(),
        shape);
  router = register_module("gate", std::move(r));
  experts = register_module("experts", std::make_shared<ScaledExperts>(e.gate, e.up, e.down, e.act()));
  if (s) shared = register_module("shared_experts", std::move(s));
  if (!g.is_empty()) shared_gate = register_module("shared_expert_gate", std::move(g));
  // Named as the scales that they are: training does not let them decay.
  ces = register_parameter("scales", c, c.requires_grad());
}

Tensor CompressedExperts::forward(const Tensor& x, Pass& pass) {
  pass.batch = x.size(0);
  const auto flat = x.reshape({-1, x.size(-1)});
  const auto routed =
      pass.training && jitter > 0.0 ? flat * torch::empty_like(flat).uniform_(1.0 - jitter, 1.0 + jitter) : flat;
  const Site site = pass.at("ffn");
  const Routing routing = router->route(routed, site, pass);
  const int64_t k = routing.experts.size(1), n = auxiliary_experts(n_ce, k);
  Tensor y;
  if (n == 0) {
    y = experts->mix_in(routed, Dispatch::of(routing, experts->count()), pass);
  } else {
    Routing main = routing;
    main.experts = routing.experts.narrow(1, 0, k - n);
    main.gates = routing.gates.narrow(1, 0, k - n);
    y = experts->mix_scaled(routed, compressed_inputs(routing, n, ces), Dispatch::of(main, experts->count()));
  }
  report(pass, site, routing, router->experts(), routed, y);
  if (shared) {
    auto s = shared->apply(flat, pass);
    if (!shared_gate.is_empty()) s = torch::sigmoid(multiply_narrow(shared_gate, flat)) * s;
    y = y + s;
  }
  return y.view(x.sizes());
}

ActiveParameters active_parameters(const ActiveSizes& s) {
  const int64_t n = auxiliary_experts(s.n_ce, s.top_k), expert = 3 * s.hidden * s.intermediate;
  const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
  const int64_t layer = 2 * s.hidden + 2 * s.hidden * queries + 2 * s.hidden * keys + (s.qk_norm ? queries + keys : 0) +
                        s.experts * s.hidden;
  const int64_t rest = (s.tied ? 1 : 2) * s.vocab * s.hidden + s.hidden + s.layers * layer;
  return {rest + s.layers * s.top_k * expert,
          rest + s.layers * ((s.top_k - n) * expert + n * (2 * s.hidden + s.intermediate)),
          s.layers * 3 * s.experts * std::max(s.hidden, s.intermediate)};
}

namespace {

const RegisterMethod registered(
    {.slug = "compressed-experts",
     .kind = "part",
     .title = "Compressed Experts",
     .summary = "of a token's experts some run and three vectors stand for each of the others",
     .paper = {"Efficiently Editing Mixture-of-Experts Models with Compressed Experts", "He et al.", 2025,
               "2503.00634"},
     .sites = {"ffn"},
     .config = describe<CompressedExpertsConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<CompressedExpertsConfig>(settings, "compressed-experts");
       const auto own = site.mixture();
       check(own != nullptr, "the layer is dense: experts can be compressed where the family has a mixture");
       const auto* experts = dynamic_cast<GatedExperts*>(own->experts.get());
       check(experts != nullptr, "the experts of the family are no gated feed-forward layers");
       if (const auto* top = dynamic_cast<TopKRouter*>(own->chooser.get()))
         auxiliary_experts(c.n_ce, top->options.top_k);
       const int64_t width = std::max(experts->gate->in(), experts->gate->out());
       auto ces = site.own.get("ces", {experts->count(), 3, width}, constant_init(1.0));
       auto out =
           std::make_shared<CompressedExperts>(own->chooser, *experts, ces, c.n_ce, own->shared, own->shared_gate);
       out->jitter = own->jitter;
       return out;
     })});

}  // namespace
}  // namespace moiety
