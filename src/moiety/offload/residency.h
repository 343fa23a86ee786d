#pragma once
// Which expert versions are in memory, in which slots, and what a step may do to them: two pools, global over all
// layers, pins, victims. The same bookkeeping serves the running store and replays of recorded routing. Used by one
// thread.
#include <cstdint>
#include <memory>
#include <vector>

#include "moiety/offload/policy.h"

namespace moiety {

struct PoolSizes {
  int64_t layers = 0, experts = 0;
  int64_t high = 0, low = 0;  ///< experts that a pool holds
};

/// Who reads for the pools. Slots of a pool count from 0.
class Loader {
 public:
  enum class Released {
    idle,       ///< nothing was being read into it
    cancelled,  ///< its reading had not begun, and never will
    busy,       ///< it is being read at this moment: its memory cannot be given away yet
  };
  virtual ~Loader() = default;
  /// The version is to be read into the slot, which is released or was never used.
  virtual void load(const ExpertVersion& version, int64_t slot, bool ahead) = 0;
  /// A version that is being read ahead is wanted now.
  virtual void hurry(const ExpertVersion&, int64_t /*slot*/) {}
  /// The version is to leave its slot.
  virtual Released release(const ExpertVersion&, int64_t /*slot*/) { return Released::idle; }
  /// Returns when one of the pool's busy slots is so no more.
  virtual void wait_for_one(Precision) {}
};

/// One expert of a step.
struct Use {
  int64_t expert = 0;
  Precision asked = Precision::high, used = Precision::high;
  bool hit = false;
  int64_t slot = -1;  ///< in the pool of `used`; -1: has no place (yet)
  int64_t tokens = 1;
};

struct ResidencyCounts {
  int64_t hit_high = 0, hit_low = 0, miss_high = 0, miss_low = 0, skip = 0;
  int64_t kept_out = 0;  ///< misses that found no place in their pool
  int64_t guessed = 0;   ///< versions that guesses named, cached or not
  int64_t right = 0;     ///< of those: used when their layer ran
  int64_t ahead = 0, ahead_used = 0, ahead_dropped = 0, ahead_cancelled = 0;  ///< reads ahead
  int64_t ahead_unused = 0;                                                   ///< left their pool without a use
  int64_t wanted_of_guessed = 0;  ///< experts that layers used for which there were guesses
  int64_t steps = 0;              ///< one a layer
  int64_t pairs = 0;              ///< (token, expert) pairs of all demands
  int64_t altered = 0;            ///< of those: computed in low precision, or left out
};

class Residency : public Cached {
 public:
  /// `loader` null: nothing is read (replays). Error: sizes that are not positive, `high` below 1.
  Residency(PoolSizes sizes, std::shared_ptr<OffloadPolicy> policy, Loader* loader = nullptr);

  bool has(const ExpertVersion& version) const override;
  /// The slot of a version that is in its pool, -1 otherwise.
  int64_t slot(const ExpertVersion& version) const;
  const PoolSizes& sizes() const { return sizes_; }
  OffloadPolicy& policy() { return *policy_; }

  /// All rows of the coming step are new.
  void begin_sequence() { policy_->begin_sequence(); }
  /// Looks all experts of the demand up before anything is read, and pins what each will use. In the policy's order.
  /// Reads ahead for this layer that have not begun are cancelled, where nothing of the demand uses them.
  std::vector<Use> look_up(const Demand& demand);
  /// Tells the policy of a use and counts it. Comes before place(), use by use.
  void record(const Use& use, const Demand& demand);
  /// Takes a place for a miss and has it read: a free slot, or that of a victim; where all are pinned, that of a guess,
  /// the farthest layer's first. False: there is none, and the expert has to be used from memory outside of the pools,
  /// or when others are through.
  bool place(Use& use, const Demand& demand);
  void keep_out() { ++counts_.kept_out; }
  /// Pins what the policy expects of later layers, and has it read. Nothing where `look` is null and the policy needs
  /// it.
  void guess_ahead(const Demand& demand, LookAhead* look);
  /// The use is computed: its slot may go.
  void unpin(const Use& use, int64_t layer);
  /// The layer has run: its pins fall.
  void end_layer(int64_t layer);
  /// Puts a version into its pool where there is room, without evicting. False: there is none.
  bool put(const ExpertVersion& version);

  const ResidencyCounts& counts() const { return counts_; }

 private:
  struct Slot {
    bool taken = false;
    ExpertVersion version;
    bool in_use = false;   // of the running layer
    bool guessed = false;  // for the layer of its version
    bool ahead = false;    // read ahead and not used since
  };
  struct Pool {
    std::vector<Slot> slots;
    std::vector<int64_t> free;   // the last one is taken next
    std::vector<int32_t> where;  // by layer * experts + expert, -1
  };

  Pool& pool(Precision p) { return pools_[p == Precision::high ? 1 : 0]; }
  const Pool& pool(Precision p) const { return pools_[p == Precision::high ? 1 : 0]; }
  size_t flat(const ExpertVersion& v) const { return static_cast<size_t>(v.layer * sizes_.experts + v.expert); }
  int64_t take(Precision p, const Moment& now, bool from_guesses);
  int64_t evict(Pool& pool, const Moment& now, int64_t guesses_of, std::vector<int64_t>& busy);
  void insert(const ExpertVersion& v, int64_t slot, bool ahead);
  void remove(Pool& pool, int64_t slot);
  void cancel(Pool& pool, int64_t slot);

  PoolSizes sizes_;
  std::shared_ptr<OffloadPolicy> policy_;
  Loader* loader_;
  Pool pools_[2];  // low, high
  std::vector<uint8_t> guessed_layer_, expected_;
  ResidencyCounts counts_;
};

}  // namespace moiety
