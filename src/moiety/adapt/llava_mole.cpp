#include "moiety/adapt/llava_mole.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/adapt/low_rank.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/adapt/soft_router.h"
#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/pooling.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

std::string key_of(const Pass& pass) {
  return fmt::format("llava-mole.{}.{}", pass.block, pass.round);
}

}  // namespace

void LlavaMoleConfig::fields(Fields& f) {
  f("experts", experts, "experts beside a feed-forward layer; a token takes one").min(1);
  f("rank", rank, "rank of an expert").min(1);
  f("alpha", alpha, "what an expert adds is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what the experts read, while training").min(0).max(0.99);
  f("coef", coef, "weight of the balance loss").min(0);
  f("dense", dense, "all experts by their probabilities instead of one");
  f("gate_weighting", gate_weighting,
    "what the chosen expert's output is multiplied by: none (1, as released: the balance loss alone trains the "
    "router), "
    "prob (its probability), straight_through (1, with the gradient of the probabilities)")
      .choices({"none", "prob", "straight_through"});
}

torch::Tensor mole_gates(const torch::Tensor& p, bool dense, const std::string& weighting) {
  if (dense) return p;
  const auto best = top_k(p.detach(), 1).second;
  const auto one = torch::zeros_like(p.detach()).scatter_(-1, best, 1.0);
  if (weighting == "prob") return one * p;
  if (weighting == "straight_through") return one + (p - p.detach());
  check(weighting == "none", "unknown gate_weighting `{}`; known are none, prob and straight_through", weighting);
  return one;
}

torch::Tensor mole_balance_loss(const torch::Tensor& p, const torch::Tensor& mask) {
  const int64_t layers = p.size(0), rows = p.size(1), tokens = p.size(2);
  const auto chosen = torch::zeros_like(p.detach()).scatter_(-1, top_k(p.detach(), 1).second, 1.0);
  const auto real =
      mask.defined() ? (mask != 0).to(p.scalar_type()) : torch::ones({rows, tokens}, p.options().requires_grad(false));
  const auto count = real.sum(1) * static_cast<double>(layers);
  check((count > 0).all().item<bool>(), "a sample has no real token to balance experts over");
  const auto mean = [&](const torch::Tensor& t) {
    return (t * real.unsqueeze(0).unsqueeze(-1)).sum({0, 2}) / count.unsqueeze(-1);
  };
  return (mean(p) * mean(chosen)).sum(-1).mean();
}

MoleRouter::MoleRouter(Linear p, bool dense, std::string weighting, double coef)
    : dense_(dense), weighting_(std::move(weighting)), coef_(coef) {
  projection = register_module("projection", std::move(p));
}

torch::Tensor MoleRouter::route(const torch::Tensor& x, Pass& pass) {
  const Site site = pass.at("mlp");
  const int64_t experts = projection->out();
  auto logits = projection(router_input(x));
  for (const auto& edit : pass.edits) edit->logits(site, pass, logits);
  auto p = torch::softmax(logits, -1);
  for (const auto& edit : pass.edits) edit->distribution(site, pass, p);
  const auto gates = mole_gates(p, dense_, weighting_);
  pass.state[key_of(pass)] = gates;
  if (pass.trace) {
    Routing r{top_k(p, 1).second, {}, p, logits};
    r.gates = gates.gather(1, r.experts);
    if (dense_) r = {every_expert(x.size(0), experts, p.device()), p, p, logits};
    report(pass, site, r, experts, x, {});
  }
  if (pass.training && coef_ > 0.0 && experts > 1) {
    // Layers of one number of experts pool.
    const std::string key = fmt::format("llava-mole.p.{}.{}", experts, coef_);
    pool(pass, key, p.view({1, pass.batch, -1, experts}));
    pass.at_end(key, [key, coef = coef_](Pass& q) {
      q.add_loss("llava-mole.balance", coef * mole_balance_loss(pooled(q, key), q.mask));
    });
  }
  return gates;
}

torch::Tensor MoleRouter::decided(Pass& pass) const {
  const auto found = pass.state.find(key_of(pass));
  check(found != pass.state.end(), "down_proj of block {} runs before gate_proj and up_proj have routed", pass.block);
  return found->second;
}

MoleBeside::MoleBeside(std::shared_ptr<MoleRouter> router, bool routes, std::vector<torch::Tensor> a,
                       std::vector<torch::Tensor> b, double scale, double dropout)
    : router_(std::move(router)),
      routes_(routes),
      a_(std::move(a)),
      b_(std::move(b)),
      scale_(scale),
      dropout_(dropout) {
  if (routes_) register_module("router", router_);
  for (size_t i = 0; i < a_.size(); ++i) {
    const std::string last = a_.size() == 1 ? "" : std::to_string(i);
    a_[i] = register_parameter("lora_A" + last, a_[i], a_[i].requires_grad());
    b_[i] = register_parameter("lora_B" + last, b_[i], b_[i].requires_grad());
  }
}

bool MoleBeside::set_active(int64_t k) {
  const int64_t own = router_->dense() ? a_[0].size(0) : 1;
  check(k == own, "{} active experts are impossible: llava-mole gives every token {}", k,
        router_->dense() ? fmt::format("all of its {} experts", own) : "one expert");
  return true;
}

void MoleBeside::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  const auto gates = routes_ ? router_->route(x.reshape({-1, x.size(-1)}), pass) : router_->decided(pass);
  const auto v = dropped(x, dropout_, pass.training);
  for (size_t i = 0; i < outputs.size(); ++i)
    outputs[i] = add_low_rank(outputs[i], v, joined_a(a_[i]), joined_b(b_[i]), gates, scale_);
}

namespace {

const RegisterMethod registered(
    {.slug = "llava-mole",
     .kind = "part",
     .title = "LLaVA-MoLE",
     .summary = "one LoRA expert a token beside gate, up and down together, by one router a layer",
     .paper =
         {"LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
          "Chen et al.", 2024, "2401.16160"},
     .sites = {"linear"},
     .config = describe<LlavaMoleConfig>,
     .make = MakeBeside{
         .per_input = true, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<LlavaMoleConfig>(settings, "llava-mole");
           const bool first =
               site.targets.size() == 2 && site.targets[0].name == "gate_proj" && site.targets[1].name == "up_proj";
           check(first || (site.targets.size() == 1 && site.targets[0].name == "down_proj"),
                 "it stands beside a gated feed-forward layer: the target is [gate_proj, up_proj, down_proj]; for "
                 "attention take `lora`");
           auto& held = site.shared["llava-mole." + std::to_string(site.layer)];
           if (first) {
             const int64_t in = site.targets[0].in;
             const auto rows = site.all.get("router.weight", {c.experts, in}, uniform_init());
             const auto bias = site.all.get("router.bias", {c.experts}, [in](torch::Tensor t) {
               const double bound = 1.0 / std::sqrt(static_cast<double>(in));
               t.uniform_(-bound, bound);
             });
             held = std::make_shared<MoleRouter>(Linear(rows, bias), c.dense, c.gate_weighting, c.coef);
           }
           check(held.has_value(), "gate_proj and up_proj, which route, are no targets");
           std::vector<torch::Tensor> a, b;
           for (const LinearTarget& t : site.targets) {
             a.push_back(site.all.get(t.name + ".lora_A", {c.experts, c.rank, t.in}, uniform_init()));
             b.push_back(site.all.get(t.name + ".lora_B", {c.experts, t.out, c.rank}, constant_init(0.0)));
           }
           return std::make_shared<MoleBeside>(std::any_cast<std::shared_ptr<MoleRouter>>(held), first, a, b,
                                               c.alpha / static_cast<double>(c.rank), c.dropout);
         }}});

}  // namespace
}  // namespace moiety
