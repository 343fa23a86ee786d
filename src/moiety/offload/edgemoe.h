#pragma once
// EdgeMoE's expert offloading (Yi et al. 2023, arXiv 2308.14352): which experts a layer will want is read off the path
// that the token took through the two layers before, and the buffer gives up what is used seldom and far ahead. Without
// torch; layers are counted over the mixtures of a model alone.
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/offload/policy.h"

namespace moiety {

struct EdgeMoeEviction {
  std::string distance = "ahead";  ///< or printed: the paper's formula, which keeps what was just used
  bool online = false;             ///< uses of the run count beside those of the profile
  void fields(Fields& f);
};

struct EdgeMoePolicyConfig {
  int64_t preload = 2;       ///< m: experts a layer that are read ahead
  int64_t capacity = 0;      ///< experts in the buffer; 0: as many as the memory budget holds
  std::string expert_paths;  ///< file of write_expert_paths
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

/// Writes a profile: safetensors, `profile_trace` [tokens, layers, slots] in the smallest integers that hold `experts`,
/// metadata num_experts and router_hash.
void write_expert_paths(const std::string& file, std::span<const int64_t> trace, int64_t layers, int64_t slots,
                        int64_t experts, const std::string& router_hash);
/// Reads it and counts. Error: not such a file; `router_hash` (not empty) or `layers` and `experts` (not 0) are of
/// another model.
ExpertPaths read_expert_paths(const std::string& file, const std::string& router_hash = "", int64_t layers = 0,
                              int64_t experts = 0);

/// Indices by descending value, ties by the lower index.
std::vector<int64_t> descending(std::span<const double> values);

/// Layers until `layer` runs again while `running` executes: (layer - running) mod layers, `layers` for the running one
/// itself. `printed`: the paper's (layers - layer + running) mod layers instead (0 becomes `layers`).
int64_t layers_ahead(int64_t layer, int64_t running, int64_t layers, bool printed = false);
/// - f / D: the highest leaves.
double eviction_score(int64_t frequency, int64_t ahead);

class EdgeMoe : public OffloadPolicy {
 public:
  /// Predicted shares of the experts of `layer` given the sets of the two layers before.
  using Predictor =
      std::function<std::vector<double>(int64_t layer, const ExpertSet& before2, const ExpertSet& before1)>;
  /// `frequency` [layers * experts]: f of the score. Error: sizes that do not fit.
  EdgeMoe(int64_t layers, int64_t experts, std::vector<int64_t> frequency, Predictor predictor,
          EdgeMoePolicyConfig config = {});
  /// Predicts by the paths.
  EdgeMoe(std::shared_ptr<const ExpertPaths> paths, EdgeMoePolicyConfig config);

  /// The experts of a token and those that are read ahead.
  int64_t least_high(const PolicySetup& setup) const override { return setup.top_k + config_.preload; }
  int64_t capacity() const override { return config_.capacity; }
  void begin_sequence() override;
  void used(const ExpertVersion& version, int64_t tokens, bool hit, const Moment& now) override;
  /// The highest score leaves; ties: the farther layer, then the lower index.
  size_t victim(std::span<const ExpertVersion> candidates, const Moment& now) override;
  /// The most probable experts of the next layer (layer 0 after the last), most probable first; nothing for more than
  /// one token: prompts and batches are outside of the method.
  std::vector<Guess> guess(const Demand& demand, const Cached& cached, LookAhead* look) override;
  bool give_up_when_routed() const override { return true; }
  std::vector<ExpertVersion> initial() const override;
  nlohmann::json settings() const override;

 private:
  int64_t layers_, experts_;
  std::vector<int64_t> frequency_;
  Predictor predictor_;
  EdgeMoePolicyConfig config_;
  std::vector<ExpertSet> path_;  // of this token, by layer
};

/// A trace run through a policy as if every layer finished what is read ahead before its router answers.
struct PathReplay {
  int64_t hits = 0, demand = 0, preloads = 0, preloads_used = 0, preloads_dropped = 0;
  std::vector<bool> cached;  ///< [layers * experts] at the end
};
/// `trace` [tokens, layers, slots]; -1 in an unused slot. The buffer is empty at first and shared by all layers; layer
/// 0 of the first token is read ahead too. Error: sizes that do not fit, an expert outside of [-1, experts), a capacity
/// that is less than `slots`.
PathReplay replay_paths(std::span<const int64_t> trace, int64_t layers, int64_t slots, int64_t experts,
                        std::shared_ptr<OffloadPolicy> policy, int64_t capacity);

}  // namespace moiety
