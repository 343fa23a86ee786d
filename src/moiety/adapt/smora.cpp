#include "moiety/adapt/smora.h"

#include <torch/torch.h>

#include "moiety/adapt/low_rank.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/adapt/soft_router.h"
#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"

namespace moiety {

void SmoraConfig::fields(Fields& f) {
  f("rank", rank, "ranks in all").min(1);
  f("active", active, "ranks that a token takes").min(1);
  f("block", block, "ranks that are routed together").min(1);
  f("alpha", alpha, "what is added is multiplied by alpha / active").min(0);
  f("dropout", dropout, "on what ranks and router read, while training").min(0).max(0.99);
  f("bias_rate", bias_rate, "the bias on scores moves by this towards less used ranks at every training pass").min(0);
  f("bias_in_gate", bias_in_gate, "the bias is part of the gates, too; false: of the choice alone");
}

std::string SmoraConfig::problem() const {
  if (active > rank) return fmt::format("active is {}, and there are {} ranks", active, rank);
  if (rank % block != 0) return fmt::format("{} ranks are no multiple of a block of {}", rank, block);
  if (active % block != 0) return fmt::format("{} active ranks are no multiple of a block of {}", active, block);
  return "";
}

RankChoice smora_choose(const torch::Tensor& logits, const torch::Tensor& bias, int64_t active, bool bias_in_gate) {
  const int64_t ranks = bias.size(0);
  check(ranks % logits.size(1) == 0, "{} router rows do not divide {} ranks", logits.size(1), ranks);
  const auto q = torch::sigmoid(logits).repeat_interleave(ranks / logits.size(1), 1);
  const auto by = q + bias;
  RankChoice out;
  out.indices = top_k(by.detach(), active).second;
  const auto kept = (bias_in_gate ? by : q).gather(1, out.indices);
  auto sum = kept.sum(1, true);
  sum = torch::where(sum.abs() < 1e-9, torch::where(sum < 0, -1e-9, 1e-9).to(sum.scalar_type()), sum);
  out.gates = kept / sum * static_cast<double>(active);
  return out;
}

Smora::Smora(std::string site, Linear router, torch::Tensor a, torch::Tensor b, torch::Tensor bias,
             const SmoraConfig& config)
    : site_(std::move(site)), config_(config), bias_(register_buffer("bias", bias.detach()), config.bias_rate) {
  router_ = register_module("router", std::move(router));
  a_ = register_parameter("lora_A", a, a.requires_grad());
  b_ = register_parameter("lora_B", b, b.requires_grad());
  check(bias.size(0) == a.size(0) && a.size(0) == b.size(1), "A has {} ranks, B {}, the bias {}", a.size(0), b.size(1),
        bias.size(0));
  check(config.active >= 1 && config.active <= a.size(0), "{} of {} ranks cannot be active", config.active, a.size(0));
}

bool Smora::set_active(int64_t k) {
  auto other = config_;
  other.active = k;
  const auto problem = other.problem();
  check(k >= 1 && problem.empty(), "{} active ranks are impossible: {}", k,
        problem.empty() ? "at least one is needed" : problem);
  config_ = other;
  return true;
}

void Smora::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  const auto v = dropped(x, config_.dropout, pass.training);
  const auto flat = v.reshape({-1, v.size(-1)});
  const Site site = pass.at(site_);
  Routing r;
  r.logits = router_(router_input(flat));
  for (const auto& edit : pass.edits) edit->logits(site, pass, r.logits);
  const auto choice = smora_choose(r.logits, bias_.now(pass), config_.active, config_.bias_in_gate);
  r.experts = choice.indices;
  r.gates = choice.gates;
  // A column a rank, as the choice has it.
  r.scores = torch::sigmoid(r.logits).repeat_interleave(a_.size(0) / r.logits.size(1), 1);
  for (const auto& edit : pass.edits) edit->choice(site, pass, r);
  if (pass.training) bias_.move(r.experts, pass);
  auto& y = outputs.at(0);
  y = add_low_rank(y, v, a_, b_, gate_table(r, a_.size(0)), config_.alpha / static_cast<double>(config_.active));
  report_beside(pass, site, r, a_.size(0), flat, y);
}

SmoraBlocks smora_blocks(const torch::Tensor& x, const torch::Tensor& a, const torch::Tensor& b,
                         const torch::Tensor& gates) {
  SmoraBlocks out;
  const auto zero = [&] {
    auto shape = x.sizes().vec();
    shape.back() = b.size(1);
    return torch::zeros(shape, x.options());
  };
  const auto table = gates.reshape({-1, gates.size(-1)});
  Routing all{torch::arange(gates.size(-1), torch::kInt64).expand_as(table), table, table, table};
  out.by_experts = add_routed(zero(), x, a, b, all, 1.0);
  out.a = joined_a(a);
  out.b = joined_b(b);
  out.by_ranks = add_low_rank(zero(), x, out.a, out.b, table.repeat_interleave(a.size(1), 1), 1.0);
  return out;
}

namespace {

const RegisterMethod registered(
    {.slug = "smora",
     .kind = "part",
     .title = "SMoRA",
     .summary = "every rank of one LoRA is an expert; a router gives each token some of them",
     .paper = {"Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
               "Zhao et al.", 2025, "2501.15103"},
     .sites = {"linear"},
     .config = describe<SmoraConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<SmoraConfig>(settings, "smora");
           const LinearTarget& t = site.targets.at(0);
           // Saved without the balance, it starts anew.
           if (site.own.has("lora_A") && !site.own.has("bias") && site.shared.emplace("smora.lacks_bias", true).second)
             log::warn("smora: the adapter was saved without its balance bias ({}): zeros are used", t.path);
           const auto router = site.own.linear("router", t.in, c.rank / c.block, false, uniform_init());
           const auto a = site.own.get("lora_A", {c.rank, t.in}, uniform_init()),
                      b = site.own.get("lora_B", {t.out, c.rank}, constant_init(0.0)),
                      bias = site.own.optional("bias", {c.rank}, constant_init(0.0));
           return std::make_shared<Smora>(t.name, router, a, b, bias, c);
         }}});

}  // namespace
}  // namespace moiety
