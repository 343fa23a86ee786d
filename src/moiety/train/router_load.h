#pragma once
// How the routers of a training step used their experts, for the log.
#include <map>
#include <nlohmann/json.hpp>

#include "moiety/moe/routing_counts.h"

namespace moiety {

/// Sums over the records of one step; padding does not count.
class RouterLoad {
 public:
  void add(const Trace::Record& record) { sites_[record.site].add(record, record.real); }
  bool empty() const { return sites_.empty(); }
  /// Per site ("3", with a round "3.1", elsewhere than in the feed-forward layer "3 attention"): evenness (entropy of
  /// the load over its maximum), imbalance (largest load over an even one), unused (experts without a token),
  /// indecision (mean entropy of the router's distribution over its maximum), per_token (experts of a token), and with
  /// `shares` the share of every expert.
  nlohmann::json report(bool shares) const;

 private:
  std::map<Site, RoutingCounts> sites_;
};

}  // namespace moiety
