#include "moiety/train/router_load.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>

namespace moiety {

void RouterLoad::add(const Trace::Record& record) {
  const torch::NoGradGuard frozen;
  auto experts = record.routing.experts;
  auto scores = record.routing.scores.defined() ? record.routing.scores : record.routing.gates;
  if (record.real.defined()) {
    const auto at = record.real.nonzero().squeeze(1);
    experts = experts.index_select(0, at);
    scores = scores.index_select(0, at);
  }
  const int64_t count = record.experts > 0                ? record.experts
                        : record.routing.scores.defined() ? record.routing.scores.size(1)
                        : record.routing.logits.defined() ? record.routing.logits.size(1)
                        : experts.numel() > 0             ? experts.max().item<int64_t>() + 1
                                                          : 0;
  auto& c = sites_[record.site];
  const auto flat = experts.reshape({-1});
  auto load = torch::bincount(flat.masked_select(flat >= 0), {}, count).to(torch::kCPU, torch::kFloat64);
  if (c.load.defined() && c.load.numel() < load.numel()) std::swap(c.load, load);
  if (c.load.defined())
    c.load.narrow(0, 0, load.numel()).add_(load);
  else
    c.load = load;
  c.tokens += static_cast<double>(experts.size(0));
  if (record.routing.scores.defined()) {
    const auto p = (scores / scores.sum(-1, true).clamp_min(1e-20)).clamp_min(1e-20);
    // Over all that is scored, null experts too.
    c.entropy -=
        (p * p.log()).sum(torch::kFloat64).item<double>() / std::log(std::max(2.0, static_cast<double>(p.size(1))));
  }
}

nlohmann::json RouterLoad::report(bool shares) const {
  nlohmann::json out = nlohmann::json::object();
  for (const auto& [site, c] : sites_) {
    std::string name = std::to_string(site.block);
    if (site.round != 0) name += fmt::format(".{}", site.round);
    if (site.site != "ffn") name += " " + site.site;
    const auto experts = c.load.numel();
    const double sum = c.load.sum().item<double>();
    const auto share = sum > 0 ? c.load / sum : torch::zeros_like(c.load);
    const double most = experts > 1 ? std::log(static_cast<double>(experts)) : 1.0;
    const auto p = share.clamp_min(1e-300);
    nlohmann::json entry = {
        {"evenness", -(share * p.log()).sum().item<double>() / most},
        {"imbalance", experts > 0 ? share.max().item<double>() * static_cast<double>(experts) : 0.0},
        {"unused", (c.load == 0).sum().item<int64_t>()},
        {"indecision", c.tokens > 0 ? c.entropy / c.tokens : 0.0},
        {"per_token", c.tokens > 0 ? sum / c.tokens : 0.0}};
    if (shares) {
      nlohmann::json list = nlohmann::json::array();
      for (int64_t e = 0; e < experts; ++e) list.push_back(std::round(share[e].item<double>() * 1e5) / 1e5);
      entry["share"] = list;
    }
    out[name] = entry;
  }
  return out;
}

}  // namespace moiety
