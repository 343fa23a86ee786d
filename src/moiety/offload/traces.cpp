#include "moiety/offload/traces.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "moiety/base/error.h"
#include "moiety/io/safetensors.h"
#include "moiety/offload/residency.h"

namespace moiety {

void ExpertTraces::validate(const std::string& where) const {
  check(tokens > 0 && layers > 0 && top_k > 0 && num_experts > 0,
        "{}: a trace of {} tokens, {} layers and {} of {} experts is empty", where, tokens, layers, top_k, num_experts);
  const auto all = static_cast<size_t>(tokens * layers * top_k);
  check(experts.size() == all && gates.size() == all && sequence_start.size() == static_cast<size_t>(tokens),
        "{}: experts, gates and sequence_start do not fit {} tokens, {} layers and {} experts a token", where, tokens,
        layers, top_k);
  check(sequence_start[0] != 0, "{}: the first token must start a sequence", where);
  std::vector<int64_t> seen(static_cast<size_t>(num_experts), -1);
  for (int64_t step = 0; step < tokens * layers; ++step) {
    double sum = 0.0;
    for (int64_t k = 0; k < top_k; ++k) {
      const auto i = static_cast<size_t>(step * top_k + k);
      const int64_t e = experts[i];
      check(e >= 0 && e < num_experts, "{}: token {}, layer {} names expert {}, but there are {}", where, step / layers,
            step % layers, e, num_experts);
      check(seen[static_cast<size_t>(e)] != step, "{}: token {}, layer {} names expert {} twice", where, step / layers,
            step % layers, e);
      seen[static_cast<size_t>(e)] = step;
      check(gates[i] >= 0.f, "{}: token {}, layer {} has a gate of {}", where, step / layers, step % layers, gates[i]);
      sum += gates[i];
    }
    check(std::abs(sum - 1.0) <= 1e-3, "{}: the gates of token {}, layer {} add up to {}, not to 1", where,
          step / layers, step % layers, sum);
  }
}

ExpertTraces read_traces(const std::string& path) {
  const auto file = SafetensorsFile::open(path);
  for (const char* name : {"experts", "gates", "sequence_start"})
    check(file->has(name), "{} is no trace of experts: it has no tensor `{}`; `moiety analyze expert-traces` makes one",
          path, name);
  const TensorView experts = file->get("experts"), gates = file->get("gates"), start = file->get("sequence_start");
  check(experts.shape.size() == 3 && gates.shape == experts.shape && start.shape.size() == 1 &&
            start.shape[0] == experts.shape[0],
        "{}: experts and gates must be [tokens, layers, K], sequence_start [tokens]", path);
  check(experts.format == Format::I64 && gates.format == Format::F32 && start.format == Format::BOOL,
        "{}: experts must be int64, gates float32 and sequence_start bool", path);
  ExpertTraces t;
  t.tokens = experts.shape[0];
  t.layers = experts.shape[1];
  t.top_k = experts.shape[2];
  t.experts.resize(static_cast<size_t>(experts.elements()));
  t.gates.resize(t.experts.size());
  t.sequence_start.resize(static_cast<size_t>(t.tokens));
  std::memcpy(t.experts.data(), experts.data.data(), experts.data.size());
  std::memcpy(t.gates.data(), gates.data.data(), gates.data.size());
  std::memcpy(t.sequence_start.data(), start.data.data(), start.data.size());
  const auto& meta = file->metadata();
  const auto number = meta.find("num_experts");
  check(number != meta.end(), "{}: the metadata has no num_experts", path);
  t.num_experts = std::atoll(number->second.c_str());
  if (const auto hash = meta.find("router_hash"); hash != meta.end()) t.router_hash = hash->second;
  t.validate(path);
  return t;
}

void write_traces(const std::string& path, const ExpertTraces& t) {
  t.validate(path);
  const std::vector<int64_t> shape{t.tokens, t.layers, t.top_k};
  SafetensorsWriter writer(
      path,
      {{"experts", Format::I64, shape}, {"gates", Format::F32, shape}, {"sequence_start", Format::BOOL, {t.tokens}}},
      {{"num_experts", std::to_string(t.num_experts)}, {"router_hash", t.router_hash}});
  writer.write("experts", std::as_bytes(std::span(t.experts)));
  writer.write("gates", std::as_bytes(std::span(t.gates)));
  writer.write("sequence_start", std::as_bytes(std::span(t.sequence_start)));
  writer.finish();
}

ReplayResult replay(const ExpertTraces& t, std::shared_ptr<OffloadPolicy> policy, int64_t capacity_high,
                    int64_t capacity_low, double bits_low, double bits_high) {
  check(bits_low > 0 && bits_high > 0, "versions of {} and {} bits are impossible", bits_low, bits_high);
  check(capacity_high >= t.top_k, "the high-precision cache holds {} experts, a token needs {}", capacity_high,
        t.top_k);
  Residency residency({t.layers, t.num_experts, capacity_high, capacity_low}, std::move(policy));
  ReplayResult out;
  out.precision_used.resize(t.experts.size());
  int64_t token = 0;
  Demand demand;
  for (int64_t n = 0; n < t.tokens; ++n) {
    if (t.sequence_start[static_cast<size_t>(n)] != 0) {
      residency.begin_sequence();
      token = 0;
    }
    ++token;
    for (int64_t l = 0; l < t.layers; ++l) {
      const auto first = static_cast<size_t>((n * t.layers + l) * t.top_k);
      demand.layer = l;
      demand.token = token;
      demand.pairs.clear();
      for (int64_t k = 0; k < t.top_k; ++k) {
        const size_t i = first + static_cast<size_t>(k);
        demand.pairs.push_back({0, t.experts[i], t.gates[i]});
      }
      sort_pairs(demand, t.num_experts);
      for (Use& u : residency.look_up(demand)) {
        residency.record(u, demand);
        if (!u.hit && u.used != Precision::skip && !residency.place(u, demand)) residency.keep_out();
        for (int64_t k = 0; k < t.top_k; ++k)
          if (t.experts[first + static_cast<size_t>(k)] == u.expert)
            out.precision_used[first + static_cast<size_t>(k)] = static_cast<int8_t>(u.used);
      }
      residency.end_layer(l);
    }
  }
  const ResidencyCounts& c = residency.counts();
  out.counts = {c.hit_high, c.hit_low, c.miss_high, c.miss_low, c.skip};
  out.penalty = static_cast<double>(c.miss_high) + static_cast<double>(c.miss_low) * bits_low / bits_high;
  for (int64_t l = 0; l < t.layers; ++l)
    for (int64_t e = 0; e < t.num_experts; ++e) {
      out.cached_high.push_back(residency.has({l, e, Precision::high}));
      out.cached_low.push_back(residency.has({l, e, Precision::low}));
    }
  return out;
}

HobbitCalibration calibrate_hobbit(const ExpertTraces& t, double t1, double t2, int64_t capacity_high,
                                   int64_t capacity_low, double bits_low, double bits_high) {
  HobbitCalibration best;
  best.t1 = t1;
  best.t2 = t2;
  best.capacity_high = capacity_high;
  best.capacity_low = capacity_low;
  best.router_hash = t.router_hash;
  const auto penalty = [&](const HobbitWeights& w) {
    return replay(t, std::make_shared<Hobbit>(t.layers, t.num_experts, t1, t2, 0, w), capacity_high, capacity_low,
                  bits_low, bits_high)
        .penalty;
  };
  best.penalty_even = penalty({});
  bool first = true;
  for (int lru = 0; lru <= 10; ++lru)
    for (int lfu = 0; lru + lfu <= 10; ++lfu)
      for (int lhu = 0; lru + lfu + lhu <= 10; ++lhu) {
        const HobbitWeights w{lru / 10.0, lfu / 10.0, lhu / 10.0, (10 - lru - lfu - lhu) / 10.0};
        const double p = penalty(w);
        if (!first && p >= best.penalty) continue;
        first = false;
        best.penalty = p;
        best.weights = w;
      }
  return best;
}

std::pair<double, double> score_quantiles(const ExpertTraces& t, double share_high, double share_high_or_low) {
  check(share_high >= 0.0 && share_high <= share_high_or_low && share_high_or_low <= 1.0,
        "shares of {} in high and {} in high or low precision are impossible", share_high, share_high_or_low);
  std::vector<double> scores;
  for (int64_t step = 0; step < t.tokens * t.layers; ++step) {
    Demand d;
    for (int64_t k = 0; k < t.top_k; ++k) {
      const auto i = static_cast<size_t>(step * t.top_k + k);
      d.pairs.push_back({0, t.experts[i], t.gates[i]});
    }
    sort_pairs(d, t.num_experts);
    for (const Scored& s : hobbit_scores(d.pairs, 1.0, 1.0)) scores.push_back(s.score);
  }
  std::sort(scores.begin(), scores.end());
  // The largest score that is still among the share: `<=` then takes in about that many.
  const auto quantile = [&](double share) {
    const auto last = static_cast<int64_t>(std::llround(share * static_cast<double>(scores.size()))) - 1;
    return last < 0 ? 0.0 : std::min(1.0, scores[static_cast<size_t>(last)]);
  };
  return {quantile(share_high), quantile(share_high_or_low)};
}

}  // namespace moiety
