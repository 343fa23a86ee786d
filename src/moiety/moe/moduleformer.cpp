#include "moiety/moe/moduleformer.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/part.h"

namespace moiety {
namespace {

constexpr double kEpsilon = 1e-8;

torch::Tensor entropy_of_mean(const torch::Tensor& p) {
  const auto mean = p.mean(0);
  return -(mean * (mean + kEpsilon).log()).sum();
}

// What is added to trained modules, under the name by which runs find it.
struct Added : torch::nn::Module {
  void add(const std::string& name, const torch::Tensor& t) { register_parameter(name, t, t.requires_grad()); }
};

// A stack and those behind it; the second may be empty.
torch::Tensor apply_both(LinearStack& first, LinearStack& second, const torch::Tensor& x,
                         const std::vector<int64_t>& counts) {
  if (second.is_empty()) return apply_stack(first, x, counts);
  const auto split = counts.begin() + first->count();
  const std::vector<int64_t> old(counts.begin(), split), added(split, counts.end());
  const int64_t rows = std::accumulate(old.begin(), old.end(), int64_t{0});
  return torch::cat(
      {apply_stack(first, x.narrow(0, 0, rows), old), apply_stack(second, x.narrow(0, rows, x.size(0) - rows), added)});
}

torch::Tensor rows_of(const torch::Tensor& t, const torch::Tensor& real) {
  return real.defined() ? t.index_select(0, real.nonzero().squeeze(1)) : t;
}

}  // namespace

torch::Tensor moduleformer_loss(const std::string& kind, const torch::Tensor& all_logits,
                                const torch::Tensor& all_choices, const torch::Tensor& all_gates,
                                const torch::Tensor& real) {
  const auto logits = rows_of(all_logits, real);
  if (logits.size(0) == 0) return logits.sum();
  const auto log_p = torch::log_softmax(logits, -1), p = log_p.exp();
  if (kind == "concentration") return entropy_of_mean(p);
  if (kind == "mi") return -((p * log_p).sum(-1).mean() + entropy_of_mean(p));
  check(kind == "switch", "unknown auxiliary loss `{}`; known are mi, switch and concentration", kind);
  const int64_t count = logits.size(1);
  torch::Tensor used;
  {
    torch::NoGradGuard no_grad;
    const auto choices = rows_of(all_choices, real);
    const auto on = (rows_of(all_gates, real) > 0) & (choices >= 0);
    used = torch::zeros({count}, p.options())
               .index_add_(0, choices.clamp_min(0).reshape({-1}), on.reshape({-1}).to(p.scalar_type()));
  }
  const auto mass = p.sum(0);
  const auto balance = static_cast<double>(count) * (mass / mass.sum() * (used / used.sum().clamp_min(1.0))).sum();
  return balance + 0.1 * logits.logsumexp(-1).square().mean();
}

ModuleGate::ModuleGate(Weights w, int64_t top_k, std::string loss, double coef, int64_t sample)
    : w_(std::move(w)), top_k_(top_k), sample_top_k_(sample), loss_(std::move(loss)), coef_(coef) {
  const auto need = [&](bool wanted, const torch::Tensor& t, const char* name) {
    check(t.defined() == wanted, "a gate of type {} {} the tensor `{}`", w_.type, wanted ? "needs" : "does not have",
          name);
  };
  check(w_.type == "mlp" || w_.type == "linear" || w_.type == "gmm",
        "unknown gate type `{}`; known are mlp, linear and gmm", w_.type);
  const bool mlp = w_.type == "mlp", gmm = w_.type == "gmm";
  need(mlp || gmm, w_.w1, "w1");
  need(mlp, w_.b1, "b1");
  need(!gmm, w_.w2, "w2");
  need(gmm, w_.centroids, "centroids");
  need(gmm, w_.temperature, "temperature");
  const auto& rows = gmm ? w_.centroids : w_.w2;
  count_ = rows.size(0);
  if (w_.added.defined()) {
    check(w_.added.dim() == 2 && w_.added.size(1) == rows.size(1), "rows of {} numbers are added to rows of {}",
          w_.added.size(-1), rows.size(1));
    count_ += w_.added.size(0);
    auto added = std::make_shared<Added>();
    added->add("weight", w_.added);
    register_module("new", added);
  }
  check(top_k >= 1 && top_k <= count_, "a gate of {} modules cannot choose {}", count_, top_k);
  check(sample >= 0 && sample <= top_k, "of {} chosen modules {} cannot be drawn", top_k, sample);
  for (const auto& [name, t] : {std::pair{"w1", w_.w1},
                                {"b1", w_.b1},
                                {"w2", w_.w2},
                                {"centroids", w_.centroids},
                                {"temperature", w_.temperature}})
    if (t.defined()) register_parameter(name, t, t.requires_grad());
}

torch::Tensor ModuleGate::logits(const torch::Tensor& input) const {
  const auto x = input.to(torch::kFloat32);
  const auto all = [&](const torch::Tensor& rows) { return w_.added.defined() ? torch::cat({rows, w_.added}) : rows; };
  if (w_.type == "linear") return torch::linear(x, all(w_.w2));
  if (w_.type == "mlp") {
    const auto h = torch::gelu(torch::linear(x, w_.w1, w_.b1));
    return torch::linear(dropout > 0.0 ? torch::dropout(h, dropout, is_training()) : h, all(w_.w2));
  }
  const auto unit = [](const torch::Tensor& t) {
    return torch::nn::functional::normalize(t, torch::nn::functional::NormalizeFuncOptions().dim(-1).eps(1e-12));
  };
  return torch::linear(unit(torch::linear(x, w_.w1)), unit(all(w_.centroids))) * w_.temperature.exp();
}

Routing ModuleGate::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = logits(x);
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  if (pass.training && sample_top_k_ > 0) {
    torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> parts;
    auto left = r.scores.detach() + 1e-6;
    if (sample_top_k_ < top_k_) {
      parts.push_back(top_k(r.scores, top_k_ - sample_top_k_).second);
      left = left.scatter(1, parts[0], 0.0);
    }
    parts.push_back(torch::multinomial(left, sample_top_k_));
    r.experts = torch::cat(parts, 1);
  } else {
    r.experts = top_k(r.scores, top_k_).second;
  }
  r.gates = r.scores.gather(1, r.experts);
  r = finish(std::move(r), site, pass);
  if (pass.training && coef_ != 0.0 && !loss_.empty()) {
    const auto groups = token_groups(pass, x.size(0), false);
    pass.add_loss("moduleformer." + loss_, coef_ * moduleformer_loss(loss_, r.logits, r.experts, r.gates, groups.real));
  }
  if (pass.training && w_.added.defined() && added_decay > 0.0)
    pass.add_loss("moduleformer.added", added_decay * w_.added.square().sum());
  return r;
}

StickBreaking stick_breaking_attention(const torch::Tensor& q, const torch::Tensor& keys, const torch::Tensor& values,
                                       const torch::Tensor& mask, bool keep_weights) {
  const int64_t batch = q.size(0), time = q.size(1), modules = q.size(2), heads = q.size(3), size = q.size(4);
  const int64_t context = keys.size(1);
  check(context >= time, "{} queries cannot be the last of {} positions", time, context);
  // The last key comes first: what the later keys leave of the stick is then a running sum. [B, k, heads, T, C], keys
  // are shared by the modules.
  const auto queries = q.to(torch::kFloat32).permute({0, 2, 3, 1, 4}) * (1.0 / std::sqrt(static_cast<double>(size)));
  const auto k = keys.flip(1).to(torch::kFloat32).permute({0, 2, 3, 1}).unsqueeze(1);
  const auto v = values.flip(1).to(torch::kFloat32).permute({0, 2, 1, 3}).unsqueeze(1);
  const auto logits = torch::matmul(queries, k);
  const auto at = torch::arange(context, torch::TensorOptions(torch::kInt64).device(q.device()));
  auto seen = at.unsqueeze(0) <= at.slice(0, context - time).unsqueeze(1);  // [T, C]
  if (mask.defined())
    seen = seen & (mask.dim() == 2 ? mask.view({batch, 1, 1, 1, context}) : mask.unsqueeze(1)).to(torch::kBool);
  const auto unseen = ~seen.flip(-1);
  // An unseen key neither takes nor breaks: beta = 0, log(1 - beta) = 0. log beta = logit + log(1 - beta), so that
  // beta_j times what is left when key j is reached is exp(logit_j + the sum up to j itself).
  const auto rest = torch::log_sigmoid(-logits).masked_fill(unseen, 0.0).cumsum(-1);
  const auto weights = (logits + rest).masked_fill(unseen, -std::numeric_limits<float>::infinity()).exp();
  StickBreaking out;
  out.output =
      torch::matmul(weights, v).permute({0, 3, 1, 2, 4}).reshape({batch, time, modules, heads, -1}).to(q.scalar_type());
  if (keep_weights) out.weights = weights.flip(-1);
  return out;
}

ModuleAttention::ModuleAttention(Parts p) : parts(std::move(p)) {
  const int64_t a = parts.q->out();
  check(parts.heads >= 1 && a % parts.heads == 0, "modules of width {} cannot be shared by {} heads", a, parts.heads);
  check(parts.k.is_empty() == parts.v.is_empty(), "keys and values are both projected or neither");
  check(!parts.k.is_empty() || (parts.heads == 1 && a == parts.q->in()),
        "keys and values that are not projected need one head as wide as the model");
  check(parts.o->in() == a, "output modules take {} features, query modules give {}", parts.o->in(), a);
  register_module("gate", parts.gate);
  register_module("q_proj", parts.q);
  register_module("o_proj", parts.o);
  if (!parts.added_q.is_empty()) {
    auto added = std::make_shared<Added>();
    added->register_module("q_proj", parts.added_q);
    added->register_module("o_proj", parts.added_o);
    register_module("new", added);
  }
  if (!parts.k.is_empty()) {
    register_module("k_proj", parts.k);
    register_module("v_proj", parts.v);
  }
}

torch::Tensor ModuleAttention::project(Linear& linear, const torch::Tensor& x) {
  return linear.is_empty() ? x : linear(x);
}

torch::Tensor ModuleAttention::attend(const torch::Tensor& x, const torch::Tensor& keys, const torch::Tensor& values,
                                      const torch::Tensor& mask, Pass& pass) {
  const int64_t batch = x.size(0), time = x.size(1), a = parts.q->out(), context = keys.size(1);
  pass.batch = batch;
  const auto flat = x.reshape({-1, x.size(-1)});
  const Site site = pass.at("attention");
  const Routing routing = parts.gate->route(flat, site, pass);
  const int64_t slots = routing.experts.size(1);
  const Dispatch d = Dispatch::of(routing, parts.gate->experts());
  if (pass.trace) {
    Trace::Record record{.site = site, .routing = routing, .input = {}, .output = {}, .real = {}};
    if (pass.trace->keep_inputs) record.input = flat;
    record.experts = parts.gate->experts();
    if (pass.mask.defined()) record.real = pass.mask.reshape({-1});
    pass.trace->add(std::move(record));
  }
  // Out to the modules for the queries, back into the order of tokens for attention, out again for the outputs.
  const auto pairs = apply_both(parts.q, parts.added_q, d.gather(flat), d.counts);
  const auto q = torch::zeros({batch * time * slots, a}, pairs.options()).index_copy(0, d.slots, pairs);
  const int64_t size = a / parts.heads;
  const auto heads = [&](const torch::Tensor& t) { return t.reshape({batch, context, parts.heads, size}); };
  const auto y = stick_breaking_attention(q.view({batch, time, slots, parts.heads, size}), heads(keys), heads(values),
                                          mask, /*keep_weights=*/false);
  const auto rows = y.output.reshape({-1, a}).index_select(0, d.slots);
  return d.reduce(apply_both(parts.o, parts.added_o, rows, d.counts), flat.size(0)).view({batch, time, -1});
}

torch::Tensor ModuleAttention::forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) {
  auto k = project(parts.k, x).unsqueeze(1), v = project(parts.v, x).unsqueeze(1);
  if (pass.cache) std::tie(k, v) = pass.cache->append(pass.slot, k, v);
  return attend(x, k.squeeze(1), v.squeeze(1), context.allowed(0), pass);
}

torch::Tensor ModuleAttention::forward(const torch::Tensor& x, torch::Tensor& past_k, torch::Tensor& past_v,
                                       const torch::Tensor& mask, Pass& pass) {
  const auto with_past = [](torch::Tensor& past, const torch::Tensor& fresh) {
    past = past.defined() ? torch::cat({past, fresh}, 1) : fresh;
  };
  with_past(past_k, project(parts.k, x));
  with_past(past_v, project(parts.v, x));
  return attend(x, past_k, past_v, mask, pass);
}

GrownExperts::GrownExperts(std::shared_ptr<Experts> old, std::shared_ptr<Experts> added) {
  old_ = register_module("old", std::move(old));
  added_ = register_module("new", std::move(added));
}

torch::Tensor GrownExperts::forward(const torch::Tensor& x, const std::vector<int64_t>& counts) {
  const auto split = counts.begin() + old_->count();
  const std::vector<int64_t> old(counts.begin(), split), added(split, counts.end());
  const int64_t rows = std::accumulate(old.begin(), old.end(), int64_t{0});
  return torch::cat(
      {old_->forward(x.narrow(0, 0, rows), old), added_->forward(x.narrow(0, rows, x.size(0) - rows), added)});
}

ModulePruning module_pruning(const torch::Tensor& logits, int64_t k, double tau) {
  check(tau >= 0.0 && tau <= 1.0, "tau is {}; it must lie between 0 and 1", tau);
  const auto load = load_of(top_k(logits, k).second, torch::softmax(logits, -1));
  ModulePruning out;
  out.frequency = (load.counts / load.tokens.clamp_min(1.0).unsqueeze(1)).squeeze(0);
  out.keep = out.frequency >= tau;
  return out;
}

Routing pruned_choice(const torch::Tensor& logits, const torch::Tensor& keep, int64_t k) {
  const auto kept = keep.nonzero().squeeze(1);
  check(kept.numel() >= k, "only {} of {} modules are kept, but {} are chosen for every token", kept.numel(),
        keep.numel(), k);
  Routing r;
  r.logits = logits.index_select(1, kept);
  r.scores = torch::softmax(r.logits, -1);
  std::tie(r.gates, r.experts) = top_k(r.scores, k);
  return r;
}

namespace {

struct ModuleFormerConfig {
  int64_t modules = 32, top_k = 2, width = 0, gating_size = 256, heads = 1;
  std::string gate_type = "mlp", aux_loss = "mi";
  double aux_loss_weight = 1e-3, gate_dropout = 0.0;
  int64_t sample_top_k = 0, new_modules = 0;
  double new_gate_decay = 1e-2;
  void fields(Fields& f) {
    f("modules", modules, "modules of a mixture").min(1);
    f("top_k", top_k, "modules a token").min(1);
    f("width", width,
      "hidden units of one module (ffn; 0: the dense layer's width over top_k) or width of its queries (attention; 0: "
      "the model's "
      "over 2)")
        .min(0);
    f("gating_size", gating_size, "width of the gate").min(1);
    f("heads", heads, "heads of one attention module").min(1);
    f("gate_type", gate_type, "form of the gate").choices({"mlp", "linear", "gmm"});
    f("aux_loss", aux_loss, "what makes modules specialise").choices({"mi", "switch", "concentration"});
    f("aux_loss_weight", aux_loss_weight, "weight of that loss").min(0);
    f("gate_dropout", gate_dropout, "dropout inside a gate of type mlp").min(0).max(0.99);
    f("sample_top_k", sample_top_k, "how many of the chosen modules are drawn while training").min(0);
    f("new_modules", new_modules,
      "modules that are added to the trained ones for something new: with their rows of the gate they learn, all "
      "else is frozen unless the run says what learns")
        .min(0);
    f("new_gate_decay", new_gate_decay,
      "weight of the squared norm of the new rows of the gate, which keeps new modules from taking all tokens")
        .min(0);
  }
  std::string problem() const {
    if (top_k > modules + new_modules)
      return fmt::format("`top_k` is {}, but there are {} modules", top_k, modules + new_modules);
    if (sample_top_k > top_k) return fmt::format("`sample_top_k` {} is above `top_k` {}", sample_top_k, top_k);
    return "";
  }
};

std::shared_ptr<ModuleGate> gate_at(PartSite& site, const ModuleFormerConfig& c) {
  const Init init = normal_init(site.init_std);
  ModuleGate::Weights w;
  w.type = c.gate_type;
  if (c.gate_type == "linear") {
    w.w2 = site.own.get("gate.w_gate.weight", {c.modules, site.hidden}, init);
  } else if (c.gate_type == "mlp") {
    w.w1 = site.own.get("gate.w_gate.0.weight", {c.gating_size, site.hidden}, init);
    w.b1 = site.own.get("gate.w_gate.0.bias", {c.gating_size}, constant_init(0.0));
    w.w2 = site.own.get("gate.w_gate.3.weight", {c.modules, c.gating_size}, init);
  } else {
    w.w1 = site.own.get("gate.w_gate.weight", {c.gating_size, site.hidden}, init);
    w.centroids = site.own.get("gate.expert_centroids", {c.modules, c.gating_size}, normal_init(1.0));
    w.temperature = site.own.get("gate.temperature", {1}, constant_init(0.0));
  }
  if (c.new_modules > 0) {
    const bool gmm = c.gate_type == "gmm";
    w.added = site.own.get("new.gate.weight", {c.new_modules, c.gate_type == "linear" ? site.hidden : c.gating_size},
                           gmm ? normal_init(1.0) : init);
  }
  auto gate = std::make_shared<ModuleGate>(w, c.top_k, c.aux_loss, c.aux_loss_weight, c.sample_top_k);
  gate->dropout = c.gate_dropout;
  gate->added_decay = c.new_gate_decay;
  return gate;
}

// U(-1 / fan_in, 1 / fan_in), the fan-in itself and not its root.
Init module_init() {
  return [](torch::Tensor t) {
    const double bound = 1.0 / static_cast<double>(t.size(-1));
    t.uniform_(-bound, bound);
  };
}

const RegisterMethod registered_modules(
    {.slug = "moduleformer",
     .kind = "part",
     .title = "ModuleFormer",
     .summary = "a mixture of plain feed-forward modules that a mutual-information loss makes specialise",
     .paper = {"ModuleFormer: Modularity Emerges from Mixture-of-Experts", "Shen et al.", 2023, "2306.04640"},
     .sites = {"ffn"},
     .config = describe<ModuleFormerConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<ModuleFormerConfig>(settings, "moduleformer");
       const int64_t width = c.width > 0 ? c.width : std::max<int64_t>(1, site.width / c.top_k);
       auto gate = gate_at(site, c);
       auto w1 = site.own.stack("experts.weight", c.modules, site.hidden, width, false, module_init());
       auto w2 = site.own.stack("output_experts.weight", c.modules, width, site.hidden, false, module_init());
       std::shared_ptr<Experts> experts = std::make_shared<MlpExperts>(w1, w2, activation("gelu_new"));
       if (c.new_modules > 0) {
         auto n1 = site.own.stack("new.experts.weight", c.new_modules, site.hidden, width, false, module_init());
         auto n2 = site.own.stack("new.output_experts.weight", c.new_modules, width, site.hidden, false, module_init());
         experts =
             std::make_shared<GrownExperts>(experts, std::make_shared<MlpExperts>(n1, n2, activation("gelu_new")));
       }
       return std::make_shared<Mixture>(gate, experts);
     })});

const RegisterMethod registered_attention(
    {.slug = "moduleformer-attention",
     .kind = "part",
     .title = "ModuleFormer attention",
     .summary = "a mixture of stick-breaking attention modules that share keys and values",
     .paper = {"ModuleFormer: Modularity Emerges from Mixture-of-Experts", "Shen et al.", 2023, "2306.04640"},
     .sites = {"attention"},
     .config = describe<ModuleFormerConfig>,
     .make = MakeAttention([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<AttentionBase> {
       const auto c = parse<ModuleFormerConfig>(settings, "moduleformer-attention");
       const int64_t width = c.width > 0 ? c.width : std::max<int64_t>(c.heads, site.hidden / 2);
       ModuleAttention::Parts parts;
       parts.gate = gate_at(site, c);
       parts.q = site.own.stack("q_proj.experts.weight", c.modules, site.hidden, width, false, module_init());
       parts.o = site.own.stack("q_proj.output_experts.weight", c.modules, width, site.hidden, false, module_init());
       if (c.new_modules > 0) {
         parts.added_q = site.own.stack("new.experts.weight", c.new_modules, site.hidden, width, false, module_init());
         parts.added_o =
             site.own.stack("new.output_experts.weight", c.new_modules, width, site.hidden, false, module_init());
       }
       parts.k = site.own.linear("k_proj", site.hidden, width, true, normal_init(site.init_std));
       parts.v = site.own.linear("v_proj", site.hidden, width, true, normal_init(site.init_std));
       parts.heads = c.heads;
       return std::make_shared<ModuleAttention>(std::move(parts));
     })});

}  // namespace
}  // namespace moiety
