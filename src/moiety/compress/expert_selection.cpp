#include "moiety/compress/expert_selection.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"

namespace moiety {

using nlohmann::json;

int64_t KeepRule::of_layer(int64_t block, int64_t experts) const {
  check(std::isfinite(keep) && keep > 0.0, "{} experts cannot be kept: give a number, or a share below 1", keep);
  if (keep < 1.0) return std::max<int64_t>(1, std::llround(keep * static_cast<double>(experts)));
  check(keep == std::floor(keep), "{} experts cannot be kept: give a whole number, or a share below 1", keep);
  check(keep <= static_cast<double>(experts), "layer {} has {} experts, {} cannot be kept", block, experts, keep);
  return static_cast<int64_t>(keep);
}

namespace {

void protect(const ExpertLayers& layers, ProtectedExperts& out, int64_t block, int64_t expert) {
  const size_t at = layers.of_block(block);
  check(expert >= 0 && expert < layers.layers()[at].experts, "layer {} has no expert {}: it has {}", block, expert,
        layers.layers()[at].experts);
  out[at].insert(expert);
}

}  // namespace

ProtectedExperts parse_protected(const ExpertLayers& layers, const std::string& list) {
  ProtectedExperts out(layers.layers().size());
  std::string rest = list;
  while (!rest.empty()) {
    const auto end = rest.find(';');
    const std::string pair = rest.substr(0, end);
    rest = end == std::string::npos ? std::string() : rest.substr(end + 1);
    if (pair.empty()) continue;
    const auto comma = pair.find(',');
    const auto digits = [](const std::string& s) {
      return !s.empty() && s.size() < 10 && s.find_first_not_of("0123456789") == std::string::npos;
    };
    check(comma != std::string::npos && digits(pair.substr(0, comma)) && digits(pair.substr(comma + 1)),
          "'{}' names no expert: write LAYER,EXPERT;LAYER,EXPERT", shown(pair));
    protect(layers, out, std::stoll(pair.substr(0, comma)), std::stoll(pair.substr(comma + 1)));
  }
  return out;
}

ProtectedExperts parse_protected(const ExpertLayers& layers, const json& report) {
  const json& list = report.is_object() && report.contains("super_experts") ? report["super_experts"] : report;
  check(list.is_array(), "a report of experts is a list of objects with layer_index and expert_index");
  ProtectedExperts out(layers.layers().size());
  for (const json& e : list) {
    check(e.is_object() && e.contains("layer_index") && e["layer_index"].is_number_integer() &&
              e.contains("expert_index") && e["expert_index"].is_number_integer(),
          "a report of experts holds {}, not an object with layer_index and expert_index", e.dump());
    if (e["expert_index"] == -1) continue;  // the shared expert
    protect(layers, out, e["layer_index"].get<int64_t>(), e["expert_index"].get<int64_t>());
  }
  return out;
}

std::vector<torch::Tensor> expert_scores(const ExpertLayers& layers, const Calibration& calibration,
                                         const std::string& by) {
  check(by == "frequency" || by == "importance" || by == "reap",
        "experts are not scored by '{}', but by frequency, importance or reap", shown(by));
  std::vector<torch::Tensor> out;
  for (const auto& layer : layers.layers()) {
    const LayerCalibration& c = calibration.of_block(layer.block);
    check(c.load.numel() == layer.rows && c.pairs.numel() == layer.experts,
          "the calibration has {} experts in layer {}, the model {}", c.pairs.numel(), layer.block, layer.experts);
    if (by == "reap") {
      out.push_back(c.saliency());
      continue;
    }
    const auto rows = by == "frequency" ? c.usage() : c.importance();
    if (layer.map.empty())
      out.push_back(rows);
    else
      out.push_back(
          torch::zeros({layer.experts}, torch::kFloat64).index_add(0, torch::tensor(layer.map, torch::kInt64), rows));
  }
  return out;
}

std::vector<torch::Tensor> random_scores(const ExpertLayers& layers, uint64_t seed) {
  RandomStream draw(seed, "compress.random");
  std::vector<torch::Tensor> out;
  for (const auto& layer : layers.layers()) {
    auto scores = torch::empty({layer.experts}, torch::kFloat64);
    for (int64_t e = 0; e < layer.experts; ++e) scores.data_ptr<double>()[e] = draw.uniform();
    out.push_back(scores);
  }
  return out;
}

std::vector<std::vector<int64_t>> select_experts(const ExpertLayers& layers, const std::vector<torch::Tensor>& scores,
                                                 const KeepRule& rule, const ProtectedExperts& keep) {
  const auto& all = layers.layers();
  check(scores.size() == all.size(), "scores of {} layers do not fit {} layers with experts", scores.size(),
        all.size());
  struct Candidate {
    size_t layer;
    int64_t expert;
    double score;
    bool stays;
  };
  std::vector<std::vector<Candidate>> by_layer(all.size());
  int64_t places = 0;
  const auto best = [](const Candidate& a, const Candidate& b) {
    return a.stays != b.stays ? a.stays : a.score > b.score;
  };
  for (size_t i = 0; i < all.size(); ++i) {
    const auto s = scores[i].to(torch::kCPU, torch::kFloat64).contiguous();
    check(s.dim() == 1 && s.numel() == all[i].experts, "{} scores do not fit the {} experts of layer {}", s.numel(),
          all[i].experts, all[i].block);
    check(!s.isnan().any().item<bool>(), "a score of an expert of layer {} is not a number", all[i].block);
    const double sum = rule.across ? std::max(s.sum().item<double>(), 1e-300) : 1.0;
    for (int64_t e = 0; e < all[i].experts; ++e)
      by_layer[i].push_back({i, e, s.const_data_ptr<double>()[e] / sum, i < keep.size() && keep[i].count(e) > 0});
    std::stable_sort(by_layer[i].begin(), by_layer[i].end(), best);
    places += rule.of_layer(all[i].block, all[i].experts);
  }
  std::vector<std::vector<int64_t>> kept(all.size());
  if (!rule.across) {
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t count = rule.of_layer(all[i].block, all[i].experts);
      const auto fixed = std::count_if(by_layer[i].begin(), by_layer[i].end(), [](const auto& c) { return c.stays; });
      check(fixed <= count, "layer {} keeps {} experts, but {} are protected", all[i].block, count, fixed);
      for (int64_t n = 0; n < count; ++n) kept[i].push_back(by_layer[i][static_cast<size_t>(n)].expert);
    }
  } else {
    std::vector<Candidate> rest;
    int64_t taken = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const auto least = static_cast<size_t>(std::min(all[i].top_k, all[i].experts));
      for (size_t n = 0; n < by_layer[i].size(); ++n) {
        const Candidate& c = by_layer[i][n];
        if (n < least || c.stays)
          kept[i].push_back(c.expert), ++taken;
        else
          rest.push_back(c);
      }
    }
    check(taken <= places,
          "{} experts in all have to stay (as many a layer as a token takes, and the protected ones), "
          "but only {} may",
          taken, places);
    std::stable_sort(rest.begin(), rest.end(), best);
    for (int64_t n = 0; n < places - taken; ++n)
      kept[rest[static_cast<size_t>(n)].layer].push_back(rest[static_cast<size_t>(n)].expert);
  }
  for (auto& k : kept) std::sort(k.begin(), k.end());
  return kept;
}

std::vector<NewExperts> keep_experts(const ExpertLayers& layers, const std::vector<std::vector<int64_t>>& kept) {
  check(kept.size() == layers.layers().size(), "{} layers are said to keep experts, {} have some", kept.size(),
        layers.layers().size());
  std::vector<NewExperts> out;
  for (size_t i = 0; i < kept.size(); ++i)
    if (static_cast<int64_t>(kept[i].size()) < layers.layers()[i].experts)
      out.push_back(NewExperts::keep(layers.layers()[i], kept[i]));
  return out;
}

}  // namespace moiety
