#include "moiety/analyze/expert_report.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/html.h"
#include "moiety/compress/expert_selection.h"
#include "moiety/compress/expert_statistics.h"

namespace moiety {
namespace pages {
extern const char analyze_experts[];  // experts.html
}
namespace {

using nlohmann::json;
using torch::Tensor;

std::vector<double> numbers(const Tensor& t) {
  const auto flat = t.to(torch::kCPU, torch::kFloat64).contiguous().reshape({-1});
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

json table(const Tensor& t) {
  json rows = json::array();
  for (int64_t i = 0; i < t.size(0); ++i) rows.push_back(numbers(t[i]));
  return rows;
}

// The cosines behind an affinity.
Tensor cosines(const Tensor& gram) {
  return 2.0 * cosine_affinity(gram) - 1.0;
}

// The pair of different experts with the largest entry.
json closest(const Tensor& alike) {
  const auto off = alike.to(torch::kFloat64).clone();
  off.fill_diagonal_(-2.0);
  if (off.numel() < 2) return nullptr;
  const int64_t at = off.argmax().item<int64_t>(), n = off.size(1);
  return {{"a", std::min(at / n, at % n)}, {"b", std::max(at / n, at % n)}, {"similarity", off.max().item<double>()}};
}

// How many experts each layer keeps of a share of all, and what of their writing stays.
json suggestion(const ExpertLayers& layers, const std::vector<Tensor>& worth, const std::vector<Tensor>& saliency,
                double share) {
  json keep = json::array();
  const auto kept = select_experts(layers, saliency, {.keep = share, .across = true});
  double stays = 0, all = 0;
  for (size_t i = 0; i < kept.size(); ++i) {
    keep.push_back(kept[i].size());
    all += worth[i].sum().item<double>();
    stays += worth[i].index_select(0, torch::tensor(kept[i], torch::kInt64)).sum().item<double>();
  }
  return {{"share", share}, {"keep", keep}, {"saliency_kept", all > 0 ? stays / all : 1.0}};
}

}  // namespace

Tensor weight_similarity(const ExpertLayers& layers, size_t layer) {
  const int64_t experts = layers.layers().at(layer).experts;
  std::vector<ExpertWeights> all;
  for (int64_t e = 0; e < experts; ++e) {
    const auto w = layers.expert(layer, e);
    all.push_back({w.gate.to(torch::kBFloat16), w.up.to(torch::kBFloat16), w.down.to(torch::kBFloat16)});
  }
  auto gram = torch::zeros({experts, experts}, torch::kFloat64);
  for (auto matrix : {&ExpertWeights::gate, &ExpertWeights::up, &ExpertWeights::down})
    for (int64_t a = 0; a < experts; ++a) {
      const auto one = (all[static_cast<size_t>(a)].*matrix).to(torch::kFloat32).reshape({-1});
      for (int64_t b = a; b < experts; ++b) {
        const double dot =
            one.dot((all[static_cast<size_t>(b)].*matrix).to(torch::kFloat32).reshape({-1})).item<double>();
        gram[a][b] += dot;
        if (a != b) gram[b][a] += dot;
      }
    }
  return cosines(gram).to(torch::kFloat32);
}

json expert_report(const ExpertLayers& layers, const Calibration& calibration, bool weights) {
  json list = json::array();
  int64_t experts = 0, unused = 0, tokens = 0;
  const auto saliency = expert_scores(layers, calibration, "reap");
  std::vector<Tensor> worth;
  for (size_t i = 0; i < layers.layers().size(); ++i) {
    const auto& l = layers.layers()[i];
    const auto& c = calibration.of_block(l.block);
    worth.push_back(c.output);
    json layer = {{"layer", l.block},
                  {"experts", l.experts},
                  {"rows", l.rows},
                  {"top_k", l.top_k},
                  {"tokens", c.tokens},
                  {"load", numbers(c.load)},
                  {"share", numbers(c.usage())},
                  {"importance", numbers(c.importance())},
                  {"saliency", numbers(saliency[i])},
                  {"bytes_an_expert", layers.expert_bytes(i)}};
    const auto routers = cosines(c.gram);
    layer["alike_routers"] = table(routers);
    layer["closest_routers"] = closest(routers);
    if (weights) {
      const auto alike = weight_similarity(layers, i);
      layer["alike_weights"] = table(alike);
      layer["closest_weights"] = closest(alike);
    }
    experts += l.experts;
    unused += (c.pairs == 0).sum().item<int64_t>();
    tokens = std::max(tokens, c.tokens);
    list.push_back(std::move(layer));
  }
  json report = {{"tokens", tokens}, {"layers", std::move(list)}, {"suggestions", json::array()}};
  for (const double share : {0.875, 0.75, 0.5, 0.25}) {
    // A share so small that tokens would find too few experts is no suggestion.
    int64_t places = 0, least = 0;
    for (const auto& l : layers.layers()) {
      places += KeepRule{share, true}.of_layer(l.block, l.experts);
      least += std::min(l.top_k, l.experts);
    }
    if (least <= places) report["suggestions"].push_back(suggestion(layers, worth, saliency, share));
  }
  report["summary"] = {{"layers", layers.layers().size()}, {"experts", experts}, {"unused", unused}};
  return report;
}

std::string expert_page(const json& report) {
  return html_with_data(pages::analyze_experts, report);
}

}  // namespace moiety
