#pragma once
// What the routers of a mixture-of-experts model do on real text: how evenly experts are used, which are used together,
// how sure a router is, how much the next token repeats a choice. Read from Trace records; transforms and policies that
// need such statistics use the same class.
#include <torch/types.h>

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"
#include "moiety/moe/routing_counts.h"
#include "moiety/nn/pass.h"

namespace moiety {

/// Counts of one site (block, round, name), beside those that training logs too.
struct SiteStatistics : RoutingCounts {
  Site site;
  int64_t slots = 0;                            ///< largest K seen
  torch::Tensor coactivation;                   ///< [E, E] int64: tokens that chose both; the diagonal is `load`
  torch::Tensor gates;                          ///< [E] f64: sum of the gates given to the expert
  torch::Tensor load_by_text;                   ///< [texts, E] int64
  int64_t followed = 0;                         ///< choices of tokens that have a next token in their row
  int64_t repeated = 0;                         ///< those that the next token made again
  std::vector<std::map<int64_t, int64_t>> ids;  ///< per expert: token id -> times chosen; empty unless asked for

  double variation() const;          ///< standard deviation of the load over its mean
  double repetition() const;         ///< share of choices that the next token repeats
  double chance_repetition() const;  ///< what repetition() would be if tokens chose independently
};

/// How much the first choice (slot 0) of a layer tells about that of the next layer: over tokens,
/// sum p(a, b) ln(p(a, b) / (p(a) p(b))), nats, as arXiv 2408.06793 asks of routers that see each other. A site's
/// neighbour is the record before it in the same pass with the same site name: the block or the round before. Few
/// tokens overstate it, by about (Ea - 1)(Eb - 1) / (2 tokens).
class ChoiceInformation {
 public:
  /// Records of a pass in their order. `counted` [N] bool; undefined: the record's real tokens.
  void add(const Trace::Record& record, const torch::Tensor& counted = {});
  /// Between the site and its neighbour before; nothing for a site that has none.
  std::map<Site, double> nats() const;
  double mean() const;  ///< over the pairs; 0 when there is none

 private:
  struct Last {
    Site site;
    torch::Tensor choice;  // [N] int64, -1 where not counted
    int64_t experts = 0;
  };
  std::map<std::string, Last> last_;     // by site name
  std::map<Site, torch::Tensor> pairs_;  // [E before, E here] int64
};

class RoutingStatistics {
 public:
  /// `count_ids`: keep which token ids chose each expert. `texts`: rows of load_by_text.
  explicit RoutingStatistics(int64_t texts = 1, bool count_ids = false) : texts_(texts), count_ids_(count_ids) {}
  /// One record of a pass over ids [B, T]; only tokens where `counted` [B, T] bool is true are counted, for text
  /// `text`.
  void add(const Trace::Record& record, const torch::Tensor& ids, const torch::Tensor& counted, int64_t text = 0);
  /// In the order of depth.
  const std::map<Site, SiteStatistics>& sites() const { return sites_; }
  const ChoiceInformation& information() const { return information_; }

 private:
  int64_t texts_;
  bool count_ids_;
  std::map<Site, SiteStatistics> sites_;
  ChoiceInformation information_;
};

struct RoutingText {
  std::string name;
  std::vector<int64_t> ids;
};

struct RoutingOptions {
  int64_t context = 512;  ///< tokens of one window; windows do not overlap
  int64_t batch_size = 8;
  int64_t bos = -1;        ///< put before every window and not counted; -1: none
  bool count_ids = false;  ///< see RoutingStatistics
};

/// Runs the model over the texts. Throws Error: no block has routed anything, or there is no token to route.
RoutingStatistics analyze_routing(CausalModel& model, const std::vector<RoutingText>& texts,
                                  const RoutingOptions& options,
                                  const std::function<void(int64_t done, int64_t windows)>& progress = {});

/// The statistics as JSON: `layers` (one entry a site) and `summary`. `names` are the texts'; with a tokenizer every
/// expert lists its `top_tokens` most specific token ids: chosen at least 4 times, ordered by the share of their
/// occurrences that went to the expert, then by count.
nlohmann::json to_json(const RoutingStatistics& statistics, const std::vector<std::string>& names,
                       const Tokenizer* tokenizer = nullptr, int64_t top_tokens = 0);

/// A self-contained page with heatmaps over what to_json gave (and `model`, `settings`, if the caller added them).
std::string routing_page(const nlohmann::json& report);

}  // namespace moiety
