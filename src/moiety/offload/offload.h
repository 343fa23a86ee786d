#pragma once
// A model whose experts stay on disk: takes the experts out of its mixtures, puts sets in their place that stream them
// through one store, and keeps the whole process under a memory budget.
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/models/model.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/mixture.h"
#include "moiety/offload/store.h"

namespace moiety {

struct OffloadOptions {
  std::string policy = "lru";                          ///< slug of a registered policy
  nlohmann::json settings = nlohmann::json::object();  ///< of the policy
  /// Bytes that the process may have resident, everything counted; 0: no budget.
  int64_t memory = 0;
  /// Experts in the pools, instead of what a budget gives; without a budget 0 means all. What a budget gives differs a
  /// little from run to run, for it depends on what the program happens to have resident when it starts.
  int64_t capacity_high = 0, capacity_low = 0;
  bool sync = false;
  ReadOptions read;
  /// A token whose experts were left out in part is divided by the share of its gates that is left.
  bool skip_renormalize = false;
};

/// What a run needs beside weights and experts.
struct OffloadWork {
  int64_t context = 512;     ///< tokens that the cache will hold
  int64_t rows = 1;          ///< sequences side by side
  int64_t chunk = 512;       ///< tokens of a prompt at a time, at most
  int64_t logits = 1;        ///< positions of a row whose logits are kept at once
  bool fixed_chunk = false;  ///< the chunk cannot be smaller
};

/// Where the bytes of a budget go.
struct MemoryPlan {
  int64_t budget = 0;
  int64_t base = 0;     ///< resident now: program, libraries, weights that stay
  int64_t cache = 0;    ///< keys and values
  int64_t work = 0;     ///< activations, logits, allocator
  int64_t buffers = 0;  ///< of reads, and staging slots
  int64_t slot_high = 0, slot_low = 0;
  int64_t capacity_high = 0, capacity_low = 0;
  int64_t least = 0;  ///< the smallest budget that works
  int64_t chunk = 512;
  int64_t experts() const { return capacity_high * slot_high + capacity_low * slot_low; }
  nlohmann::ordered_json json() const;
};

class StackedRouters;

class Offload {
 public:
  /// Takes the experts of every mixture out of a model that was loaded with LoadOptions::leave_experts; packs what
  /// stays, and lets go of file pages that are not needed any more. The model cannot run before start(). `source`: null
  /// for the checkpoint's own experts, those of an edgemoe model included. Error: no expert layers; unknown policy or
  /// settings; experts that are not gated ones of the family; a device other than the CPU.
  static std::shared_ptr<Offload> attach(CausalModel& model, const Checkpoint& checkpoint, OffloadOptions options,
                                         std::shared_ptr<const ExpertSource> source = nullptr);
  /// The same for expert sets outside of a model, one a layer, that takes their places at once; `options` says the
  /// capacities. What computes them is OffloadedExperts.
  static std::shared_ptr<Offload> over(const std::vector<std::shared_ptr<GatedExperts>>& layers,
                                       std::shared_ptr<const ExpertSource> source,
                                       std::shared_ptr<OffloadPolicy> policy, int64_t top_k, OffloadOptions options);
  ~Offload();

  /// Sizes the pools and begins to read. Once. Error: a budget that is too small, naming the smallest that works.
  void start(const OffloadWork& work);
  const MemoryPlan& plan() const { return plan_; }
  StoreStats stats() const { return store().stats(); }
  /// From here on report() also says what happened since: behind the prompt, say.
  void mark() { mark_ = stats(); }
  nlohmann::ordered_json report() const;
  std::string summary() const;
  ExpertStore& store() const;
  OffloadPolicy& policy() const { return *policy_; }
  const PolicySetup& setup() const { return setup_; }

 private:
  friend class OffloadedExperts;
  Offload() = default;

  OffloadOptions options_;
  std::shared_ptr<const ExpertSource> source_;
  std::shared_ptr<OffloadPolicy> policy_;
  PolicySetup setup_;
  std::function<MemoryPlan(const OffloadWork&)> needs_;
  MemoryPlan plan_;
  std::optional<StoreStats> mark_;
  std::function<void()> warm_;  // a pass without experts
  bool warming_ = false;
  std::shared_ptr<StackedRouters> routers_;
  std::unique_ptr<ExpertStore> store_;
};

/// The experts of one layer, computed from the store's slots: bit for bit what `inner` computes when all is in memory
/// and every expert is used in high precision.
class OffloadedExperts : public Experts {
 public:
  /// `silu`: the activation is SiLU and nothing else is between the products.
  OffloadedExperts(std::shared_ptr<GatedExperts> inner, std::shared_ptr<Offload> offload, int64_t layer,
                   bool silu = true);
  int64_t count() const override { return inner_->count(); }
  /// Error: experts on disk follow a sequence, and run as part of a pass only.
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;
  torch::Tensor mix_in(const torch::Tensor& x, const Dispatch& dispatch, const Pass& pass) override;
  /// What became of the experts of the last call.
  const std::vector<Use>& last() const { return last_; }

 private:
  std::shared_ptr<GatedExperts> inner_;
  std::shared_ptr<Offload> offload_;
  int64_t layer_;
  bool fused_ = false;
  std::vector<Use> last_;
};

/// The routing of a dispatch over x [N, d] as a policy sees it.
Demand demand_of(const Dispatch& dispatch, int64_t rows, int64_t layer, int64_t token);

/// Routes an input through the routers of several layers in one product.
class StackedRouters {
 public:
  using Rule = std::function<Routing(const torch::Tensor& logits)>;
  /// One weight [E, d] and rule a layer; bias [E] or undefined; `norm` [d]: the factors of the norm in front.
  struct Layer {
    torch::Tensor weight, bias, norm;
    Rule rule;
  };
  /// `renorm`: the input of layer l is given to later routers as their own norm makes it of the same hidden state.
  /// Error: a layer has no norm then.
  explicit StackedRouters(std::vector<Layer> layers, bool renorm = false);
  /// x [N, d] through the routers of layers first ... last.
  std::vector<Demand> route(const torch::Tensor& x, int64_t first, int64_t last);

 private:
  torch::Tensor stack(int64_t first, int64_t last) const;

  std::vector<Layer> layers_;
  bool renorm_;
  torch::Tensor stack_;         // [L E, d]
  std::vector<int64_t> begin_;  // rows of each layer
};
/// The same as a policy asks for it, for one input.
class LookAheadFrom : public LookAhead {
 public:
  LookAheadFrom(StackedRouters& routers, torch::Tensor x) : routers_(routers), x_(std::move(x)) {}
  std::vector<Demand> route(int64_t first, int64_t last) override { return routers_.route(x_, first, last); }

 private:
  StackedRouters& routers_;
  torch::Tensor x_;
};

/// Bytes of this process that are resident now, and the most that were.
int64_t resident_bytes();
int64_t peak_resident_bytes();
/// "512MiB", "2GiB", "1.5G", "800000000" or "auto" (nine tenths of what the system or the control group has left).
/// Error otherwise.
int64_t parse_memory(const std::string& text);
/// "200MB/s", "1.5GB/s", "2e8": bytes a second. Error otherwise.
double parse_rate(const std::string& text);
/// SHA-256 of the routers of a model's mixtures, rounded to bf16; "" where there are none.
std::string router_hash(CausalModel& model);

}  // namespace moiety
