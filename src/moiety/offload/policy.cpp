#include "moiety/offload/policy.h"

#include <algorithm>
#include <set>

#include "moiety/base/error.h"

namespace moiety {

void sort_pairs(Demand& demand, int64_t experts) {
  auto& pairs = demand.pairs;
  std::sort(pairs.begin(), pairs.end(), [](const Demand::Pair& a, const Demand::Pair& b) {
    if (a.row != b.row) return a.row < b.row;
    return a.gate != b.gate ? a.gate > b.gate : a.expert < b.expert;
  });
  std::vector<int64_t> row_of(static_cast<size_t>(experts), -1);
  for (const Demand::Pair& p : pairs) {
    check(p.expert >= 0 && p.expert < experts, "layer {}: a routing names expert {}, but there are {}", demand.layer,
          p.expert, experts);
    auto& row = row_of[static_cast<size_t>(p.expert)];
    check(row != p.row, "layer {}: a routing names expert {} twice for one token", demand.layer, p.expert);
    row = p.row;
  }
}

Precision Cached::look_up(int64_t layer, int64_t expert, Precision asked) const {
  if (has({layer, expert, Precision::high})) return Precision::high;
  if (asked == Precision::high) return Precision::high;
  if (has({layer, expert, Precision::low})) return Precision::low;
  return asked;
}

std::vector<Wanted> OffloadPolicy::ask(const Demand& demand) {
  std::vector<Wanted> out;
  for (const Demand::Pair& p : demand.pairs) {
    const auto known = std::find_if(out.begin(), out.end(), [&](const Wanted& w) { return w.expert == p.expert; });
    if (known == out.end())
      out.push_back({p.expert, Precision::high, 1});
    else
      ++known->tokens;
  }
  if (demand.rows > 1)
    std::sort(out.begin(), out.end(), [](const Wanted& a, const Wanted& b) { return a.expert < b.expert; });
  return out;
}

std::vector<std::string> offload_policies() {
  std::vector<std::string> out;
  for (const Method& m : methods())
    if (m.kind == "policy" && std::any_cast<MakeOffloadPolicy>(&m.make) != nullptr) out.push_back(m.slug);
  return out;
}

size_t lowest(std::span<const ExpertVersion> candidates, const std::function<double(const ExpertVersion&)>& value) {
  size_t best = 0;
  double least = value(candidates[0]);
  for (size_t i = 1; i < candidates.size(); ++i) {
    const double v = value(candidates[i]);
    if (v < least) {
      least = v;
      best = i;
    }
  }
  return best;
}

}  // namespace moiety
