#pragma once
// What decides about experts that are not all in memory: in which precision each is used, who leaves a full pool, what
// is read ahead. One interface for the running store, for replays of recorded routing, and for tests. Knows nothing of
// torch or of files.
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "moiety/base/registry.h"

namespace moiety {

/// Which stored version of an expert is used. The numbers are those of conformance cases and traces.
enum class Precision : int8_t { skip = 0, low = 1, high = 2 };

/// One version of one expert; `layer` counts the layers with experts from 0.
struct ExpertVersion {
  int64_t layer = 0, expert = 0;
  Precision precision = Precision::high;
  bool operator==(const ExpertVersion&) const = default;
};

/// What the router of one layer decided in one step.
struct Demand {
  struct Pair {
    int64_t row = 0, expert = 0;
    double gate = 0.0;  ///< the model's own
  };
  int64_t layer = 0;
  int64_t token = 1;  ///< number in the sequence of the (last) token of the step, from 1
  int64_t rows = 1;   ///< tokens of the step
  /// Every expert at most once a row; a row's pairs by descending gate, ties by ascending expert.
  std::vector<Pair> pairs;
};
/// Sorts the pairs of every row as Demand wants them. Error: an expert outside [0, experts), or twice in a row.
void sort_pairs(Demand& demand, int64_t experts);

/// One expert that a step wants: asked once, in the best precision that any of its tokens asks for.
struct Wanted {
  int64_t expert = 0;
  Precision asked = Precision::high;
  int64_t tokens = 1;
};

/// A guess at what a later layer will want: the version is pinned, and read where it is not in its pool.
struct Guess {
  ExpertVersion version;
  bool load = false;
};

/// What is in the pools; versions that are being read count.
class Cached {
 public:
  virtual ~Cached() = default;
  virtual bool has(const ExpertVersion& version) const = 0;
  /// The version that answers `asked`: a high one serves every demand; a low one serves low and skip, never high; what
  /// is nowhere is read in the precision asked for, or left out.
  Precision look_up(int64_t layer, int64_t expert, Precision asked) const;
};

/// Routes the current input through the routers of later layers, all in one product.
class LookAhead {
 public:
  virtual ~LookAhead() = default;
  /// One Demand a layer, first ... last, for the rows of this step.
  virtual std::vector<Demand> route(int64_t first, int64_t last) = 0;
};

/// Where the running step is: layers ahead are counted from `layer`, ages from `token`.
struct Moment {
  int64_t layer = 0, token = 1;
};

/// What a policy is told before anything runs.
struct PolicySetup {
  int64_t layers = 0, experts = 0;
  int64_t top_k = 0;                            ///< experts a token, the largest of all layers
  bool has_low = false;                         ///< the file has low-precision copies
  std::string model;                            ///< path of the checkpoint, "" when there is none
  std::string router_hash;                      ///< of the router weights: files made for another model are refused
  int64_t capacity_high = 0, capacity_low = 0;  ///< 0 while they are not known yet
};

class OffloadPolicy {
 public:
  virtual ~OffloadPolicy() = default;
  /// Whether low-precision copies may ever be asked for.
  virtual bool uses_low() const { return false; }
  /// Experts that the high-precision pool must hold at least. Default: those of one token.
  virtual int64_t least_high(const PolicySetup& setup) const { return setup.top_k; }
  /// Experts that the high-precision pool shall hold, whatever the budget would give; 0: what the budget gives.
  virtual int64_t capacity() const { return 0; }
  /// Told once, before the first step. Error: what the settings ask for does not fit.
  virtual void begin(const PolicySetup&) {}
  /// All rows of the coming step are new.
  virtual void begin_sequence() {}
  /// Every expert of the demand once, in the order in which they are recorded and read. Default: all in high precision;
  /// one row in the router's order, several rows by ascending expert.
  virtual std::vector<Wanted> ask(const Demand& demand);
  /// A version is used by `tokens` tokens of this step; `hit`: it was in its pool. Called before its place is taken.
  virtual void used(const ExpertVersion&, int64_t /*tokens*/, bool /*hit*/, const Moment&) {}
  /// Which of the candidates leaves: not empty, of one pool, none in use, ascending by layer * experts + expert.
  virtual size_t victim(std::span<const ExpertVersion> candidates, const Moment& now) = 0;
  /// Called when the demand of a layer has its places; `look` may be null. In the order of reading.
  virtual std::vector<Guess> guess(const Demand&, const Cached&, LookAhead*) { return {}; }
  /// True: what was guessed wrong may leave its pool as soon as the layer's router has answered; false: when the layer
  /// has run. Reads for it that have not begun are cancelled either way.
  virtual bool give_up_when_routed() const { return false; }
  /// What the pools should hold before the first step, best first; more than fits is ignored.
  virtual std::vector<ExpertVersion> initial() const { return {}; }
  /// Effective settings, for reports.
  virtual nlohmann::json settings() const { return nlohmann::json::object(); }
};

/// How a registered method of kind "policy" makes one; `settings` are checked by its declared fields. Methods whose
/// factory has this type are what `--offload` offers.
using MakeOffloadPolicy =
    std::function<std::shared_ptr<OffloadPolicy>(const PolicySetup& setup, const nlohmann::json& settings)>;
/// Slugs of these methods.
std::vector<std::string> offload_policies();

/// A policy that keeps one number for every expert: the lowest leaves, ties by the lowest layer * experts + expert.
size_t lowest(std::span<const ExpertVersion> candidates, const std::function<double(const ExpertVersion&)>& value);

}  // namespace moiety
