#pragma once
// A compressed task vector on disk: what a fine-tuned expert adds to its base, as signs and one scale (ComPEFT, Yadav
// et al. 2023, arXiv 2311.13171). A safetensors file whatever its suffix; docs/systems/compeft.md describes it.
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moiety/io/golomb.h"
#include "moiety/io/safetensors.h"

namespace moiety {

/// One tensor in the flat vector: those of a file stand in ascending order of their names as bytes, each row by row.
struct TaskVectorEntry {
  std::string name;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  ///< in the flat vector
};
/// Fills begin and end; returns d. Error: names that do not ascend, negative sizes, more than 2^48 entries.
int64_t lay_out(std::vector<TaskVectorEntry>& entries, const std::string& where);

struct TaskVectorHeader {
  std::string kind = "full";    ///< full, lora, ia3: what the vector is a difference from
  std::string form = "golomb";  ///< golomb, masks: signs; prune: positions and their values; dense: all values
  double density = 1.0, alpha = 1.0;
  float scale = 0.0f;  ///< of the signs
  int64_t d = 0;       ///< entries of the flat vector
  int64_t kept = 0;    ///< that are not 0; none where the scale is 0
  int64_t b = 0;       ///< of the Golomb code
  std::vector<TaskVectorEntry> entries;
  std::map<std::string, std::string> aliases;  ///< tensors that are another one: name -> name
  std::map<std::string, std::string> notes;    ///< "base", "adapter_config", ...: anything that a user may want back
};

class TaskVectorFile {
 public:
  /// Reads header and tables, and trusts no count, length or name in them. Throws Error.
  static std::shared_ptr<const TaskVectorFile> open(const std::filesystem::path& path);
  /// The same over bytes in memory; `owner` keeps them alive.
  static std::shared_ptr<const TaskVectorFile> parse(std::span<const std::byte> bytes, const std::string& where,
                                                     std::shared_ptr<const void> owner = nullptr);

  const TaskVectorHeader& header() const { return header_; }
  const std::string& where() const { return where_; }
  int64_t bytes() const { return bytes_; }  ///< of the file
  /// The signs; of the form prune, kept positions as positive ones. Takes d / 4 bytes: compare the entries with a
  /// model's before. Error: a damaged stream; the form dense.
  TernaryMasks masks() const;
  /// prune: the kept values in order; dense: all. Error: another form.
  std::vector<float> values() const;
  /// Tensors beside the vector, under their own names.
  const std::vector<TensorInfo>& others() const { return others_; }
  TensorView other(const std::string& name) const;

 private:
  std::string where_;
  int64_t bytes_ = 0;
  std::shared_ptr<const SafetensorsFile> file_;
  TaskVectorHeader header_;
  std::vector<TensorInfo> others_;
};
/// Whether a file is one, by its header.
bool is_task_vector(const std::filesystem::path& path);

/// Writes one. `masks` for all forms but dense, `values` for prune (kept, stored in half) and dense (all). d, kept and
/// b of the header are worked out. Returns the bytes of the file. Throws Error: what does not fit together, values that
/// half cannot hold, another tensor named like one of the format.
int64_t write_task_vector(const std::filesystem::path& path, TaskVectorHeader header, const TernaryMasks& masks,
                          std::span<const float> values = {}, const std::vector<TensorView>& others = {});

}  // namespace moiety
