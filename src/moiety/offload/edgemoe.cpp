#include "moiety/offload/edgemoe.h"

#include <algorithm>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"

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
}

void EdgeMoePolicyConfig::fields(Fields& f) {
  f("preload", preload, "experts of the next layer that are read ahead").min(0);
  f("capacity", capacity, "experts in the buffer; 0: as many as the memory budget holds").min(0);
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

ExpertBuffer::ExpertBuffer(int64_t layers, int64_t experts, int64_t capacity, std::vector<int64_t> frequency,
                           EdgeMoeEviction evict)
    : layers_(layers),
      experts_(experts),
      capacity_(capacity),
      frequency_(std::move(frequency)),
      printed_(evict.distance == "printed"),
      cached_(static_cast<size_t>(layers * experts)),
      pinned_(static_cast<size_t>(layers * experts)) {
  check(static_cast<int64_t>(frequency_.size()) == layers * experts, "{} counts do not fit {} layers of {} experts",
        frequency_.size(), layers, experts);
  check(capacity >= 0, "a buffer cannot hold {} experts", capacity);
}

void ExpertBuffer::unpin(int64_t expert) {
  auto& pins = pinned_[static_cast<size_t>(expert)];
  if (pins > 0) --pins;
}

std::optional<int64_t> ExpertBuffer::victim(int64_t running) const {
  std::optional<int64_t> best;
  double best_score = 0.0;
  int64_t best_ahead = 0;
  for (int64_t x = 0; x < layers_ * experts_; ++x) {
    if (!cached(x) || pinned(x)) continue;
    const int64_t ahead = layers_ahead(x / experts_, running, layers_, printed_);
    const double score = eviction_score(frequency_[static_cast<size_t>(x)], ahead);
    if (!best || score > best_score || (score == best_score && ahead > best_ahead)) {
      best = x;
      best_score = score;
      best_ahead = ahead;
    }
  }
  return best;
}

ExpertBuffer::Placed ExpertBuffer::insert(int64_t expert, int64_t running) {
  check(!cached(expert), "expert {} of layer {} is in the buffer already", expert % experts_, expert / experts_);
  Placed placed;
  if (size_ >= capacity_) {
    placed.replaced = victim(running);
    if (!placed.replaced) return placed;
    remove(*placed.replaced);
  }
  placed.kept = true;
  cached_[static_cast<size_t>(expert)] = true;
  ++size_;
  return placed;
}

void ExpertBuffer::remove(int64_t expert) {
  if (!cached(expert)) return;
  cached_[static_cast<size_t>(expert)] = false;
  --size_;
}

std::vector<int64_t> ExpertBuffer::most_frequent() const {
  std::vector<double> f(frequency_.begin(), frequency_.end());
  auto order = descending(f);
  order.resize(std::min(order.size(), static_cast<size_t>(capacity_)));
  return order;
}

EdgeMoeSteps::EdgeMoeSteps(int64_t layers, int64_t experts, Predictor predictor, ExpertBuffer& buffer, int64_t preload)
    : layers_(layers), experts_(experts), preload_(preload), predictor_(std::move(predictor)), buffer_(buffer) {
  check(preload >= 0, "{} experts cannot be read ahead", preload);
  begin_sequence();
}

void EdgeMoeSteps::begin_sequence() {
  path_.assign(static_cast<size_t>(layers_), {});
}

std::vector<EdgeMoeSteps::Preload> EdgeMoeSteps::preload(int64_t layer) {
  static const ExpertSet none;
  std::vector<Preload> out;
  if (preload_ == 0) return out;
  const auto p = predictor_(layer, layer >= 2 ? path_[static_cast<size_t>(layer - 2)] : none,
                            layer >= 1 ? path_[static_cast<size_t>(layer - 1)] : none);
  const int64_t running = (layer + layers_ - 1) % layers_;
  for (const int64_t e : descending(p)) {
    if (static_cast<int64_t>(out.size()) == preload_ || p[static_cast<size_t>(e)] <= 0.0) break;
    const int64_t x = layer * experts_ + e;
    Preload entry{x, Preload::cached, {}};
    if (!buffer_.cached(x)) {
      const auto placed = buffer_.insert(x, running);
      entry.kind = placed.kept ? Preload::load : Preload::dropped;
      entry.replaced = placed.replaced;
    }
    if (entry.kind != Preload::dropped) {
      buffer_.pin(x);
      predicted_.push_back(x);
    }
    out.push_back(entry);
  }
  return out;
}

std::vector<EdgeMoeSteps::Use> EdgeMoeSteps::use(int64_t layer, std::span<const int64_t> chosen) {
  computed();
  path_[static_cast<size_t>(layer)] = expert_set(chosen);
  std::vector<Use> out;
  for (const int64_t e : chosen) {
    if (e < 0) continue;
    const int64_t x = layer * experts_ + e;
    out.push_back({x, buffer_.cached(x), true, {}});
    if (out.back().hit) {
      buffer_.pin(x);
      in_use_.push_back(x);
    }
  }
  for (const int64_t x : predicted_) buffer_.unpin(x);
  predicted_.clear();
  for (Use& u : out) {
    if (u.hit) continue;
    const auto placed = buffer_.insert(u.expert, layer);
    u.kept = placed.kept;
    u.replaced = placed.replaced;
    if (!u.kept) continue;
    buffer_.pin(u.expert);
    in_use_.push_back(u.expert);
  }
  return out;
}

void EdgeMoeSteps::computed() {
  for (const int64_t x : in_use_) buffer_.unpin(x);
  in_use_.clear();
}

void EdgeMoeSteps::cancel(int64_t expert) {
  const auto at = std::find(predicted_.begin(), predicted_.end(), expert);
  if (at != predicted_.end()) {
    predicted_.erase(at);
    buffer_.unpin(expert);
  }
  buffer_.remove(expert);
}

EdgeMoeReplay replay_edgemoe(std::span<const int64_t> trace, int64_t layers, int64_t slots, int64_t experts,
                             const EdgeMoeSteps::Predictor& predictor, ExpertBuffer& buffer, int64_t preload) {
  check(layers > 0 && slots > 0 && trace.size() % static_cast<size_t>(layers * slots) == 0,
        "a trace of {} numbers does not hold whole tokens of {} layers with {} slots", trace.size(), layers, slots);
  check(buffer.capacity() >= slots, "a buffer of {} experts does not hold the {} that a token uses in a layer",
        buffer.capacity(), slots);
  EdgeMoeSteps steps(layers, experts, predictor, buffer, preload);
  EdgeMoeReplay out;
  const auto tokens = static_cast<int64_t>(trace.size()) / (layers * slots);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < layers; ++n) {
      const auto chosen = trace.subspan(static_cast<size_t>((t * layers + n) * slots), static_cast<size_t>(slots));
      for (size_t i = 0; i < chosen.size(); ++i)
        check(chosen[i] >= -1 && chosen[i] < experts, "token {}, layer {} of the trace: there is no expert {} among {}",
              t, n, chosen[i], experts);
      for (const auto& p : steps.preload(n)) {
        out.preloads += p.kind == EdgeMoeSteps::Preload::load;
        out.preloads_dropped += p.kind == EdgeMoeSteps::Preload::dropped;
        if (p.kind == EdgeMoeSteps::Preload::load)
          out.preloads_used += std::find(chosen.begin(), chosen.end(), p.expert % experts) != chosen.end();
      }
      for (const auto& u : steps.use(n, chosen)) (u.hit ? out.hits : out.demand) += 1;
    }
  for (int64_t x = 0; x < layers * experts; ++x) out.cached.push_back(buffer.cached(x));
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
    .make = {},
});

}  // namespace
}  // namespace moiety
