#pragma once
// EdgeMoE's expert offloading (Yi et al. 2023, arXiv 2308.14352): which experts a layer will want is read off the path
// that the token took through the two layers before, and the buffer gives up what is used seldom and far ahead. Plain
// decisions, without torch and without reads; layers are counted over the mixtures of a model alone.
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moiety/base/config.h"

namespace moiety {

struct EdgeMoeEviction {
  std::string distance = "ahead";  ///< or printed: the paper's formula, which keeps what was just used
  void fields(Fields& f);
};

struct EdgeMoePolicyConfig {
  int64_t preload = 2;   ///< m: experts a layer that are read ahead
  int64_t capacity = 0;  ///< experts in the buffer; 0: as many as the memory budget holds
  EdgeMoeEviction evict;
  void fields(Fields& f);
};

/// The set of experts that a token used in a layer: ascending, each once.
using ExpertSet = std::vector<int64_t>;
/// Of a row of K indices; negative ones (unused slots) are left out.
ExpertSet expert_set(std::span<const int64_t> row);

/// How often paths through the layers of a model were taken, counted on a profile.
class ExpertPaths {
 public:
  /// `trace` [tokens, layers, slots], row by row; -1 in an unused slot. Error: no token, an expert outside of [-1,
  /// experts), sizes that do not fit.
  ExpertPaths(std::span<const int64_t> trace, int64_t layers, int64_t slots, int64_t experts);

  int64_t layers() const { return layers_; }
  int64_t experts() const { return experts_; }
  int64_t tokens() const { return tokens_; }
  /// f: profile tokens that used the expert in that layer; [layers * experts].
  const std::vector<int64_t>& frequency() const { return frequency_; }

  /// P(i | A_{n-2}, A_{n-1}) of all experts of layer n: among the profile tokens with these two states, the share that
  /// used i. A pair that was never seen: given A_{n-1} alone; that unseen: f(n, i) / tokens. Layer 1 is given A_0
  /// alone, layer 0 nothing. The values sum to the number of experts a token.
  std::vector<double> probability(int64_t layer, const ExpertSet& before2, const ExpertSet& before1) const;
  /// The same given A_{n-1} alone, with the same back-off: what the pair is compared with.
  std::vector<double> probability_of_one(int64_t layer, const ExpertSet& before1) const;
  std::vector<double> share(int64_t layer) const;  ///< f(n, i) / tokens

 private:
  struct Counts {
    int64_t tokens = 0;
    std::vector<std::pair<int32_t, int32_t>> experts;  // (expert, tokens), in the order of their first use
  };
  using Table = std::unordered_map<std::string, Counts>;
  std::optional<std::vector<double>> found(const Table& table, const std::string& key) const;

  int64_t layers_ = 0, experts_ = 0, tokens_ = 0;
  std::vector<int64_t> frequency_;
  Table pairs_, singles_;  // the layer is in the key
};

/// Indices by descending value, ties by the lower index.
std::vector<int64_t> descending(std::span<const double> values);

/// Layers until `layer` runs again while `running` executes: (layer - running) mod layers, `layers` for the running one
/// itself. `printed`: the paper's (layers - layer + running) mod layers instead (0 becomes `layers`).
int64_t layers_ahead(int64_t layer, int64_t running, int64_t layers, bool printed = false);
/// - f / D: the highest leaves.
double eviction_score(int64_t frequency, int64_t ahead);

/// What the buffer holds and gives up, over all layers together. Experts are flat indices layer * experts + expert.
class ExpertBuffer {
 public:
  /// `frequency` [layers * experts]: f of the score.
  ExpertBuffer(int64_t layers, int64_t experts, int64_t capacity, std::vector<int64_t> frequency,
               EdgeMoeEviction evict = {});

  bool cached(int64_t expert) const { return cached_[static_cast<size_t>(expert)]; }
  bool pinned(int64_t expert) const { return pinned_[static_cast<size_t>(expert)] > 0; }
  int64_t size() const { return size_; }
  int64_t capacity() const { return capacity_; }
  void pin(int64_t expert) { ++pinned_[static_cast<size_t>(expert)]; }
  void unpin(int64_t expert);

  /// The cached, unpinned expert with the highest score while `running` executes; ties: the farther layer, then the
  /// lower index. Nothing when all are pinned.
  std::optional<int64_t> victim(int64_t running) const;
  struct Placed {
    bool kept = false;                ///< it has a place
    std::optional<int64_t> replaced;  ///< whose place that was
  };
  /// Gives an expert that is not cached a free place or that of a victim.
  Placed insert(int64_t expert, int64_t running);
  void remove(int64_t expert);
  /// Counts a use, for scores that go on counting (`online`).
  void count(int64_t expert) { ++frequency_[static_cast<size_t>(expert)]; }

  /// The `capacity` most frequent experts, ties by the lower index: what a buffer starts with.
  std::vector<int64_t> most_frequent() const;

 private:
  int64_t layers_, experts_, capacity_, size_ = 0;
  std::vector<int64_t> frequency_;
  bool printed_;
  std::vector<bool> cached_;
  std::vector<int> pinned_;
};

/// A layer's part of the method, for one token at a time: preload before its router answers, use after.
class EdgeMoeSteps {
 public:
  /// Predicted shares of the experts of `layer` given the sets of the two layers before.
  using Predictor = std::function<std::vector<double>(int64_t layer, const ExpertSet&, const ExpertSet&)>;
  /// Error: a negative `preload`.
  EdgeMoeSteps(int64_t layers, int64_t experts, Predictor predictor, ExpertBuffer& buffer, int64_t preload);

  struct Preload {
    int64_t expert = 0;  ///< flat
    enum Kind { cached, load, dropped } kind = cached;
    std::optional<int64_t> replaced;
  };
  /// The most probable experts of `layer`, most probable first; those that have a place are pinned. Layer 0 follows the
  /// last layer of the token before.
  std::vector<Preload> preload(int64_t layer);

  struct Use {
    int64_t expert = 0;  ///< flat
    bool hit = false;
    bool kept = true;  ///< false: all places are pinned by this step
    std::optional<int64_t> replaced;
  };
  /// The router of `layer` chose `chosen` (its order; negative slots are left out): these are pinned, predictions
  /// unpinned; what is not cached gets a place, in this order.
  std::vector<Use> use(int64_t layer, std::span<const int64_t> chosen);
  /// The layer has been computed, its experts are unpinned; called by the next use() at the latest.
  void computed();
  /// A preload() entry that was given up before it was read: no longer cached nor pinned.
  void cancel(int64_t expert);
  /// Forgets the path: a new sequence begins. The buffer stays.
  void begin_sequence();

 private:
  int64_t layers_, experts_, preload_;
  Predictor predictor_;
  ExpertBuffer& buffer_;
  std::vector<ExpertSet> path_;     // of this token, by layer
  std::vector<int64_t> in_use_;     // flat, pinned
  std::vector<int64_t> predicted_;  // flat, pinned
};

/// A trace run through the method as if every layer finished its preloads before its router answers.
struct EdgeMoeReplay {
  int64_t hits = 0, demand = 0, preloads = 0, preloads_used = 0, preloads_dropped = 0;
  std::vector<bool> cached;  ///< [layers * experts] at the end
};
/// `trace` [tokens, layers, slots]. The buffer starts as it is given. Error: see EdgeMoeSteps.
EdgeMoeReplay replay_edgemoe(std::span<const int64_t> trace, int64_t layers, int64_t slots, int64_t experts,
                             const EdgeMoeSteps::Predictor& predictor, ExpertBuffer& buffer, int64_t preload);

}  // namespace moiety
