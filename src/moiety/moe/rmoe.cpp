#include "moiety/moe/rmoe.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/site_experts.h"
#include "moiety/moe/topk.h"

namespace moiety {

void RmoeConfig::fields(Fields& f) {
  f("cell", cell, "the recurrent cell that all routers share").choices({"gru", "rnn"});
  f("width", width, "width of the routers' state").min(1);
  f("experts", experts, "experts of a layer that is not a mixture already").min(1);
  f("expert_width", expert_width, "hidden units of one expert; 0 takes the dense layer's width over top_k").min(0);
  f("top_k", top_k, "experts a token").min(1);
  f("aux_coef", aux_coef, "weight of the balance loss").min(0);
  f("detach", detach, "no gradient from a layer's state to the layers before");
  f("shared_cell", shared_cell, "one cell for all layers; without it each has its own");
  f("carry", carry, "layers see the state of the layer before; without it each starts from zeros");
  f("bias", bias, "an output bias, added once to the routed sum");
  f("shared_width", shared_width, "hidden units of a shared expert beside the routed ones; 0: none").min(0);
  f("moe_weight", moe_weight, "weight of the routed sum and its bias, where the part has a shared expert");
  f("share_weight", share_weight, "weight of the shared expert");
}

std::string RmoeConfig::problem() const {
  return top_k > experts ? fmt::format("`top_k` is {}, but there are {} experts", top_k, experts) : "";
}

namespace {

bool is_gru(const std::string& kind) {
  check(kind == "gru" || kind == "rnn", "a recurrent router's cell is `gru` or `rnn`, not `{}`", kind);
  return kind == "gru";
}

std::vector<std::string> parts_of(bool gru) {
  return gru ? std::vector<std::string>{"r", "z", "n"} : std::vector<std::string>{"n"};
}

}  // namespace

RecurrentCell::RecurrentCell(const std::string& kind, int64_t r) : gru_(is_gru(kind)) {
  check(r >= 1, "a state of width {} is impossible", r);
  const double bound = 1.0 / std::sqrt(static_cast<double>(r));
  for (const auto& part : parts_of(gru_)) {
    for (const char* side : {"i", "h"}) {
      keep("weight_" + (side + part), torch::empty({r, r}).uniform_(-bound, bound).requires_grad_());
      keep("bias_" + (side + part), torch::empty({r}).uniform_(-bound, bound).requires_grad_());
    }
  }
}

RecurrentCell::RecurrentCell(const std::string& kind, const std::map<std::string, torch::Tensor>& tensors)
    : gru_(is_gru(kind)) {
  int64_t r = 0;
  for (const auto& part : parts_of(gru_)) {
    for (const char* side : {"i", "h"}) {
      for (const char* what : {"weight_", "bias_"}) {
        const std::string name = what + (side + part);
        const auto it = tensors.find(name);
        check(it != tensors.end(), "the {} cell of the routers has no tensor `{}`", kind, name);
        const auto& t = it->second;
        if (r == 0) r = t.size(0);
        const bool fits =
            what[0] == 'w' ? t.dim() == 2 && t.size(0) == r && t.size(1) == r : t.dim() == 1 && t.size(0) == r;
        check(fits, "tensor `{}` of the routers' cell has another shape than a state of width {} asks for", name, r);
        keep(name, t);
      }
    }
  }
}

int64_t RecurrentCell::width() const {
  return weight_i_.front().size(0);
}

void RecurrentCell::keep(const std::string& name, torch::Tensor t) {
  register_parameter(name, t, t.requires_grad());
  const bool weight = name[0] == 'w';
  auto& list = name[name.size() - 2] == 'i' ? (weight ? weight_i_ : bias_i_) : (weight ? weight_h_ : bias_h_);
  list.push_back(std::move(t));
}

torch::Tensor RecurrentCell::forward(const torch::Tensor& u, const torch::Tensor& h) {
  const int64_t r = width();
  check(!h.defined() || (h.size(0) == u.size(0) && h.size(1) == r), "the routers' state is {} where {} is needed",
        h.defined() ? h.sizes().vec() : u.sizes().vec(), u.sizes().vec());
  const auto in = torch::linear(u, torch::cat(weight_i_), torch::cat(bias_i_));
  // A state of zeros needs no product; its biases act all the same.
  const auto back = h.defined() ? torch::linear(h, torch::cat(weight_h_), torch::cat(bias_h_))
                                : torch::cat(bias_h_).unsqueeze(0).expand_as(in);
  if (!gru_) return torch::tanh(in + back);
  const auto gates = torch::sigmoid(in.narrow(1, 0, 2 * r) + back.narrow(1, 0, 2 * r));
  const auto reset = gates.narrow(1, 0, r), update = gates.narrow(1, r, r);
  const auto fresh = torch::tanh(in.narrow(1, 2 * r, r) + reset * back.narrow(1, 2 * r, r));
  const auto kept = (1.0 - update) * fresh;
  return h.defined() ? kept + update * h : kept;
}

RecurrentRouter::RecurrentRouter(Linear p, Linear w2, std::shared_ptr<RecurrentCell> c, bool own, RmoeConfig o)
    : cell(std::move(c)), config(std::move(o)) {
  check(p->out() == cell->width() && w2->in() == cell->width(),
        "a router of width {} with a head of width {} cannot use a cell of width {}", p->out(), w2->in(),
        cell->width());
  check(config.top_k >= 1 && config.top_k <= w2->out(), "a router of {} experts cannot choose {}", w2->out(),
        config.top_k);
  project = register_module("weight1", std::move(p));
  head = register_module("weight2", std::move(w2));
  if (own) register_module("cell", cell);
  losses.push_back(std::make_shared<PooledBalance>("rmoe.balance", config.aux_coef));
}

Routing RecurrentRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  auto& state = pass.state[kState];
  const auto before = !config.carry ? torch::Tensor() : config.detach && state.defined() ? state.detach() : state;
  const auto h = cell->forward(project(x.to(torch::kFloat32)), before);
  state = h;
  Routing r;
  r.logits = head(h);
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  const auto [value, index] = top_k(r.scores, config.top_k);
  r.experts = index;
  r.gates = value / value.sum(-1, true);
  return finish(std::move(r), site, pass);
}

namespace {

std::shared_ptr<RecurrentCell> cell_of(PartWeights& weights, const RmoeConfig& c) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& part : parts_of(is_gru(c.cell))) {
    for (const char* side : {"i", "h"}) {
      const std::string name = side + part;
      tensors["weight_" + name] = weights.get("rnn_router.weight_" + name, {c.width, c.width}, uniform_init());
      tensors["bias_" + name] = weights.get("rnn_router.bias_" + name, {c.width}, uniform_init());
    }
  }
  return std::make_shared<RecurrentCell>(c.cell, tensors);
}

const RegisterMethod registered(
    {.slug = "rmoe",
     .kind = "part",
     .title = "RMoE",
     .summary = "routers that pass a recurrent state from layer to layer",
     .paper = {"Layerwise Recurrent Router for Mixture-of-Experts", "Qiu et al.", 2024, "2408.06793"},
     .sites = {"ffn"},
     .config = describe<RmoeConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<RmoeConfig>(settings, "rmoe");
       auto& shared = site.shared["rmoe.cell"];
       const bool first = !c.shared_cell || !shared.has_value();
       std::shared_ptr<RecurrentCell> cell;
       if (first) cell = cell_of(c.shared_cell ? site.model : site.own, c);
       if (c.shared_cell && first) shared = cell;
       if (!first) cell = std::any_cast<std::shared_ptr<RecurrentCell>>(shared);
       const auto own = site.mixture();
       const int64_t experts = own ? own->router->out() : c.experts;
       auto project = site.own.linear("weight1", site.hidden, c.width, false, uniform_init());
       auto head = site.own.linear("weight2", c.width, experts, false, uniform_init());
       auto router = std::make_shared<RecurrentRouter>(project, head, cell, first, c);
       std::shared_ptr<Mixture> mixture;
       if (own) {
         check(c.shared_width == 0 || !own->shared, "block {} has a shared expert already; set `shared_width` to 0",
               site.layer);
         mixture = std::make_shared<Mixture>(
             router, own->experts, own->shared ? own->shared : shared_at(site, c.shared_width), own->shared_gate);
       } else {
         mixture = std::make_shared<Mixture>(router, experts_at(site, experts, width_at(site, c.expert_width, c.top_k)),
                                             shared_at(site, c.shared_width));
       }
       if (c.bias) mixture->set_bias(site.own.get("bias", {site.hidden}, constant_init(0.0)));
       if (c.shared_width > 0) {
         mixture->routed_scale = c.moe_weight;
         mixture->shared_scale = c.share_weight;
       }
       return mixture;
     })});

}  // namespace
}  // namespace moiety
