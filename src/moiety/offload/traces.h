#pragma once
// Recorded routing: which experts every token of a text took, with which gates. Written by `moiety analyze
// expert-traces`; replayed to compare policies and to calibrate them. A safetensors file with `experts` int64 [N, L,
// K], `gates` f32 [N, L, K] (sum 1 a token and layer) and `sequence_start` bool [N].
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "moiety/offload/hobbit.h"
#include "moiety/offload/policy.h"

namespace moiety {

struct ExpertTraces {
  int64_t tokens = 0, layers = 0, top_k = 0, num_experts = 0;
  std::vector<int64_t> experts;         ///< [N, L, K]
  std::vector<float> gates;             ///< [N, L, K]
  std::vector<uint8_t> sequence_start;  ///< [N], the first is 1
  std::string router_hash;              ///< "" when unknown
  /// Error: sizes that do not fit, an expert outside [0, num_experts) or twice in a step, gates that are negative or do
  /// not add up to 1 (1e-3), no sequence that starts at the first token.
  void validate(const std::string& where) const;
};
ExpertTraces read_traces(const std::string& file);
void write_traces(const std::string& file, const ExpertTraces& traces);

struct ReplayResult {
  std::vector<int8_t> precision_used;            ///< [N, L, K], in the trace's order
  double penalty = 0.0;                          ///< misses: 1 in high precision, bits_low / bits_high in low
  std::array<int64_t, 5> counts{};               ///< hit_high, hit_low, miss_high, miss_low, skip
  std::vector<uint8_t> cached_high, cached_low;  ///< [L, E] at the end
};
/// Runs the policy over a trace, token by token, pools empty at first, without reading ahead.
ReplayResult replay(const ExpertTraces& traces, std::shared_ptr<OffloadPolicy> policy, int64_t capacity_high,
                    int64_t capacity_low, double bits_low, double bits_high);

/// Weights of the least penalty over the grid of step 0.1 on the simplex (286 points); ties: the first in the order of
/// lru, lfu, lhu, fld.
HobbitCalibration calibrate_hobbit(const ExpertTraces& traces, double t1, double t2, int64_t capacity_high,
                                   int64_t capacity_low, double bits_low, double bits_high);
/// (t1, t2): the quantiles of all scores that give these shares of high and of high or low. Shares in [0, 1],
/// ascending.
std::pair<double, double> score_quantiles(const ExpertTraces& traces, double share_high, double share_high_or_low);

}  // namespace moiety
