#include "moiety/moe/widenet.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"
#include "moiety/nn/recompute.h"

namespace moiety {

void WideNetConfig::fields(Fields& f) {
  f("experts", experts, "experts that all blocks share").min(1);
  f("top_k", top_k, "experts a token").min(1);
  f("capacity_factor", capacity_factor, "places of an expert over its even share").min(1e-9);
  f("balance_coef", balance_coef, "weight of the balance loss").min(0);
  f("noise", noise, "noise on the router's logits while training");
  f("output_activation", output_activation, "activation behind an expert's second layer").choices({"none", "gelu"});
  f("unlimited", unlimited,
    "every token has its experts, whatever capacity_factor says: nothing depends on what else is in the batch");
  f("official_capacity", official_capacity, "one place less an expert, as the official code counts");
  f("dropout", dropout, "dropout behind attention and both layers of an expert").min(0).max(0.99);
}

std::string WideNetConfig::problem() const {
  return top_k > experts ? fmt::format("`top_k` is {}, but there are {} experts", top_k, experts) : "";
}

CapacityRouter::CapacityRouter(Linear p, WideNetConfig c) : config(std::move(c)) {
  check(config.top_k >= 1 && config.top_k <= p->out(), "a router of {} experts cannot choose {}", p->out(),
        config.top_k);
  check(config.capacity_factor > 0.0, "the capacity factor {} is not above 0", config.capacity_factor);
  projection = register_module("projection", std::move(p));
  losses.push_back(std::make_shared<ExpertBalance>("widenet.balance", config.balance_coef, false));
}

int64_t CapacityRouter::capacity(int64_t tokens) const {
  if (config.unlimited) return tokens;
  return expert_capacity(tokens, config.top_k, experts(), config.capacity_factor);
}

Routing CapacityRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = projection(x.to(torch::kFloat32));
  if (pass.training && config.noise) {
    const auto draw = noise.defined() ? noise : torch::randn_like(r.logits);
    r.logits = r.logits + draw / static_cast<double>(experts());
  }
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  const auto [value, index] = top_k(r.scores, config.top_k);
  r.experts = index;
  r.gates = value;
  // The loss counts what was wanted, so it comes before the places run out.
  r = finish(std::move(r), site, pass);
  const int64_t places = capacity(x.size(0));
  if (config.unlimited) return r;
  return limit_capacity(r, experts(), std::max<int64_t>(0, config.official_capacity ? places - 1 : places));
}

BidirectionalAttention::BidirectionalAttention(Linear a, Linear b, Linear c, Linear d, int64_t heads) : heads_(heads) {
  check(heads >= 1 && a->out() % heads == 0, "{} features cannot be shared by {} heads", a->out(), heads);
  q = register_module("q", std::move(a));
  k = register_module("k", std::move(b));
  v = register_module("v", std::move(c));
  o = register_module("o", std::move(d));
}

torch::Tensor BidirectionalAttention::forward(const torch::Tensor& x, Pass& pass) {
  const int64_t rows = x.size(0), time = x.size(1);
  const auto split = [&](const torch::Tensor& t) { return t.view({rows, time, heads_, -1}).transpose(1, 2); };
  const auto allowed = pass.mask.defined()
                           ? std::optional<torch::Tensor>(pass.mask.to(torch::kBool).view({rows, 1, 1, time}))
                           : std::nullopt;
  const auto read = project({q, k, v}, x, pass);
  const auto y = at::scaled_dot_product_attention(split(read[0]), split(read[1]), split(read[2]), allowed);
  return project(o, y.transpose(1, 2).reshape({rows, time, -1}), pass);
}

namespace {

std::vector<WideNetBlock> sharing(const std::shared_ptr<BidirectionalAttention>& attention,
                                  const std::shared_ptr<Mixture>& mixture,
                                  const std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>>& norms) {
  std::vector<WideNetBlock> blocks;
  for (const auto& [first, second] : norms) blocks.push_back({first, attention, second, mixture});
  return blocks;
}

}  // namespace

WideNet::WideNet(std::shared_ptr<BidirectionalAttention> a, std::shared_ptr<Mixture> m,
                 std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>> norms, double dropout)
    : WideNet(sharing(a, m, norms), dropout) {}

WideNet::WideNet(std::vector<WideNetBlock> b, double dropout) : blocks_(std::move(b)), dropout_(dropout) {
  check(!blocks_.empty(), "a WideNet without blocks computes nothing");
  std::set<const torch::nn::Module*> seen;
  const auto once = [&](size_t i, const char* name, const auto& module) {
    if (seen.insert(module.get()).second) register_module(fmt::format("block{}_{}", i, name), module);
  };
  for (size_t i = 0; i < blocks_.size(); ++i) {
    once(i, "attention", blocks_[i].attention);
    once(i, "ffn", blocks_[i].ffn);
    once(i, "ln1", blocks_[i].before_attention);
    once(i, "ln2", blocks_[i].before_ffn);
  }
}

namespace {

// What one block needs to run again later.
std::function<torch::Tensor(const torch::Tensor&, Pass&)> body_of(WideNetBlock b, double dropout, bool training) {
  return [b = std::move(b), dropout, training](const torch::Tensor& input, Pass& now) {
    const auto y = b.attention->forward(b.before_attention->forward(input), now);
    const auto u = input + (dropout > 0.0 ? torch::dropout(y, dropout, training) : y);
    return u + b.ffn->forward(b.before_ffn->forward(u), now);
  };
}

}  // namespace

torch::Tensor WideNet::run_block(size_t i, const torch::Tensor& x, Pass& pass) {
  pass.block = static_cast<int64_t>(i);
  return body_of(blocks_.at(i), dropout_, is_training())(x, pass);
}

torch::Tensor WideNet::forward(const torch::Tensor& x, Pass& pass) {
  auto h = x;
  const bool recomputed = pass.recompute_blocks && torch::GradMode::is_enabled();
  for (size_t i = 0; i < blocks_.size(); ++i) {
    pass.block = static_cast<int64_t>(i);
    h = recomputed ? recompute(h, pass, body_of(blocks_[i], dropout_, is_training())) : run_block(i, h, pass);
  }
  pass.finish();
  return h;
}

namespace {

// The mixture that one layer owns, at another layer.
class Borrowed : public FeedForwardBase {
 public:
  explicit Borrowed(std::shared_ptr<Mixture> lender) : lender_(std::move(lender)) {}
  torch::Tensor forward(const torch::Tensor& x, Pass& pass) override { return lender_->forward(x, pass); }
  int64_t expert_count() const override { return lender_->expert_count(); }

 private:
  std::shared_ptr<Mixture> lender_;  // not registered: its parameters count once
};

const RegisterMethod registered(
    {.slug = "widenet",
     .kind = "part",
     .title = "WideNet",
     .summary = "one mixture of experts with capacity shared by all layers, whose own norms route differently",
     .paper = {"Go Wider Instead of Deeper", "Xue et al.", 2021, "2107.11817"},
     .sites = {"ffn"},
     .config = describe<WideNetConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<WideNetConfig>(settings, "widenet");
       auto& shared = site.shared["widenet"];
       if (shared.has_value()) return std::make_shared<Borrowed>(std::any_cast<std::shared_ptr<Mixture>>(shared));
       const int64_t width = std::max<int64_t>(1, site.width / c.top_k);
       const Init glorot = [](torch::Tensor t) {
         const double bound = std::sqrt(6.0 / static_cast<double>(t.size(-1) + t.size(-2)));
         t.uniform_(-bound, bound);
       };
       auto rows = site.model.linear("shared.ffn.router", site.hidden, c.experts, false, glorot);
       auto w1 = site.model.stack("shared.ffn.experts.w1", c.experts, site.hidden, width, true, glorot);
       auto w2 = site.model.stack("shared.ffn.experts.w2", c.experts, width, site.hidden, true, glorot);
       auto mixture = std::make_shared<Mixture>(
           std::make_shared<CapacityRouter>(rows, c),
           std::make_shared<MlpExperts>(w1, w2, activation("gelu_new"),
                                        c.output_activation == "gelu" ? activation("gelu_new") : nullptr, c.dropout));
       shared = mixture;
       return mixture;
     })});

}  // namespace
}  // namespace moiety
