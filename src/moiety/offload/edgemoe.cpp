#include "moiety/offload/edgemoe.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/io/safetensors.h"
#include "moiety/offload/residency.h"

namespace moiety {
namespace {

void append(std::string& key, int64_t value) {
  const auto small = static_cast<uint32_t>(value);
  key.append(reinterpret_cast<const char*>(&small), sizeof small);
}

// A layer and the sets of the layers before it: sizes make the parts distinct.
std::string key_of(int64_t layer, std::initializer_list<const ExpertSet*> sets) {
  std::string key;
  append(key, layer);
  for (const ExpertSet* set : sets) {
    append(key, static_cast<int64_t>(set->size()));
    for (const int64_t e : *set) append(key, e);
  }
  return key;
}

}  // namespace

void EdgeMoeEviction::fields(Fields& f) {
  f("distance", distance, "layers until an expert's layer runs again, or the formula as the paper prints it")
      .choices({"ahead", "printed"});
  f("online", online, "count the uses of the run beside those of the profile");
}

void EdgeMoePolicyConfig::fields(Fields& f) {
  f("preload", preload, "experts of the next layer that are read ahead").min(0);
  f("capacity", capacity, "experts in the buffer; 0: as many as the memory budget holds").min(0);
  f("expert_paths", expert_paths, "paths of a text, from `moiety analyze expert-paths`");
  f("evict", evict, "what leaves a full buffer");
}

ExpertSet expert_set(std::span<const int64_t> row) {
  ExpertSet set;
  for (const int64_t e : row)
    if (e >= 0) set.push_back(e);
  std::sort(set.begin(), set.end());
  set.erase(std::unique(set.begin(), set.end()), set.end());
  return set;
}

ExpertPaths::ExpertPaths(std::span<const int64_t> trace, int64_t layers, int64_t slots, int64_t experts)
    : layers_(layers), experts_(experts), frequency_(static_cast<size_t>(std::max<int64_t>(0, layers * experts))) {
  check(layers > 0 && slots > 0 && experts > 0, "a trace of {} layers with {} slots and {} experts says nothing",
        layers, slots, experts);
  const auto row = static_cast<size_t>(layers * slots);
  check(!trace.empty() && trace.size() % row == 0,
        "a trace of {} numbers does not hold whole tokens of {} layers with {} slots", trace.size(), layers, slots);
  tokens_ = static_cast<int64_t>(trace.size() / row);
  const auto count = [](Counts& c, const ExpertSet& set) {
    ++c.tokens;
    for (const int64_t e : set) {
      auto at = std::find_if(c.experts.begin(), c.experts.end(), [e](const auto& p) { return p.first == e; });
      if (at == c.experts.end()) at = c.experts.emplace(at, static_cast<int32_t>(e), 0);
      ++at->second;
    }
  };
  for (int64_t t = 0; t < tokens_; ++t) {
    ExpertSet before2, before1;
    for (int64_t n = 0; n < layers; ++n) {
      const auto chosen = trace.subspan(static_cast<size_t>((t * layers + n) * slots), static_cast<size_t>(slots));
      for (const int64_t e : chosen)
        check(e >= -1 && e < experts, "token {}, layer {} of the trace: there is no expert {} among {}", t, n, e,
              experts);
      ExpertSet set = expert_set(chosen);
      for (const int64_t e : set) ++frequency_[static_cast<size_t>(n * experts + e)];
      if (n >= 1) count(singles_[key_of(n, {&before1})], set);
      if (n >= 2) count(pairs_[key_of(n, {&before2, &before1})], set);
      before2 = std::move(before1);
      before1 = std::move(set);
    }
  }
}

std::optional<std::vector<double>> ExpertPaths::found(const Table& table, const std::string& key) const {
  const auto it = table.find(key);
  if (it == table.end()) return std::nullopt;
  std::vector<double> p(static_cast<size_t>(experts_));
  for (const auto& [e, tokens] : it->second.experts)
    p[static_cast<size_t>(e)] = static_cast<double>(tokens) / static_cast<double>(it->second.tokens);
  return p;
}

std::vector<double> ExpertPaths::share(int64_t layer) const {
  check(layer >= 0 && layer < layers_, "there is no layer {} among {}", layer, layers_);
  std::vector<double> p(static_cast<size_t>(experts_));
  for (int64_t e = 0; e < experts_; ++e)
    p[static_cast<size_t>(e)] =
        static_cast<double>(frequency_[static_cast<size_t>(layer * experts_ + e)]) / static_cast<double>(tokens_);
  return p;
}

std::vector<double> ExpertPaths::probability_of_one(int64_t layer, const ExpertSet& before1) const {
  if (layer >= 1)
    if (auto p = found(singles_, key_of(layer, {&before1}))) return *p;
  return share(layer);
}

std::vector<double> ExpertPaths::probability(int64_t layer, const ExpertSet& before2, const ExpertSet& before1) const {
  if (layer >= 2)
    if (auto p = found(pairs_, key_of(layer, {&before2, &before1}))) return *p;
  return probability_of_one(layer, before1);
}

std::vector<int64_t> descending(std::span<const double> values) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  return order;
}

int64_t layers_ahead(int64_t layer, int64_t running, int64_t layers, bool printed) {
  const int64_t ahead = printed ? layers - layer + running : layer - running + layers;
  return ahead % layers == 0 ? layers : ahead % layers;
}

double eviction_score(int64_t frequency, int64_t ahead) {
  return -static_cast<double>(frequency) / static_cast<double>(ahead);
}

namespace {

template <class T>
std::vector<std::byte> as_bytes_of(std::span<const int64_t> values) {
  std::vector<T> out(values.begin(), values.end());
  const auto bytes = std::as_bytes(std::span(out));
  return {bytes.begin(), bytes.end()};
}

template <class T>
std::vector<int64_t> integers_of(std::span<const std::byte> bytes) {
  std::vector<int64_t> out(bytes.size() / sizeof(T));
  for (size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    out[i] = value;
  }
  return out;
}

}  // namespace

void write_expert_paths(const std::string& file, std::span<const int64_t> trace, int64_t layers, int64_t slots,
                        int64_t experts, const std::string& router_hash) {
  const ExpertPaths checked(trace, layers, slots, experts);
  const bool small = experts - 1 <= std::numeric_limits<int8_t>::max(),
             medium = experts - 1 <= std::numeric_limits<int16_t>::max();
  SafetensorsWriter writer(file,
                           {{"profile_trace",
                             small    ? Format::I8
                             : medium ? Format::I16
                                      : Format::I32,
                             {checked.tokens(), layers, slots}}},
                           {{"num_experts", std::to_string(experts)}, {"router_hash", router_hash}});
  writer.write("profile_trace", small    ? as_bytes_of<int8_t>(trace)
                                : medium ? as_bytes_of<int16_t>(trace)
                                         : as_bytes_of<int32_t>(trace));
  writer.finish();
}

ExpertPaths read_expert_paths(const std::string& file, const std::string& router_hash, int64_t layers,
                              int64_t experts) {
  const auto in = SafetensorsFile::open(file);
  const auto meta = [&](const char* key) {
    const auto it = in->metadata().find(key);
    return it == in->metadata().end() ? std::string() : it->second;
  };
  check(in->has("profile_trace"),
        "{} holds no expert paths (there is no tensor profile_trace): record them with `moiety analyze expert-paths`",
        file);
  const TensorView v = in->get("profile_trace");
  check(v.shape.size() == 3, "{}: profile_trace has {} dimensions, not [tokens, layers, experts a token]", file,
        v.shape.size());
  const std::string stated = meta("num_experts");
  const int64_t count =
      !stated.empty() && stated.size() < 10 && stated.find_first_not_of("0123456789") == std::string::npos
          ? std::stoll(stated)
          : 0;
  check(count > 0, "{}: metadata num_experts is `{}`, not a number of experts", file, stated);
  check(router_hash.empty() || meta("router_hash") == router_hash,
        "{} was recorded with another model, whose routers are others: record the paths of this one with `moiety "
        "analyze expert-paths`",
        file);
  check((layers == 0 || v.shape[1] == layers) && (experts == 0 || count == experts),
        "{} holds the paths of {} layers of {} experts, the model has {} of {}", file, v.shape[1], count, layers,
        experts);
  std::vector<int64_t> trace;
  switch (v.format) {
    case Format::I8:
      trace = integers_of<int8_t>(v.data);
      break;
    case Format::U8:
      trace = integers_of<uint8_t>(v.data);
      break;
    case Format::I16:
      trace = integers_of<int16_t>(v.data);
      break;
    case Format::I32:
      trace = integers_of<int32_t>(v.data);
      break;
    case Format::I64:
      trace = integers_of<int64_t>(v.data);
      break;
    default:
      fail("{}: profile_trace is {}, not integers", file, info(v.format).name);
  }
  try {
    return {trace, v.shape[1], v.shape[2], count};
  } catch (const Error& e) {
    fail("{}: {}", file, e.what());
  }
}

EdgeMoe::EdgeMoe(int64_t layers, int64_t experts, std::vector<int64_t> frequency, Predictor predictor,
                 EdgeMoePolicyConfig config)
    : layers_(layers),
      experts_(experts),
      frequency_(std::move(frequency)),
      predictor_(std::move(predictor)),
      config_(std::move(config)) {
  check(layers > 0 && experts > 0 && static_cast<int64_t>(frequency_.size()) == layers * experts,
        "{} counts do not fit {} layers of {} experts", frequency_.size(), layers, experts);
  check(config_.preload >= 0, "{} experts cannot be read ahead", config_.preload);
  EdgeMoe::begin_sequence();
}

EdgeMoe::EdgeMoe(std::shared_ptr<const ExpertPaths> paths, EdgeMoePolicyConfig config)
    : EdgeMoe(
          paths->layers(), paths->experts(), paths->frequency(),
          [paths](int64_t layer, const ExpertSet& before2, const ExpertSet& before1) {
            return paths->probability(layer, before2, before1);
          },
          std::move(config)) {}

void EdgeMoe::begin_sequence() {
  path_.assign(static_cast<size_t>(layers_), {});
}

void EdgeMoe::used(const ExpertVersion& v, int64_t tokens, bool, const Moment&) {
  if (config_.evict.online) frequency_[static_cast<size_t>(v.layer * experts_ + v.expert)] += tokens;
}

size_t EdgeMoe::victim(std::span<const ExpertVersion> candidates, const Moment& now) {
  const bool printed = config_.evict.distance == "printed";
  size_t best = 0;
  double best_score = 0.0;
  int64_t best_ahead = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const ExpertVersion& v = candidates[i];
    const int64_t ahead = layers_ahead(v.layer, now.layer, layers_, printed);
    const double score = eviction_score(frequency_[static_cast<size_t>(v.layer * experts_ + v.expert)], ahead);
    if (i > 0 && (score < best_score || (score == best_score && ahead <= best_ahead))) continue;
    best = i;
    best_score = score;
    best_ahead = ahead;
  }
  return best;
}

std::vector<Guess> EdgeMoe::guess(const Demand& demand, const Cached&, LookAhead*) {
  static const ExpertSet none;
  std::vector<Guess> out;
  if (demand.rows > 1) {
    begin_sequence();
    return out;
  }
  std::vector<int64_t> chosen;
  for (const auto& pair : demand.pairs) chosen.push_back(pair.expert);
  path_[static_cast<size_t>(demand.layer)] = expert_set(chosen);
  if (config_.preload == 0) return out;
  const int64_t next = (demand.layer + 1) % layers_;
  const auto p = predictor_(next, next >= 2 ? path_[static_cast<size_t>(next - 2)] : none,
                            next >= 1 ? path_[static_cast<size_t>(next - 1)] : none);
  for (const int64_t e : descending(p)) {
    if (static_cast<int64_t>(out.size()) == config_.preload || p[static_cast<size_t>(e)] <= 0.0) break;
    out.push_back({{next, e, Precision::high}, true});
  }
  return out;
}

std::vector<ExpertVersion> EdgeMoe::initial() const {
  std::vector<ExpertVersion> out;
  const std::vector<double> f(frequency_.begin(), frequency_.end());
  for (const int64_t x : descending(f)) out.push_back({x / experts_, x % experts_, Precision::high});
  return out;
}

nlohmann::json EdgeMoe::settings() const {
  return {{"policy", "edgemoe"},
          {"preload", config_.preload},
          {"expert_paths", config_.expert_paths},
          {"evict", {{"distance", config_.evict.distance}, {"online", config_.evict.online}}}};
}

namespace {

// Notes what is read ahead.
class Noted : public Loader {
 public:
  void load(const ExpertVersion& version, int64_t, bool is_ahead) override {
    if (is_ahead) ahead.push_back(version);
  }
  std::vector<ExpertVersion> ahead;
};

}  // namespace

PathReplay replay_paths(std::span<const int64_t> trace, int64_t layers, int64_t slots, int64_t experts,
                        std::shared_ptr<OffloadPolicy> policy, int64_t capacity) {
  check(layers > 0 && slots > 0 && experts > 0 && trace.size() % static_cast<size_t>(layers * slots) == 0,
        "a trace of {} numbers does not hold whole tokens of {} layers with {} slots", trace.size(), layers, slots);
  check(capacity >= slots, "a buffer of {} experts does not hold the {} that a token uses in a layer", capacity, slots);
  for (size_t i = 0; i < trace.size(); ++i)
    check(trace[i] >= -1 && trace[i] < experts, "token {} of the trace: there is no expert {} among {}",
          static_cast<int64_t>(i) / (layers * slots), trace[i], experts);
  PathReplay out;
  Noted noted;
  Residency residency({.layers = layers, .experts = experts, .high = capacity, .low = 0}, policy, &noted);
  policy->begin({.layers = layers, .experts = experts, .top_k = slots, .capacity_high = capacity});
  residency.begin_sequence();
  const auto tokens = static_cast<int64_t>(trace.size()) / (layers * slots);
  if (tokens > 0) residency.guess_ahead({.layer = layers - 1, .token = 0, .rows = 1, .pairs = {}}, nullptr);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < layers; ++n) {
      Demand demand{.layer = n, .token = t + 1, .rows = 1, .pairs = {}};
      // The router's order is that of descending gates.
      for (int64_t k = 0; k < slots; ++k)
        if (const int64_t e = trace[static_cast<size_t>((t * layers + n) * slots + k)]; e >= 0)
          demand.pairs.push_back({0, e, static_cast<double>(slots - k)});
      for (const ExpertVersion& v : noted.ahead)
        out.preloads_used += std::any_of(demand.pairs.begin(), demand.pairs.end(),
                                         [&](const Demand::Pair& p) { return p.expert == v.expert; });
      noted.ahead.clear();
      auto uses = residency.look_up(demand);
      for (Use& u : uses) {
        residency.record(u, demand);
        if (!u.hit && !residency.place(u, demand)) residency.keep_out();
      }
      // The last layer of all has nothing after it.
      if (t + 1 < tokens || n + 1 < layers) residency.guess_ahead(demand, nullptr);
      residency.end_layer(n);
    }
  const ResidencyCounts& c = residency.counts();
  out.hits = c.hit_high;
  out.demand = c.miss_high;
  out.preloads = c.ahead;
  out.preloads_dropped = c.ahead_dropped;
  for (int64_t x = 0; x < layers * experts; ++x)
    out.cached.push_back(residency.has({x / experts, x % experts, Precision::high}));
  return out;
}

namespace {

const RegisterMethod registered({
    .slug = "edgemoe",
    .kind = "policy",
    .title = "EdgeMoE",
    .summary = "experts on disk, read ahead along the paths that tokens take through the layers",
    .paper = {"EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models", "Yi et al.", 2023, "2308.14352"},
    .sites = {"ffn"},
    .config = describe<EdgeMoePolicyConfig>,
    .make = MakeOffloadPolicy([](const PolicySetup& setup, const nlohmann::json& settings) {
      const auto config = parse<EdgeMoePolicyConfig>(settings, "edgemoe");
      check(!config.expert_paths.empty(),
            "edgemoe reads experts ahead along the paths that tokens take: record them with `moiety analyze "
            "expert-paths MODEL --text TEXT -o FILE` and give --expert-paths FILE");
      return std::make_shared<EdgeMoe>(std::make_shared<const ExpertPaths>(read_expert_paths(
                                           config.expert_paths, setup.router_hash, setup.layers, setup.experts)),
                                       config);
    }),
});

}  // namespace
}  // namespace moiety
