#include "moiety/analyze/routing.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/base/html.h"
#include "moiety/models/text_windows.h"

namespace moiety {
namespace pages {
extern const char analyze_routing[];  // routing.html
}
namespace {

using nlohmann::json;

template <class T>
std::vector<T> values(const torch::Tensor& t) {
  const auto flat = t.contiguous();
  return {flat.const_data_ptr<T>(), flat.const_data_ptr<T>() + flat.numel()};
}

double ratio(double a, double b) {
  return b == 0.0 ? 0.0 : a / b;
}

}  // namespace

double SiteStatistics::variation() const {
  const auto l = load.to(torch::kFloat64);
  return ratio(l.std(/*unbiased=*/false).item<double>(), l.mean().item<double>());
}
double SiteStatistics::repetition() const {
  return ratio(static_cast<double>(repeated), static_cast<double>(followed));
}
double SiteStatistics::chance_repetition() const {
  const auto l = load.to(torch::kFloat64);
  return ratio((l * l).sum().item<double>(), l.sum().item<double>() * static_cast<double>(tokens));
}

void ChoiceInformation::add(const Trace::Record& record, const torch::Tensor& counted) {
  const auto& routing = record.routing;
  check(routing.experts.dim() == 2 && routing.experts.size(1) >= 1, "a record without choices tells nothing");
  const torch::Tensor& width = routing.scores.defined() ? routing.scores : routing.logits;
  check(record.experts > 0 || width.defined(), "a record that names no number of experts tells nothing");
  auto choice = routing.experts.select(1, 0).to(torch::kCPU);
  const torch::Tensor& real = counted.defined() ? counted : record.real;
  if (real.defined()) choice = choice.masked_fill(~real.reshape({-1}).to(torch::kCPU), -1);
  const int64_t experts = record.experts > 0 ? record.experts : width.size(1);
  Last& before = last_[record.site.site];
  // Not behind the one before: another pass begins.
  if (before.choice.defined() && before.site < record.site && before.choice.numel() == choice.numel()) {
    auto& table = pairs_[record.site];
    if (!table.defined()) table = torch::zeros({before.experts, experts}, torch::kInt64);
    check(table.size(0) == before.experts && table.size(1) == experts,
          "block {} has {} experts behind {} here, and had {} behind {} before", record.site.block, experts,
          before.experts, table.size(1), table.size(0));
    const auto both = (before.choice >= 0) & (choice >= 0);
    const auto cell = (before.choice * experts + choice).masked_select(both);
    table += torch::bincount(cell, {}, before.experts * experts).view_as(table);
  }
  before = {record.site, choice, experts};
}

std::map<Site, double> ChoiceInformation::nats() const {
  std::map<Site, double> out;
  for (const auto& [site, table] : pairs_) {
    const auto p = table.to(torch::kFloat64) / static_cast<double>(std::max<int64_t>(1, table.sum().item<int64_t>()));
    out[site] = std::max(0.0, entropy_of(p.sum(0)) + entropy_of(p.sum(1)) - entropy_of(p));
  }
  return out;
}

double ChoiceInformation::mean() const {
  double sum = 0;
  for (const auto& [site, nats] : nats()) sum += nats;
  return ratio(sum, static_cast<double>(pairs_.size()));
}

void RoutingStatistics::add(const Trace::Record& record, const torch::Tensor& ids, const torch::Tensor& counted,
                            int64_t text) {
  const auto& routing = record.routing;
  const int64_t rows = ids.size(0), time = ids.size(1), n = rows * time;
  check(routing.experts.dim() == 2 && routing.experts.size(0) == n,
        "a record of {} tokens does not belong to a batch of {}", routing.experts.size(0), n);
  check(text >= 0 && text < texts_, "text {} is none of {}", text, texts_);
  auto& s = sites_[record.site];
  const auto real = counted.reshape({n});
  const bool first = s.experts == 0;
  const auto hot = s.add(record, real);
  const int64_t experts = s.experts;
  if (first) {
    s.site = record.site;
    s.coactivation = torch::zeros({experts, experts}, torch::kInt64);
    s.gates = torch::zeros({experts}, torch::kFloat64);
    s.load_by_text = torch::zeros({texts_, experts}, torch::kInt64);
    if (count_ids_) s.ids.resize(static_cast<size_t>(experts));
  }
  information_.add(record, real);
  s.slots = std::max(s.slots, routing.experts.size(1));
  s.load_by_text.select(0, text) += hot.sum(0).to(torch::kInt64);
  s.coactivation += hot.t().mm(hot).to(torch::kInt64);
  const auto chosen = routing.experts.to(torch::kCPU);
  const auto gates =
      routing.gates.to(torch::kCPU, torch::kFloat64).masked_fill(~((chosen >= 0) & real.unsqueeze(1)), 0.0);
  s.gates.index_add_(0, chosen.clamp_min(0).reshape({-1}), gates.reshape({-1}));
  if (time > 1) {
    const auto grid = hot.view({rows, time, experts});
    const auto here = grid.narrow(1, 0, time - 1), next = grid.narrow(1, 1, time - 1);
    const auto goes_on = counted.narrow(1, 1, time - 1).to(torch::kFloat32).unsqueeze(-1);
    s.followed += (here * goes_on).sum(torch::kFloat64).item<int64_t>();
    s.repeated += (here * next).sum(torch::kFloat64).item<int64_t>();
  }
  if (count_ids_) {
    const auto pairs = hot.nonzero();
    const auto token = ids.reshape({n}).index_select(0, pairs.select(1, 0));
    const auto* id = token.const_data_ptr<int64_t>();
    const auto at = pairs.accessor<int64_t, 2>();
    for (int64_t i = 0; i < pairs.size(0); ++i) ++s.ids[static_cast<size_t>(at[i][1])][id[i]];
  }
}

RoutingStatistics analyze_routing(CausalModel& model, const std::vector<RoutingText>& texts,
                                  const RoutingOptions& options,
                                  const std::function<void(int64_t, int64_t)>& progress) {
  RoutingStatistics statistics(static_cast<int64_t>(texts.size()), options.count_ids);
  std::vector<std::vector<int64_t>> ids;
  for (const auto& text : texts) ids.push_back(text.ids);
  each_window(
      ids, {options.context, options.batch_size, options.bos}, model.context_length(), [&](const WindowBatch& batch) {
        if (progress && statistics.sites().empty()) progress(0, batch.windows);
        Trace trace;
        trace.on_record = [&](const Trace::Record& record) { statistics.add(record, batch.ids, batch.text, batch.of); };
        Pass pass;
        pass.trace = &trace;
        read_window(model, batch, pass);
        check(!statistics.sites().empty(),
              "the model has no experts: none of its {} blocks is a mixture, so nothing is routed", model.blocks());
        if (progress) progress(batch.done, batch.windows);
      });
  return statistics;
}

json to_json(const RoutingStatistics& statistics, const std::vector<std::string>& names, const Tokenizer* tokenizer,
             int64_t top_tokens) {
  json layers = json::array();
  double load_entropy = 0, token_entropy = 0, worst = 0, repetition = 0;
  int64_t unused = 0, experts = 0;
  const auto information = statistics.information().nats();
  for (const auto& [site, s] : statistics.sites()) {
    json layer = {{"layer", site.block},
                  {"round", site.round},
                  {"site", site.site},
                  {"experts", s.experts},
                  {"slots", s.slots},
                  {"tokens", s.tokens},
                  {"experts_per_token", s.experts_per_token()},
                  {"load", values<int64_t>(s.load)},
                  {"share", values<double>(s.share())},
                  {"load_entropy", s.load_entropy()},
                  {"load_entropy_normalized", s.evenness()},
                  {"token_entropy", s.token_entropy()},
                  {"token_entropy_normalized", s.indecision()},
                  {"imbalance", s.imbalance()},
                  {"variation", s.variation()},
                  {"unused", s.unused()},
                  {"repetition", s.repetition()},
                  {"chance_repetition", s.chance_repetition()}};
    if (const auto it = information.find(site); it != information.end()) layer["mutual_information"] = it->second;
    const auto load = s.load.to(torch::kFloat64).clamp_min(1.0);
    layer["mean_gate"] = values<double>(s.gates / load);
    if (s.scored > 0) layer["mean_probability"] = values<double>(s.probability / static_cast<double>(s.scored));
    json together = json::array();
    for (int64_t e = 0; e < s.experts; ++e) together.push_back(values<int64_t>(s.coactivation[e]));
    layer["coactivation"] = std::move(together);
    json texts = json::array();
    for (size_t t = 0; t < names.size(); ++t)
      texts.push_back({{"text", names[t]}, {"load", values<int64_t>(s.load_by_text[static_cast<int64_t>(t)])}});
    layer["texts"] = std::move(texts);
    if (tokenizer != nullptr && top_tokens > 0 && !s.ids.empty()) {
      std::map<int64_t, int64_t> all;  // choices by id, over all experts
      for (const auto& of_expert : s.ids)
        for (const auto& [id, count] : of_expert) all[id] += count;
      json top = json::array();
      for (const auto& of_expert : s.ids) {
        std::vector<std::pair<int64_t, int64_t>> best;
        for (const auto& entry : of_expert)
          if (entry.second >= 4) best.push_back(entry);
        const auto specific = [&](const auto& entry) {
          return static_cast<double>(entry.second) / static_cast<double>(all.at(entry.first));
        };
        std::sort(best.begin(), best.end(), [&](const auto& a, const auto& b) {
          const double x = specific(a), y = specific(b);
          return x != y ? x > y : a.second != b.second ? a.second > b.second : a.first < b.first;
        });
        if (static_cast<int64_t>(best.size()) > top_tokens) best.resize(static_cast<size_t>(top_tokens));
        json list = json::array();
        for (const auto& entry : best)
          list.push_back({{"id", entry.first},
                          {"piece", tokenizer->piece(entry.first)},
                          {"count", entry.second},
                          {"share", specific(entry)}});
        top.push_back(std::move(list));
      }
      layer["top_tokens"] = std::move(top);
    }
    layers.push_back(std::move(layer));
    load_entropy += s.evenness();
    token_entropy += s.indecision();
    repetition += s.repetition();
    worst = std::max(worst, s.imbalance());
    unused += s.unused();
    experts += s.experts;
  }
  const auto count = static_cast<double>(std::max<size_t>(layers.size(), 1));
  return {{"summary",
           {{"layers", layers.size()},
            {"experts", experts},
            {"unused", unused},
            {"mean_load_entropy_normalized", load_entropy / count},
            {"mean_token_entropy_normalized", token_entropy / count},
            {"mean_repetition", repetition / count},
            {"mean_mutual_information", statistics.information().mean()},
            {"worst_imbalance", worst}}},
          {"layers", std::move(layers)}};
}

std::string routing_page(const json& report) {
  return html_with_data(pages::analyze_routing, report);
}

}  // namespace moiety
