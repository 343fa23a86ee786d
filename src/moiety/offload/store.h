#pragma once
// Experts that stay on disk: a fixed number of slots in memory, filled by explicit reads, never by page faults. One
// thread reads and unpacks, piece by piece, on-demand reads before those ahead; the computing thread decides and waits.
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <span>
#include <thread>
#include <vector>

#include "moiety/offload/reader.h"
#include "moiety/offload/residency.h"
#include "moiety/offload/source.h"

namespace moiety {

struct StoreOptions {
  int64_t capacity_high = 0, capacity_low = 0;  ///< experts
  bool sync = false;                            ///< every read is done where it is asked for: equal capacities repeat
  ReadOptions read;
};

struct StoreStats {
  ResidencyCounts counts;
  int64_t bytes_read = 0;
  int64_t experts_read = 0;
  int64_t reads = 0;           ///< pieces
  double stall_seconds = 0.0;  ///< the computing thread waited for reads
  double read_seconds = 0.0;   ///< reads were under way, or what they brought was unpacked
  double disk_seconds = 0.0;   ///< of these: the reading thread waited for the disk
  bool direct = false, uring = false;
  /// Every expert was used as the file has it in high precision, and none left out.
  bool lossless() const { return counts.altered == 0; }
  double hit_rate() const;
  /// What happened after `before`.
  StoreStats since(const StoreStats& before) const;
  nlohmann::ordered_json json() const;
  std::string summary() const;  ///< some lines for people
};

/// An expert that may be computed now.
struct ReadyExpert {
  int64_t expert = 0;
  Precision precision = Precision::high;
  const std::byte* memory = nullptr;
};

class ExpertStore : private Loader {
 public:
  /// Asks the policy to begin, and begins to read what it wants at first. Error: capacities that are too small for
  /// `setup.top_k`, a file that cannot be opened.
  ExpertStore(std::shared_ptr<const ExpertSource> source, std::shared_ptr<OffloadPolicy> policy, PolicySetup setup,
              StoreOptions options);
  ~ExpertStore() override;

  void begin_sequence() { residency_.begin_sequence(); }
  /// Runs one layer of one step: looks up, reads, reads ahead, and calls `compute` with experts that are ready, each
  /// expert of the demand once, in one call or several. Returns what became of every expert, in the policy's order;
  /// those with Precision::skip were not computed. Error: a read failed, naming layer, expert, file and offset.
  std::vector<Use> run(const Demand& demand, LookAhead* look,
                       const std::function<void(std::span<const ReadyExpert>)>& compute);
  /// What each expert of the demand is going to be used in if it ran now; nothing is changed.
  std::vector<Use> preview(const Demand& demand);
  /// Reads a version where its pool has room, and waits for it. False: there is none.
  bool preload(const ExpertVersion& version);

  const Residency& residency() const { return residency_; }
  StoreStats stats() const;
  /// Bytes that slots and buffers of such a store take.
  static int64_t memory(const ExpertSource& source, int64_t capacity_high, int64_t capacity_low);
  /// Of one slot as it lies in memory.
  static int64_t slot_stride(const ExpertSource& source, Precision precision);
  /// Of staging slots and read buffers alone.
  static int64_t overhead(const ExpertSource& source, bool low);

 private:
  enum class State : uint8_t { idle, queued, reading, ready };
  struct Slot {
    State state = State::idle;
    size_t left = 0;  // pieces that are not unpacked
  };
  struct Place {
    Precision precision = Precision::high;
    int64_t slot = 0;
  };
  struct Task {
    ExpertVersion version;
    int64_t slot = 0;
    size_t begun = 0;  // pieces
  };
  struct Buffer {
    Reader::Read read;
    std::byte* memory = nullptr;
    bool taken = false;
    Task task;  // of the piece
    size_t piece = 0;
  };

  void load(const ExpertVersion& version, int64_t slot, bool ahead) override;
  void hurry(const ExpertVersion& version, int64_t slot) override;
  Released release(const ExpertVersion& version, int64_t slot) override;
  void wait_for_one(Precision precision) override;

  void read_loop();
  void begin_reads();
  void end_read();
  void read_now(const Task& task);
  bool ready(Precision precision, int64_t slot);
  void wait_ready(const std::vector<Place>& any);
  std::byte* memory_of(Precision precision, int64_t slot) const;
  std::vector<Slot>& slots(Precision p) { return slots_of_[p == Precision::high ? 1 : 0]; }
  Slot& slot(Precision p, int64_t at) { return slots(p)[static_cast<size_t>(at)]; }
  int64_t pool_slots(Precision p) const { return p == Precision::high ? slots_high_ : slots_low_; }
  void rethrow();

  std::shared_ptr<const ExpertSource> source_;
  StoreOptions options_;
  int64_t slots_high_, slots_low_;
  std::unique_ptr<PageMemory> arena_[2], buffer_memory_;
  std::vector<Buffer> buffers_;  // of the reading thread
  int64_t stride_[2] = {0, 0};
  Reader reader_;
  mutable std::mutex lock_;
  std::condition_variable work_, done_;
  std::vector<Slot> slots_of_[2];    // the last slot of a pool is the staging slot
  std::deque<Task> wanted_, ahead_;  // some of whose pieces have not begun
  std::exception_ptr failure_;
  bool stop_ = false;
  int64_t bytes_read_ = 0, experts_read_ = 0, reads_ = 0;
  double stall_seconds_ = 0.0, read_seconds_ = 0.0, disk_seconds_ = 0.0;
  Residency residency_;
  std::thread thread_;
};

}  // namespace moiety
