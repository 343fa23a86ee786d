#include "moiety/moe/smoe_dropout.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/moe/cut.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/site_experts.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

const std::vector<std::string> kModes = {"linear_increase",    "linear_decrease", "cosine_increase",
                                         "cosine_decrease",    "exp_increase",    "multi_step_increase",
                                         "multi_step_decrease"};

// Half to even, whatever the rounding mode of the processor is.
int64_t round_half_even(double x) {
  const double low = std::floor(x), part = x - low;
  const auto whole = static_cast<int64_t>(low);
  if (part > 0.5) return whole + 1;
  if (part < 0.5) return whole;
  return whole % 2 == 0 ? whole : whole + 1;
}

}  // namespace

void SmoeDropoutConfig::fields(Fields& f) {
  f("experts", experts, "experts that the layer is cut into").min(1);
  f("k_min", k_min, "active experts at the start").min(1);
  f("k_max", k_max, "active experts at the end").min(1);
  f("mode", mode, "how the number of active experts moves").choices(kModes);
  f("total_steps", total_steps, "steps of the schedule; 0 takes those of the run").min(0);
  f("rescale", rescale,
    "experts cut from a dense layer give N times their part, so that even gates over all give the layer");
}

std::string SmoeDropoutConfig::problem() const {
  if (k_min > k_max) return fmt::format("`k_min` {} is above `k_max` {}", k_min, k_max);
  if (k_max > experts) return fmt::format("`k_max` is {}, but there are {} experts", k_max, experts);
  return "";
}

int64_t smoe_dropout_k(const std::string& mode, int64_t k_min, int64_t k_max, int64_t total, int64_t finished) {
  check(std::find(kModes.begin(), kModes.end(), mode) != kModes.end(), "unknown schedule `{}`{}; known are {}",
        shown(mode), did_you_mean(mode, kModes), list_of(kModes, "and"));
  check(k_min >= 1 && k_min <= k_max, "from {} to {} active experts is impossible", k_min, k_max);
  check(total >= 1, "a schedule needs at least one step, not {}", total);
  check(finished >= 0, "a schedule has no step {}", finished);
  const auto span = static_cast<double>(k_max - k_min), s = static_cast<double>(finished),
             all = static_cast<double>(total);
  const auto angle = std::numbers::pi * s / (2.0 * all);
  int64_t k = 0;
  if (mode == "linear_increase") {
    k = round_half_even(span * s / all) + k_min;
  } else if (mode == "linear_decrease") {
    k = round_half_even(-span * s / all) + k_max;
  } else if (mode == "cosine_increase") {
    k = round_half_even(-span * std::cos(angle)) + k_max;
  } else if (mode == "cosine_decrease") {
    k = round_half_even(span * std::cos(angle)) + k_min;
  } else if (mode == "exp_increase") {
    check(total >= 300, "exp_increase needs at least 300 steps, not {}", total);
    k = round_half_even(-span * std::pow(0.99, static_cast<double>(finished / (total / 300)))) + k_max;
  } else {
    constexpr int64_t kSteps[] = {1, 2, 4, 8, 16};
    const int64_t at = std::min<int64_t>(4, finished * 5 / total);
    k = kSteps[mode == "multi_step_increase" ? at : 4 - at];
  }
  return std::clamp(k, k_min, k_max);
}

FixedRouter::FixedRouter(Linear p, int64_t k) : top_k(k) {
  projection = register_module("projection", std::move(p));
  for (auto& t : projection->parameters()) t.set_requires_grad(false);
  check(k >= 1 && k <= experts(), "a router of {} experts cannot choose {}", experts(), k);
}

void FixedRouter::before_step(int64_t step, int64_t steps) {
  if (!schedule) return;
  const auto& c = *schedule;
  top_k =
      std::min(experts(), smoe_dropout_k(c.mode, c.k_min, c.k_max, c.total_steps > 0 ? c.total_steps : steps, step));
}

void FixedRouter::before_evaluation() {
  trained_k_ = std::exchange(top_k, experts());
}

void FixedRouter::after_evaluation() {
  top_k = trained_k_;
}

Routing FixedRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = projection(x.to(torch::kFloat32));
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  const auto [value, index] = moiety::top_k(r.logits, top_k);
  r.experts = index;
  r.gates = torch::softmax(value, -1);
  return finish(std::move(r), site, pass);
}

MlpTensors modularize(const MlpTensors& dense, int64_t experts, bool rescale) {
  const auto sets = contiguous_sets(dense.w1.size(0), experts);
  MlpTensors out;
  out.w1 = cut_rows(dense.w1, sets);
  out.w2 = cut_columns(dense.w2, sets);
  if (rescale) out.w2 = out.w2 * static_cast<double>(experts);
  if (dense.b1.defined()) out.b1 = cut_rows(dense.b1, sets);
  if (dense.b2.defined()) out.b2 = dense.b2.unsqueeze(0).repeat({experts, 1});
  return out;
}

namespace {

const RegisterMethod registered(
    {.slug = "smoe-dropout",
     .kind = "part",
     .title = "SMoE-Dropout",
     .summary = "a random router that is never trained, and a growing number of active experts",
     .paper = {"Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers", "Chen et al.", 2023,
               "2303.01610"},
     .sites = {"ffn"},
     .config = describe<SmoeDropoutConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<SmoeDropoutConfig>(settings, "smoe-dropout");
       check(site.width % c.experts == 0, "{} hidden units cannot be cut into {} experts of equal width", site.width,
             c.experts);
       auto rows = site.own.linear("gate", site.hidden, c.experts, true, normal_init(0.02));
       // Outside of training all experts are active.
       auto router = std::make_shared<FixedRouter>(rows, c.experts);
       router->schedule = c;
       const double scale = c.rescale ? static_cast<double>(c.experts) : 1.0;
       return std::make_shared<Mixture>(router, experts_at(site, c.experts, site.width / c.experts, scale));
     })});

}  // namespace
}  // namespace moiety
