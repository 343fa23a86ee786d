// What users of expert caches know: least recently used, least frequently used, a fixed hot set.
#include <algorithm>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/offload/policy.h"
#include "moiety/offload/traces.h"

namespace moiety {
namespace {

using nlohmann::json;

struct NoSettings {
  void fields(Fields&) {}
};

class Lru : public OffloadPolicy {
 public:
  explicit Lru(const PolicySetup& s) : experts_(s.experts), used_(static_cast<size_t>(s.layers * s.experts)) {}
  void used(const ExpertVersion& v, int64_t, bool, const Moment&) override { used_[at(v)] = ++clock_; }
  size_t victim(std::span<const ExpertVersion> candidates, const Moment&) override {
    return lowest(candidates, [&](const ExpertVersion& v) { return static_cast<double>(used_[at(v)]); });
  }
  json settings() const override { return {{"policy", "lru"}}; }

 private:
  size_t at(const ExpertVersion& v) const { return static_cast<size_t>(v.layer * experts_ + v.expert); }
  int64_t experts_, clock_ = 0;
  std::vector<int64_t> used_;
};

// Counts go on over sequences; of equals the one used longest ago leaves.
class Lfu : public OffloadPolicy {
 public:
  explicit Lfu(const PolicySetup& s) : experts_(s.experts), uses_(static_cast<size_t>(s.layers * s.experts)) {}
  void used(const ExpertVersion& v, int64_t tokens, bool, const Moment&) override {
    Uses& u = uses_[at(v)];
    u.count += tokens;
    u.last = ++clock_;
  }
  size_t victim(std::span<const ExpertVersion> candidates, const Moment&) override {
    size_t best = 0;
    for (size_t i = 1; i < candidates.size(); ++i) {
      const Uses &a = uses_[at(candidates[i])], &b = uses_[at(candidates[best])];
      if (a.count != b.count ? a.count < b.count : a.last < b.last) best = i;
    }
    return best;
  }
  json settings() const override { return {{"policy", "lfu"}}; }

 private:
  struct Uses {
    int64_t count = 0, last = 0;
  };
  size_t at(const ExpertVersion& v) const { return static_cast<size_t>(v.layer * experts_ + v.expert); }
  int64_t experts_, clock_ = 0;
  std::vector<Uses> uses_;
};

struct StaticConfig {
  std::string expert_traces;
  void fields(Fields& f) {
    f("expert_traces", expert_traces,
      "routing of a text, from `moiety analyze expert-traces`: its most frequent experts stay");
  }
};

// The experts that a recorded text used most stay for good; the rest share a few places, the oldest leaves.
class Static : public OffloadPolicy {
 public:
  Static(const PolicySetup& s, const StaticConfig& c)
      : experts_(s.experts), top_k_(s.top_k), hot_(static_cast<size_t>(s.layers * s.experts)), last_(hot_.size()) {
    check(!c.expert_traces.empty(),
          "static keeps the experts that a text uses most: record one with `moiety analyze expert-traces MODEL --text "
          "TEXT "
          "-o FILE` and give --expert-traces FILE");
    const ExpertTraces traces = read_traces(c.expert_traces);
    check(traces.layers == s.layers && traces.num_experts == s.experts,
          "{} holds the routing of {} layers of {} experts, the model has {} of {}", c.expert_traces, traces.layers,
          traces.num_experts, s.layers, s.experts);
    check(traces.router_hash.empty() || s.router_hash.empty() || traces.router_hash == s.router_hash,
          "{} was recorded with another model: its routers are others", c.expert_traces);
    count_.assign(hot_.size(), 0);
    for (size_t i = 0; i < traces.experts.size(); ++i) {
      const auto layer = static_cast<int64_t>(i) / traces.top_k % traces.layers;
      ++count_[static_cast<size_t>(layer * experts_ + traces.experts[i])];
    }
  }
  void begin(const PolicySetup& s) override {
    order_.resize(count_.size());
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      return count_[static_cast<size_t>(a)] > count_[static_cast<size_t>(b)];
    });
    order_.resize(std::min<size_t>(order_.size(), static_cast<size_t>(std::max<int64_t>(0, s.capacity_high - top_k_))));
    for (const int64_t i : order_) hot_[static_cast<size_t>(i)] = true;
  }
  std::vector<ExpertVersion> initial() const override {
    std::vector<ExpertVersion> out;
    for (const int64_t i : order_) out.push_back({i / experts_, i % experts_, Precision::high});
    return out;
  }
  void used(const ExpertVersion& v, int64_t, bool, const Moment&) override { last_[at(v)] = ++clock_; }
  size_t victim(std::span<const ExpertVersion> candidates, const Moment&) override {
    return lowest(candidates, [&](const ExpertVersion& v) {
      return hot_[at(v)] ? std::numeric_limits<double>::infinity() : static_cast<double>(last_[at(v)]);
    });
  }
  json settings() const override { return {{"policy", "static"}, {"hot", order_.size()}}; }

 private:
  size_t at(const ExpertVersion& v) const { return static_cast<size_t>(v.layer * experts_ + v.expert); }
  int64_t experts_, top_k_, clock_ = 0;
  std::vector<bool> hot_;
  std::vector<int64_t> last_, count_, order_;
};

template <class Policy, class Config>
Method baseline(const char* slug, const char* title, const char* summary) {
  return {.slug = slug,
          .kind = "policy",
          .title = title,
          .summary = summary,
          .paper = {},
          .sites = {},
          .config = describe<Config>,
          .make = MakeOffloadPolicy([slug](const PolicySetup& setup, const json& settings) {
            const auto config = parse<Config>(settings, slug);
            if constexpr (std::is_constructible_v<Policy, const PolicySetup&, const Config&>)
              return std::make_shared<Policy>(setup, config);
            else
              return std::make_shared<Policy>(setup);
          })};
}

const RegisterMethod lru(baseline<Lru, NoSettings>("lru", "Least recently used",
                                                   "experts on disk: the expert used longest ago leaves memory"));
const RegisterMethod lfu(baseline<Lfu, NoSettings>("lfu", "Least frequently used",
                                                   "experts on disk: the expert used least often leaves memory"));
const RegisterMethod fixed(baseline<Static, StaticConfig>(
    "static", "Static hot set", "experts on disk: those that a recorded text used most stay in memory for good"));

}  // namespace
}  // namespace moiety
