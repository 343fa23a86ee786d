// HOBBIT: scores, guesses, priorities, replays of a trace, and a mixture whose experts come from a file.
#include "moiety/offload/hobbit.h"

#include <torch/torch.h>

#include "conform.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/io/safetensors.h"
#include "moiety/moe/router.h"
#include "moiety/nn/weights.h"
#include "moiety/offload/checkpoint_experts.h"
#include "moiety/offload/offload.h"
#include "moiety/offload/residency.h"
#include "moiety/offload/traces.h"

namespace moiety::conform {
namespace {

using torch::Tensor;

HobbitWeights weights_of(const Case& c) {
  const auto& w = c.config.at("weights");
  return {w.at("lru"), w.at("lfu"), w.at("lhu"), w.at("fld")};
}

// Mixtral's rule: the K largest, gates normalised over them.
std::shared_ptr<TopKRouter> router_over(const Tensor& weight, int64_t top_k) {
  return std::make_shared<TopKRouter>(Linear(weight),
                                      TopKRouterOptions{.top_k = top_k, .scoring = Scoring::softmax_kept});
}

Demand demand_of(const Routing& r, int64_t row) {
  Demand d;
  const auto experts = r.experts.contiguous(), gates = r.gates.to(torch::kFloat64).contiguous();
  const int64_t k = experts.size(1);
  for (int64_t i = 0; i < k; ++i)
    d.pairs.push_back({0, experts.const_data_ptr<int64_t>()[row * k + i], gates.const_data_ptr<double>()[row * k + i]});
  sort_pairs(d, r.logits.size(1));
  return d;
}

MOIETY_OP("hobbit", "score", [](const Case& c) -> Outputs {
  const auto logits = c.in("router_logits").to(torch::kFloat64);
  const int64_t rows = logits.size(0), k = c.config.at("top_k");
  const auto router = router_over(torch::zeros({logits.size(1), 1}), k);
  const Routing r = router->decide(logits);
  auto indices = torch::empty({rows, k}, torch::kInt64), precision = torch::empty_like(indices);
  auto weights = torch::empty({rows, k}, torch::kFloat64), scores = torch::empty_like(weights);
  for (int64_t n = 0; n < rows; ++n) {
    const auto scored = hobbit_scores(demand_of(r, n).pairs, c.config.at("t1"), c.config.at("t2"));
    for (int64_t i = 0; i < k; ++i) {
      const Scored& s = scored[static_cast<size_t>(i)];
      indices[n][i] = s.expert;
      weights[n][i] = s.weight;
      scores[n][i] = s.score;
      precision[n][i] = static_cast<int64_t>(s.precision);
    }
  }
  return {{"indices", indices}, {"weights", weights}, {"scores", scores}, {"precision", precision}};
});

class Flags : public Cached {
 public:
  Flags(Tensor high, Tensor low) : high_(std::move(high)), low_(std::move(low)) {}
  bool has(const ExpertVersion& v) const override {
    return (v.precision == Precision::high ? high_ : low_)[v.layer][v.expert].item<bool>();
  }

 private:
  Tensor high_, low_;
};

MOIETY_OP("hobbit", "predict", [](const Case& c) -> Outputs {
  const auto gates = c.in("gate_weight").to(torch::kFloat64);
  const int64_t layers = gates.size(0), experts = gates.size(1), k = c.config.at("top_k");
  std::vector<StackedRouters::Layer> stacked;
  for (int64_t l = 0; l < layers; ++l) {
    const auto router = router_over(gates[l], k);
    stacked.push_back({gates[l], {}, {}, [router](const Tensor& logits) { return router->decide(logits); }});
  }
  StackedRouters routers(stacked);
  LookAheadFrom look(routers, c.in("x").to(torch::kFloat64).unsqueeze(0));
  Hobbit policy(layers, experts, c.config.at("t1"), c.config.at("t2"), c.config.at("lookahead"), {});
  Demand now;
  now.layer = c.config.at("layer");
  auto load = torch::zeros({layers, experts}, torch::kInt64);
  auto pinned = torch::zeros({layers, experts}, torch::kBool);
  for (const Guess& g : policy.guess(now, Flags(c.in("cached_high"), c.in("cached_low")), &look)) {
    pinned[g.version.layer][g.version.expert] = true;
    if (g.load) load[g.version.layer][g.version.expert] = static_cast<int64_t>(g.version.precision);
  }
  return {{"load", load}, {"pinned", pinned}, {"stop_layer", torch::scalar_tensor(policy.stopped_at(), torch::kInt64)}};
});

MOIETY_OP("hobbit", "priority", [](const Case& c) -> Outputs {
  const auto last = c.in("last_used"), count = c.in("count"), high = c.in("count_high");
  const int64_t layers = last.size(0), experts = last.size(1);
  auto out = torch::empty({layers, experts}, torch::kFloat64);
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t e = 0; e < experts; ++e)
      out[l][e] = hobbit_priority({last[l][e].item<int64_t>(), count[l][e].item<int64_t>(), high[l][e].item<int64_t>()},
                                  l, {c.config.at("layer"), c.config.at("token")}, layers, weights_of(c));
  return {{"priority", out}};
});

MOIETY_OP("hobbit", "replay", [](const Case& c) -> Outputs {
  const auto experts = c.in("experts"), gates = c.in("gates").to(torch::kFloat32), start = c.in("sequence_start");
  ExpertTraces t;
  t.tokens = experts.size(0);
  t.layers = experts.size(1);
  t.top_k = experts.size(2);
  t.num_experts = c.config.at("num_experts");
  t.experts.assign(experts.const_data_ptr<int64_t>(), experts.const_data_ptr<int64_t>() + experts.numel());
  t.gates.assign(gates.const_data_ptr<float>(), gates.const_data_ptr<float>() + gates.numel());
  for (int64_t n = 0; n < t.tokens; ++n) t.sequence_start.push_back(start[n].item<bool>());
  t.validate("the case");
  const auto policy =
      std::make_shared<Hobbit>(t.layers, t.num_experts, c.config.at("t1"), c.config.at("t2"), 0, weights_of(c));
  const ReplayResult r = replay(t, policy, c.config.at("capacity_high"), c.config.at("capacity_low"),
                                c.config.at("bits_low"), c.config.at("bits_high"));
  const auto flags = [&](const std::vector<uint8_t>& f) {
    return torch::tensor(std::vector<int64_t>(f.begin(), f.end())).to(torch::kBool).view({t.layers, t.num_experts});
  };
  return {{"precision_used",
           torch::tensor(std::vector<int64_t>(r.precision_used.begin(), r.precision_used.end())).view(experts.sizes())},
          {"penalty", torch::scalar_tensor(r.penalty, torch::kFloat64)},
          {"counts", torch::tensor(std::vector<int64_t>(r.counts.begin(), r.counts.end()))},
          {"cached_high", flags(r.cached_high)},
          {"cached_low", flags(r.cached_low)}};
});

// The experts are written to a file and run by the store, as those of a model are.
MOIETY_OP("hobbit", "moe", [](const Case& c) -> Outputs {
  const torch::NoGradGuard frozen;
  const TemporaryFolder folder;
  const std::vector<std::string> names = {"w1", "w3", "w2", "w1_low", "w3_low", "w2_low"};
  std::vector<TensorInfo> infos;
  std::map<std::string, Tensor> tensors;
  for (const auto& name : names) {
    tensors[name] = c.in(name).to(torch::kFloat32).contiguous();
    infos.push_back({name, Format::F32, tensors[name].sizes().vec()});
  }
  SafetensorsWriter writer(folder / "experts.safetensors", infos);
  for (const auto& name : names)
    writer.write(name, {static_cast<const std::byte*>(tensors[name].const_data_ptr()), tensors[name].nbytes()});
  writer.finish();
  const auto file = SafetensorsFile::open(folder / "experts.safetensors");

  const auto x = c.in("x").to(torch::kFloat32);
  const int64_t rows = x.size(0), count = tensors["w1"].size(0), k = c.config.at("top_k");
  CheckpointExperts::Layer layer;
  layer.high.resize(static_cast<size_t>(count));
  layer.low.resize(layer.high.size());
  std::vector<Linear> matrices[3];
  for (int64_t e = 0; e < count; ++e)
    for (size_t i = 0; i < 3; ++i) {
      auto& high = layer.high[static_cast<size_t>(e)].matrices[i];
      high = select_first(file->get(names[i]), e);
      layer.low[static_cast<size_t>(e)].matrices[i] = select_first(file->get(names[i + 3]), e);
      matrices[i].push_back(Linear(high));
    }
  const auto experts = std::make_shared<GatedExperts>(LinearStack(matrices[0]), LinearStack(matrices[1]),
                                                      LinearStack(matrices[2]), activation("silu"));
  const auto router = router_over(c.in("router_weight").to(torch::kFloat32), k);
  OffloadOptions options;
  options.skip_renormalize = c.config.at("skip_renormalize");
  options.capacity_high = options.capacity_low = count;
  const auto policy = std::make_shared<Hobbit>(1, count, c.config.at("t1"), c.config.at("t2"), 0, HobbitWeights());
  const auto offload = Offload::over(
      {experts}, std::make_shared<CheckpointExperts>(std::vector{layer}, Format::F32, false), policy, k, options);
  const auto high = c.in("cached_high"), low = c.in("cached_low");
  for (int64_t e = 0; e < count; ++e) {
    if (high[e].item<bool>()) offload->store().preload({0, e, Precision::high});
    if (low[e].item<bool>()) offload->store().preload({0, e, Precision::low});
  }
  Pass pass;
  const Routing r = router->route(x, pass.at("ffn"), pass);
  OffloadedExperts layer_on_disk(experts, offload, 0);
  const auto y = layer_on_disk.mix_in(x, Dispatch::of(r, count), pass);
  auto precision = torch::empty({rows, k}, torch::kInt64);
  for (int64_t n = 0; n < rows; ++n) {
    const Demand d = demand_of(r, n);
    for (int64_t i = 0; i < k; ++i)
      for (const Use& u : layer_on_disk.last())
        if (u.expert == d.pairs[static_cast<size_t>(i)].expert) precision[n][i] = static_cast<int64_t>(u.used);
  }
  return {{"y", y}, {"precision_used", precision}};
});

}  // namespace
}  // namespace moiety::conform
