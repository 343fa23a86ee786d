// EdgeMoE: channel-wise quantization, the assignment of bit widths, path tables, eviction, a replayed trace.
#include <torch/torch.h>

#include "conform.h"
#include "moiety/compress/edgemoe.h"
#include "moiety/kernels/channel_quant.h"
#include "moiety/kernels/half.h"
#include "moiety/offload/edgemoe.h"

namespace moiety::conform {
namespace {

template <class T>
std::span<const T> span_of(const torch::Tensor& t) {
  return {t.const_data_ptr<T>(), static_cast<size_t>(t.numel())};
}

torch::Tensor integers(const std::vector<int64_t>& values) {
  return torch::tensor(values, torch::kInt64);
}

MOIETY_OP("edgemoe", "quantize", [](const Case& c) -> Outputs {
  const int bits = c.config.at("bits");
  const auto int2 = c.config.value("int2_scale", std::string("max")) == "fit" ? Int2Scale::fit : Int2Scale::max;
  const auto weight = c.in("weight").to(torch::kFloat32).contiguous();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  auto q = torch::empty({rows, columns}, torch::kInt8);
  auto scale = torch::empty({rows}, torch::kFloat32), back = torch::empty({rows, columns}, torch::kFloat32);
  std::vector<std::byte> packed(static_cast<size_t>(channel_row_bytes(columns, bits)));
  for (int64_t r = 0; r < rows; ++r) {
    int8_t* codes = q.data_ptr<int8_t>() + r * columns;
    const uint16_t s =
        quantize_channel(span_of<float>(weight).subspan(static_cast<size_t>(r * columns), static_cast<size_t>(columns)),
                         bits, int2, codes);
    pack_channel({codes, static_cast<size_t>(columns)}, bits, packed.data());
    dequantize_channel(packed.data(), s, bits, {back.data_ptr<float>() + r * columns, static_cast<size_t>(columns)});
    scale.data_ptr<float>()[r] = half_to_float(s);
  }
  return {{"q", q.to(torch::kInt64)}, {"scale", scale}, {"weight_dequantized", back}};
});

MOIETY_OP("edgemoe", "assign", [](const Case& c) -> Outputs {
  EdgeMoeConfig config;
  config.tolerance = c.config.at("tolerance");
  config.widths = c.config.at("widths").get<std::vector<int64_t>>();
  config.k0 = c.config.at("k0");
  config.step = c.config.at("step");
  const auto uniform = c.in("uniform_loss").to(torch::kFloat64), sensitivity = c.in("sensitivity").to(torch::kFloat64),
             at_k = c.in("loss_at_k").to(torch::kFloat64);
  const auto losses = span_of<double>(uniform);
  const auto a = assign_bits(
      config, {losses.begin(), losses.end()}, span_of<double>(sensitivity),
      [&](int64_t k, const std::vector<int64_t>&) { return at_k[k].item<double>(); }, false);
  return {{"bits", integers(a.bits).view(sensitivity.sizes())},
          {"k", torch::scalar_tensor(a.k, torch::kInt64)},
          {"bounds", integers({a.bounds.low, a.bounds.high})},
          {"order", integers(a.order)}};
});

ExpertPaths paths_of(const Case& c) {
  const auto trace = c.in("profile_trace").to(torch::kInt64).contiguous();
  return {span_of<int64_t>(trace), trace.size(1), trace.size(2), c.config.at("num_experts")};
}

MOIETY_OP("edgemoe", "predict", [](const Case& c) -> Outputs {
  const auto paths = paths_of(c);
  const auto layer = c.in("layer").to(torch::kInt64), previous = c.in("previous").to(torch::kInt64).contiguous();
  const int64_t queries = layer.size(0), slots = previous.size(2);
  auto probability = torch::empty({queries, paths.experts()}, torch::kFloat64);
  std::vector<int64_t> order;
  for (int64_t q = 0; q < queries; ++q) {
    const auto rows = span_of<int64_t>(previous).subspan(static_cast<size_t>(2 * q * slots));
    const auto p = paths.probability(layer[q].item<int64_t>(), expert_set(rows.first(static_cast<size_t>(slots))),
                                     expert_set(rows.subspan(static_cast<size_t>(slots), static_cast<size_t>(slots))));
    std::copy(p.begin(), p.end(), probability.data_ptr<double>() + q * paths.experts());
    for (const int64_t e : descending(p)) order.push_back(e);
  }
  return {{"probability", probability}, {"order", integers(order).view(probability.sizes())}};
});

MOIETY_OP("edgemoe", "evict", [](const Case& c) -> Outputs {
  const auto frequency = c.in("frequency").to(torch::kInt64).contiguous(), cached = c.in("cached").view({-1}),
             pinned = c.in("pinned").view({-1});
  const int64_t layers = frequency.size(0), experts = frequency.size(1), running = c.config.at("layer");
  const auto f = span_of<int64_t>(frequency);
  EdgeMoe policy(layers, experts, {f.begin(), f.end()}, {});
  auto score = torch::empty({layers, experts}, torch::kFloat64);
  std::vector<ExpertVersion> candidates;
  for (int64_t x = 0; x < layers * experts; ++x) {
    score.data_ptr<double>()[x] = eviction_score(f[static_cast<size_t>(x)], layers_ahead(x / experts, running, layers));
    if (cached[x].item<bool>() && !pinned[x].item<bool>())
      candidates.push_back({x / experts, x % experts, Precision::high});
  }
  auto victim = integers({-1, -1});
  if (!candidates.empty()) {
    const ExpertVersion& v = candidates[policy.victim(candidates, {running, 1})];
    victim = integers({v.layer, v.expert});
  }
  return {{"score", score}, {"victim", victim}};
});

MOIETY_OP("edgemoe", "replay", [](const Case& c) -> Outputs {
  const auto paths = std::make_shared<const ExpertPaths>(paths_of(c));
  const auto trace = c.in("experts").to(torch::kInt64).contiguous();
  EdgeMoePolicyConfig config;
  config.preload = c.config.at("preload");
  const auto r = replay_paths(span_of<int64_t>(trace), trace.size(1), trace.size(2), paths->experts(),
                              std::make_shared<EdgeMoe>(paths, config), c.config.at("capacity"));
  auto cached = torch::zeros({paths->layers(), paths->experts()}, torch::kBool);
  for (size_t x = 0; x < r.cached.size(); ++x) cached.data_ptr<bool>()[x] = r.cached[x];
  return {{"counts", integers({r.hits, r.demand, r.preloads, r.preloads_used, r.preloads_dropped})},
          {"cached", cached}};
});

}  // namespace
}  // namespace moiety::conform
