#include "moiety/compress/expert_selection.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"

namespace moiety {

int64_t KeepRule::of_layer(int64_t block, int64_t experts, int64_t groups) const {
  check(std::isfinite(keep) && keep > 0.0, "{} experts cannot be kept: give a number, or a share below 1", keep);
  if (keep < 1.0) {
    const int64_t each = std::llround(keep * static_cast<double>(experts) / static_cast<double>(groups));
    return groups * std::max<int64_t>(1, each);
  }
  check(keep == std::floor(keep), "{} experts cannot be kept: give a whole number, or a share below 1", keep);
  check(keep <= static_cast<double>(experts), "layer {} has {} experts, {} cannot be kept", block, experts, keep);
  const auto count = static_cast<int64_t>(keep);
  check(count % groups == 0, "layer {} routes in {} groups, which cannot share {} experts", block, groups, count);
  return count;
}

ProtectedExperts protected_experts(const ExpertLayers& layers, const std::vector<ExpertAt>& experts) {
  ProtectedExperts out(layers.layers().size());
  for (const ExpertAt& e : experts) {
    const size_t at = layers.of_block(e.layer);
    if (e.expert == -1) continue;  // the shared one
    check(e.expert >= 0 && e.expert < layers.layers()[at].experts, "layer {} has no expert {}: it has {}", e.layer,
          e.expert, layers.layers()[at].experts);
    out[at].insert(e.expert);
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
  for (const auto& l : all)
    check(!rule.across || l.groups == 1,
          "layer {} routes in groups of experts, which every layer has as many of: not across layers", l.block);
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
    places += rule.of_layer(all[i].block, all[i].experts, all[i].groups);
  }
  std::vector<std::vector<int64_t>> kept(all.size());
  if (!rule.across) {
    for (size_t i = 0; i < all.size(); ++i) {
      const auto& l = all[i];
      const int64_t each = rule.of_layer(l.block, l.experts, l.groups) / l.groups, size = l.experts / l.groups;
      std::vector<int64_t> taken(static_cast<size_t>(l.groups)), fixed(taken);
      for (const Candidate& c : by_layer[i]) fixed[static_cast<size_t>(c.expert / size)] += c.stays ? 1 : 0;
      const int64_t most = *std::max_element(fixed.begin(), fixed.end());
      check(most <= each, "layer {} keeps {} experts{}, but {} are protected", l.block, each,
            l.groups > 1 ? " of a group" : "", most);
      for (const Candidate& c : by_layer[i])
        if (taken[static_cast<size_t>(c.expert / size)]++ < each) kept[i].push_back(c.expert);
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
