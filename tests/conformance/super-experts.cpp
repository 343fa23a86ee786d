// Super experts: what the experts of a layer write at most, which of them stand out, a layer without some, sinks.
#include "moiety/analyze/super_experts.h"

#include <torch/torch.h>

#include <cmath>

#include "conform.h"
#include "moiety/compress/prune_experts.h"
#include "moiety/moe/mixture.h"

namespace moiety::conform {
namespace {

struct Layer {
  std::shared_ptr<Mixture> mixture;
  std::shared_ptr<GatedExperts> experts;
  std::shared_ptr<ExpertMaxima> maxima;
};

Layer layer_of(const Case& c, const torch::Tensor& down) {
  TopKRouterOptions options;
  options.top_k = c.config.at("top_k");
  options.normalize = c.config.value("norm_topk_prob", false);
  Layer l;
  l.experts = std::make_shared<GatedExperts>(LinearStack(c.in("gate_proj")), LinearStack(c.in("up_proj")),
                                             LinearStack(down), activation("silu"));
  l.maxima = std::make_shared<ExpertMaxima>(down.size(0));
  l.mixture = std::make_shared<Mixture>(std::make_shared<TopKRouter>(Linear(c.in("router")), options), l.experts);
  return l;
}

MOIETY_OP("super-experts", "profile", [](const Case& c) -> Outputs {
  const torch::NoGradGuard frozen;
  const Layer l = layer_of(c, c.in("down_proj"));
  l.experts->down->attach(std::make_shared<ExpertWatch>(l.maxima));
  Pass pass;
  l.mixture->forward(c.in("x").unsqueeze(0), pass);
  return {{"output_max", l.maxima->output_max},
          {"input_max", l.maxima->input_max},
          {"output_channel", l.maxima->output_channel},
          {"tokens", l.maxima->tokens}};
});

MOIETY_OP("super-experts", "identify", [](const Case& c) -> Outputs {
  SuperExpertRule rule;
  rule.quantile = c.config.at("quantile");
  rule.times = c.config.at("times");
  rule.include_layers = c.config.at("include_layers");
  rule.floor = c.config.at("floor");
  rule.scope = c.config.value("scope", "included");
  const int64_t layers = c.config.at("total_layers"), dense = c.config.at("first_moe_layer");
  auto table = c.in("output_max").to(torch::kFloat64);
  table.narrow(0, 0, dense).fill_(NAN);
  std::vector<int64_t> mixtures, layer, expert;
  for (int64_t l = dense; l < layers; ++l) mixtures.push_back(l);
  const auto found = find_super_experts(table, included_layers(layers, rule.include_layers, mixtures), rule,
                                        c.config.value("shared_last", false));
  std::vector<double> value;
  for (const auto& s : found.found) {
    layer.push_back(s.layer);
    expert.push_back(s.expert);
    value.push_back(s.value);
  }
  return {{"layer", torch::tensor(layer, torch::kInt64)},
          {"expert", torch::tensor(expert, torch::kInt64)},
          {"value", torch::tensor(value, torch::kFloat64)},
          {"percentile", torch::tensor(found.percentile, torch::kFloat64)}};
});

MOIETY_OP("super-experts", "prune_forward", [](const Case& c) -> Outputs {
  const torch::NoGradGuard frozen;
  const auto pruned = c.in("pruned");
  const std::vector<int64_t> experts(pruned.const_data_ptr<int64_t>(),
                                     pruned.const_data_ptr<int64_t>() + pruned.numel());
  const Layer l = layer_of(c, without_experts(c.in("down_proj"), experts));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = l.mixture->forward(c.in("x").unsqueeze(0), pass)[0];
  return {{"y", y}, {"selected", trace.records.at(0).routing.experts}};
});

MOIETY_OP("super-experts", "sink_decay", [](const Case& c) -> Outputs {
  const auto index = c.in("sinks");
  const std::vector<int64_t> sinks(index.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>() + index.numel());
  const auto score = sink_score(c.in("attn").to(torch::kFloat64), sinks),
             pruned = sink_score(c.in("attn_pruned").to(torch::kFloat64), sinks);
  const auto decay = sink_decay(score, pruned);
  return {{"score", score},
          {"score_pruned", pruned},
          {"decay", decay.decay},
          {"decay_mean", torch::tensor(decay.mean, torch::kFloat64)}};
});

}  // namespace
}  // namespace moiety::conform
