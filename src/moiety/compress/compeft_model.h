#pragma once
// ComPEFT over whole experts: models and adapter folders to files of signs, and such files (or whole models) merged
// into a base (Yadav et al. 2023, arXiv 2311.13171).
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "moiety/compress/compeft.h"
#include "moiety/io/checkpoint.h"
#include "moiety/io/task_vector.h"

namespace moiety {

struct CompeftOptions {
  CompeftConfig config;
  bool masks = false;  ///< store two bit masks, which are larger and need no decoding, in place of the code
  /// Regular expressions from the start of a name ("base_model.model." left out): tensors that are stored as they are.
  std::vector<std::string> exclude = {"classifier.*"};
  bool dry_run = false;
};
struct CompeftReport {
  std::string kind, form;
  int64_t d = 0, kept = 0;
  double scale = 0.0;
  int64_t bytes_before = 0, bytes = 0;  ///< of the expert's tensors in the vector; of the file (0: not written)
  double entropy_bits = 0.0;            ///< of the signs, by Shannon
};

/// What a model adds to its base, as a file. One of two tied tensors is left out and rebuilt. Throws Error: a GGUF file
/// or blocks, other tensors than the base's, integers that differ, a name in `exclude` that is no regular expression.
CompeftReport compress_expert(const Checkpoint& expert, const Checkpoint& base, const std::string& base_name,
                              const CompeftOptions& options, const std::filesystem::path& out);
/// An adapter folder as PEFT writes it (LoRA: its A and B as they are; IA3), its adapter_config.json in the file.
CompeftReport compress_adapter(const std::filesystem::path& folder, const CompeftOptions& options,
                               const std::filesystem::path& out);

/// What one expert adds to a base, tensor by tensor.
class ExpertDelta {
 public:
  virtual ~ExpertDelta() = default;
  /// f32 in the tensor's shape; undefined where the expert is the base.
  virtual torch::Tensor get(const std::string& name) const = 0;
  /// Tensors that it brings along: heads.
  virtual std::vector<TensorView> others() const { return {}; }
};
/// A compressed one. Error: it is an adapter's, or made for other tensors than the base's.
std::shared_ptr<const ExpertDelta> compressed_delta(std::shared_ptr<const TaskVectorFile> file, const Checkpoint& base);
/// A whole model, taken from its file when it is asked for; below density 1 only the largest differences of all, which
/// are held in memory.
std::shared_ptr<const ExpertDelta> model_delta(std::shared_ptr<const Checkpoint> expert,
                                               std::shared_ptr<const Checkpoint> base, double density = 1.0,
                                               const std::vector<std::string>& exclude = {});
/// DARE (Yu et al. 2023, arXiv 2311.03099): every entry of what an expert adds is dropped with probability `drop`, the
/// others count 1 / (1 - drop) times. The same entries whenever a tensor is asked for: they follow from seed and name.
/// Error: drop outside [0, 1).
std::shared_ptr<const ExpertDelta> dropped_delta(std::shared_ptr<const ExpertDelta> delta, double drop, uint64_t seed);
/// base + lambda merge(deltas), a tensor at a time, in the base's types. Heads join where there is one expert. Throws
/// Error: no expert, a base in blocks.
std::shared_ptr<const Checkpoint> merged_experts(std::shared_ptr<const Checkpoint> base,
                                                 std::vector<std::shared_ptr<const ExpertDelta>> deltas,
                                                 const TaskMergeConfig& config, double lambda);

/// Compressed adapters of one kind, settings and shape as an adapter folder over `base_name`: theta_init + lambda
/// merge(all). Throws Error where they differ (naming the setting or tensor).
void merge_adapters(const std::vector<std::shared_ptr<const TaskVectorFile>>& files, const TaskMergeConfig& config,
                    double lambda, const std::string& base_name, const std::filesystem::path& folder);

}  // namespace moiety
