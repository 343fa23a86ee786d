#include "moiety/adapt/lora_mixer.h"

#include <torch/torch.h>

#include <algorithm>
#include <map>

#include "moiety/adapt/low_rank.h"
#include "moiety/adapt/peft_experts.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/adapt/soft_router.h"
#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/moe/losses.h"
#include "moiety/moe/pooling.h"
#include "moiety/moe/topk.h"

namespace moiety {

void LoraMixerConfig::fields(Fields& f) {
  f("experts", experts, "experts, one a task; as many as `adapters` where these are given").min(1);
  f("rank", rank, "rank of experts; of brought ones the largest, smaller ones are filled up with zeros").min(1);
  f("alpha", alpha, "what a new expert adds is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what the experts read, while training").min(0).max(0.99);
  f("adapters", adapters, "PEFT adapters that become the experts; a matrix that one lacks gets nothing from it");
  f("freeze_experts", freeze_experts, "the router alone learns");
  f("stage", stage,
    "what trains: hard (a sample trains the expert of its label), soft (router and experts, all experts mixed), "
    "hard_soft "
    "(the best ones, with the gradient of all)")
      .choices({"hard", "soft", "hard_soft"});
  f("top_k", top_k, "experts a token takes outside of training").min(1);
  f("router_scope", router_scope, "a router for every matrix (site), or one for those that read one input (block)")
      .choices({"site", "block"});
  f("sbl_alpha", sbl_alpha, "weight of the balance between experts").min(0);
  f("sbl_lambda", sbl_lambda, "weight of the entropy of a token's weights").min(0);
  f("usage_top_k", usage_top_k, "how many of a token's best experts count as used; 0: top_k").min(0);
  f("entropy_sign", entropy_sign, "published: the entropy rises, as the paper's equation has it; specialize: it falls")
      .choices({"published", "specialize"});
  f("preserve_beta", preserve_beta, "keeps experts near what they were").min(0);
  f("preserve", preserve, "which experts; none named: all");
}

std::string LoraMixerConfig::problem() const {
  for (const int64_t e : preserve)
    if (e < 0 || e >= experts) return fmt::format("preserve: expert {} of {} does not exist", e, experts);
  return "";
}

torch::Tensor mixer_weights(const torch::Tensor& logits, const std::string& mode, int64_t k,
                            const torch::Tensor& labels) {
  const int64_t experts = logits.size(1);
  if (mode == "hard") {
    check(labels.defined(), "hard routing needs the label of every sample: give every source a `label`");
    check(labels.numel() == logits.size(0), "{} rows need as many labels", logits.size(0));
    const auto most = labels.max().item<int64_t>(), least = labels.min().item<int64_t>();
    check(least >= 0 && most < experts, "label {} is no expert: there are 0 to {}", least < 0 ? least : most,
          experts - 1);
    return torch::zeros_like(logits.detach()).scatter_(1, labels.reshape({-1, 1}), 1.0);
  }
  const auto p = torch::softmax(logits, -1);
  if (mode == "soft") return p;
  check(mode == "topk" || mode == "hard_soft", "unknown mode `{}`; known are soft, topk, hard and hard_soft", mode);
  const auto [value, index] = top_k(p, k);
  const auto g = torch::zeros_like(p).scatter(1, index, value / value.sum(-1, true));
  return mode == "topk" ? g : (g - p).detach() + p;
}

SblLoss sbl_loss(const torch::Tensor& logits, const torch::Tensor& real, double alpha, double lambda, int64_t k,
                 const std::string& sign) {
  check(sign == "published" || sign == "specialize", "unknown entropy_sign `{}`; known are published and specialize",
        sign);
  TokenGroups groups;
  groups.real = real;
  const auto p = torch::softmax(logits, -1);
  const Load load = load_of(top_k(p.detach(), k).second, p, groups);
  SblLoss out;
  out.usage = (load.counts / load.counts.sum()).squeeze(0).to(p.scalar_type());
  out.balance = (load.probability.squeeze(0) * out.usage).sum();
  out.entropy = entropy_loss(logits, groups);
  out.loss = alpha * out.balance + (sign == "published" ? -lambda : lambda) * out.entropy;
  return out;
}

torch::Tensor preserve_loss(const std::vector<torch::Tensor>& now, const std::vector<torch::Tensor>& before,
                            const std::vector<int64_t>& of, double beta) {
  check(now.size() == before.size() && !now.empty(), "there is nothing to preserve");
  auto sum = torch::zeros({}, now[0].options().requires_grad(false));
  for (size_t i = 0; i < now.size(); ++i)
    for (const int64_t e : of) sum = sum + (now[i][e] - before[i][e]).square().sum();
  return beta * sum;
}

LoraMixer::LoraMixer(std::vector<Target> targets, const LoraMixerConfig& config)
    : targets_(std::move(targets)), config_(config) {
  const int64_t experts = targets_.at(0).router->out();
  config_.top_k = std::min(config_.top_k, experts);
  if (config_.usage_top_k == 0) config_.usage_top_k = config_.top_k;
  check(config_.usage_top_k <= experts, "usage_top_k is {}, and there are {} experts", config_.usage_top_k, experts);
  if (config_.preserve.empty())
    for (int64_t e = 0; e < experts; ++e) config_.preserve.push_back(e);
  for (size_t i = 0; i < targets_.size(); ++i) {
    Target& t = targets_[i];
    check(t.a.size(0) == experts && t.b.size(0) == experts && t.scale.size(0) == experts,
          "the router has {} rows; A, B and scales have {}, {} and {}", experts, t.a.size(0), t.b.size(0),
          t.scale.size(0));
    const std::string last = targets_.size() == 1 ? "" : std::to_string(i);
    if (i == 0 || t.router.get() != targets_[0].router.get()) register_module("router" + last, t.router);
    t.a = register_parameter("lora_A" + last, t.a, t.a.requires_grad());
    t.b = register_parameter("lora_B" + last, t.b, t.b.requires_grad());
    t.scale = register_buffer("scale" + last, t.scale.detach());
    if (config_.preserve_beta > 0.0)
      for (const auto& [name, p] : std::map<std::string, torch::Tensor>{{"start_A", t.a}, {"start_B", t.b}})
        start_.push_back(register_buffer(name + last, p.detach().clone()));
  }
}

bool LoraMixer::set_active(int64_t k) {
  const int64_t experts = targets_[0].router->out();
  check(k >= 1 && k <= experts, "{} active experts are impossible: there are {} to choose from", k, experts);
  config_.top_k = k;
  return true;
}

std::string LoraMixer::mode(const Pass& pass) const {
  if (pass.training) return config_.stage;
  return config_.stage == "hard" && pass.labels.defined() ? "hard" : "topk";
}

void LoraMixer::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  const auto flat = x.reshape({-1, x.size(-1)});
  const std::string how = mode(pass);
  torch::Tensor labels;
  if (how == "hard" && pass.labels.defined())
    labels = pass.labels.unsqueeze(1).expand({pass.labels.size(0), flat.size(0) / pass.labels.size(0)}).reshape({-1});
  const auto v = dropped(x, config_.dropout, pass.training);
  torch::Tensor logits, weights;
  for (size_t i = 0; i < targets_.size(); ++i) {
    Target& t = targets_[i];
    const Site site = pass.at(t.site);
    const int64_t experts = t.router->out();
    const bool decides = i == 0 || t.router.get() != targets_[0].router.get();
    if (decides) {
      logits = t.router(router_input(flat));
      for (const auto& edit : pass.edits) edit->logits(site, pass, logits);
      weights = mixer_weights(logits, how, config_.top_k, labels);
      if (pass.training && config_.stage != "hard" && (config_.sbl_alpha > 0.0 || config_.sbl_lambda > 0.0)) {
        // The mean over routers.
        const auto sbl = sbl_loss(logits, token_groups(pass, flat.size(0), false).real, config_.sbl_alpha,
                                  config_.sbl_lambda, config_.usage_top_k, config_.entropy_sign);
        pool(pass, "lora-mixer.sbl", sbl.loss.reshape({1}));
        pass.at_end("lora-mixer.sbl",
                    [](Pass& p) { p.add_loss("lora-mixer.sbl", pooled(p, "lora-mixer.sbl").mean()); });
      }
    }
    outputs[i] = add_low_rank(outputs[i], v, joined_a(t.a), joined_b(t.b), weights * t.scale, 1.0);
    if (pass.trace) {
      Routing r{every_expert(flat.size(0), experts, weights.device()), weights, torch::softmax(logits, -1), logits};
      r.experts = r.experts.masked_fill(weights == 0, -1);
      report_beside(pass, site, r, experts, flat, outputs[i]);
    }
    if (pass.training && config_.stage != "hard" && !start_.empty())
      pass.add_loss("lora-mixer.preserve", preserve_loss({t.a, t.b}, {start_[2 * i], start_[2 * i + 1]},
                                                         config_.preserve, config_.preserve_beta));
  }
}

torch::Tensor LoraMixer::merged(const torch::Tensor& weight, int64_t place) const {
  const Target& t = targets_.at(static_cast<size_t>(place));
  if (t.a.size(0) != 1) return Beside::merged(weight, place);
  const torch::NoGradGuard frozen;
  return torch::addmm(weight, t.b[0].to(torch::kFloat32), t.a[0].to(torch::kFloat32), 1.0, t.scale[0].item<double>());
}

namespace {

const RegisterMethod registered(
    {.slug = "lora-mixer",
     .kind = "part",
     .title = "LoRA-Mixer",
     .summary = "LoRAs of tasks, trained apart or brought along, mixed by a router that learns from little data",
     .paper = {"LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing", "Li et al.", 2025,
               "2507.00029"},
     .sites = {"linear"},
     .config = describe<LoraMixerConfig>,
     .make = MakeBeside{
         .per_input = true, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           auto c = parse<LoraMixerConfig>(settings, "lora-mixer");
           if (site.layer == 0 && site.targets[0].name == "q_proj" && c.top_k > c.experts && c.adapters.empty())
             log::warn("lora-mixer: top_k is {}, and there are {} experts: a token takes all", c.top_k, c.experts);
           if (!c.adapters.empty()) c.experts = static_cast<int64_t>(c.adapters.size());
           if (c.experts == 1 && site.layer == 0 && c.stage != "hard" && site.targets[0].name == "q_proj")
             log::warn("lora-mixer: with one expert its balance loss says nothing");
           std::string place;
           for (const LinearTarget& t : site.targets) place += (place.empty() ? "" : "+") + t.name;
           Linear shared{nullptr};
           if (c.router_scope == "block")
             shared = site.all.linear(place + ".router", site.targets[0].in, c.experts, false, normal_init(0.02));
           std::vector<LoraMixer::Target> targets;
           for (const LinearTarget& t : site.targets) {
             LoraMixer::Target out;
             out.site = t.name;
             out.router = shared.is_empty()
                              ? site.all.linear(t.name + ".router", t.in, c.experts, false, normal_init(0.02))
                              : shared;
             // What is brought along is read when the experts are not in the checkpoint yet.
             const bool bring = !c.adapters.empty() && !site.all.has(t.name + ".experts.lora_A");
             PeftExperts brought;
             if (bring) brought = read_peft_experts(c.adapters, t.path, t.in, t.out, c.rank);
             const auto from = [&](const torch::Tensor& own, const Init& otherwise) {
               return bring ? Init([own](torch::Tensor to) { to.copy_(own); }) : otherwise;
             };
             out.a =
                 site.all.get(t.name + ".experts.lora_A", {c.experts, c.rank, t.in}, from(brought.a, uniform_init()));
             out.b = site.all.get(t.name + ".experts.lora_B", {c.experts, t.out, c.rank},
                                  from(brought.b, constant_init(0.0)));
             out.scale = site.all.get(t.name + ".experts.scale", {c.experts},
                                      from(brought.scale, constant_init(c.alpha / static_cast<double>(c.rank))));
             if (c.freeze_experts) {
               out.a = out.a.detach();
               out.b = out.b.detach();
             }
             targets.push_back(std::move(out));
           }
           return std::make_shared<LoraMixer>(std::move(targets), c);
         }}});

}  // namespace
}  // namespace moiety
