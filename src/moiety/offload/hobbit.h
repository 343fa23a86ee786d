#pragma once
// HOBBIT (Tang et al. 2024, arXiv 2411.01433): experts that matter less for a token are read in a low-precision copy or
// left out, the next layers' experts are read ahead by their own routers, and one cache over all layers weighs recency,
// frequency, high-precision use and how soon a layer comes.
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/offload/policy.h"

namespace moiety {

/// Of the priority (equation 3): recency, frequency, frequency in high precision, distance of the layer. At least 0,
/// sum 1 within 1e-6.
struct HobbitWeights {
  double lru = 0.25, lfu = 0.25, lhu = 0.25, fld = 0.25;
  /// "" or what is wrong with them.
  std::string problem() const;
};

struct HobbitConfig {
  double t1 = 0.6, t2 = 0.9;
  int64_t lookahead = 2;
  nlohmann::json weights = "auto";
  std::string input = "router";
  void fields(Fields& f);
  std::string problem() const;
  /// What `weights` says; nothing for "auto". Error otherwise than {lru, lfu, lhu, fld} or four numbers with commas.
  std::optional<HobbitWeights> given_weights() const;
};

/// One chosen expert of one token.
struct Scored {
  int64_t expert = 0;
  double weight = 0.0;  ///< gate over the sum of the token's gates
  double score = 0.0;   ///< unimportance: weights of the experts before it (equation 2)
  Precision precision = Precision::high;
};
/// The pairs of one row (see Demand), scored: by descending weight; score <= t1 high, <= t2 low, else skip. Gates that
/// are all 0 count as equal.
std::vector<Scored> hobbit_scores(std::span<const Demand::Pair> row, double t1, double t2);

/// What one version's uses in the running sequence were.
struct UseRecord {
  int64_t last_used = 0, count = 0, count_high = 0;
};
/// Equation 3, in [0, 1]: the lowest leaves.
double hobbit_priority(const UseRecord& record, int64_t layer, const Moment& now, int64_t layers,
                       const HobbitWeights& weights);

class Hobbit : public OffloadPolicy {
 public:
  /// Error: T1 < 1 without low-precision copies; see HobbitConfig; a MODEL.hobbit.json made for another model.
  Hobbit(const PolicySetup& setup, HobbitConfig config);
  Hobbit(int64_t layers, int64_t experts, double t1, double t2, int64_t lookahead, HobbitWeights weights);

  bool uses_low() const override { return t1_ < 1.0; }
  void begin_sequence() override;
  std::vector<Wanted> ask(const Demand& demand) override;
  void used(const ExpertVersion& version, int64_t tokens, bool hit, const Moment& now) override;
  size_t victim(std::span<const ExpertVersion> candidates, const Moment& now) override;
  std::vector<Guess> guess(const Demand& demand, const Cached& cached, LookAhead* look) override;
  nlohmann::json settings() const override;

  /// The layer at which the last guess stopped because it had something to read; -1: it had nothing.
  int64_t stopped_at() const { return stopped_at_; }
  const HobbitWeights& weights() const { return weights_; }

 private:
  int64_t layers_, experts_;
  double t1_, t2_;
  int64_t lookahead_;
  HobbitWeights weights_;
  std::string weights_from_ = "given";
  std::vector<UseRecord> records_;
  int64_t stopped_at_ = -1;
};

/// MODEL.hobbit.json: what a calibration found (docs/offload.md).
struct HobbitCalibration {
  double t1 = 0.6, t2 = 0.9;
  HobbitWeights weights;
  int64_t capacity_high = 0, capacity_low = 0;
  double penalty = 0.0, penalty_even = 0.0;  ///< with these weights, and with four times 0.25
  std::string router_hash;
};
/// Where the calibration of a model lies.
std::string hobbit_file(const std::string& model);
void write_calibration(const std::string& file, const HobbitCalibration& calibration);
HobbitCalibration read_calibration(const std::string& file);

}  // namespace moiety
