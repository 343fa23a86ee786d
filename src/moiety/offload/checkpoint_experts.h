#pragma once
// The experts of an ordinary checkpoint as the store reads them: three matrices of any format, and their low-precision
// copies where the file has them.
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "moiety/io/tensor_view.h"
#include "moiety/offload/source.h"

namespace moiety {

/// Gate, up and down of one expert, mapped; never read through the mapping.
struct ExpertViews {
  TensorView matrices[3];
};

/// What a checkpoint calls the low-precision copy of a block's stacked experts; `which`: 0 gate, 1 up, 2 down. In the
/// GGUF file it is blk.N.ffn_gate_exps.low.weight.
std::string low_tensor(int64_t block, int which);

class CheckpointExperts : public ExpertSource {
 public:
  struct Layer {
    std::vector<ExpertViews> high, low;  ///< by expert; low is empty where there are no copies
  };
  /// `compute`: the format of plain numbers that products take (F32 or BF16). `exact`: blocks are kept as they are, for
  /// products that decode them. Error: a matrix that lies in no file.
  CheckpointExperts(std::vector<Layer> layers, Format compute, bool exact);

  int64_t layers() const override { return static_cast<int64_t>(layers_.size()); }
  int64_t experts() const override { return experts_; }
  bool has_low() const override { return has_low_; }
  const std::vector<std::filesystem::path>& files() const override { return files_; }
  std::vector<StoredPiece> pieces(const ExpertVersion& version) const override;
  SlotMatrix matrix(const ExpertVersion& version, int which) const override;
  int64_t slot_bytes(Precision precision) const override { return slot_bytes_[precision == Precision::high ? 1 : 0]; }
  void unpack(const ExpertVersion& version, size_t piece, std::span<const std::byte> bytes,
              std::byte* slot) const override;
  /// Nominal bits of a weight, without scales: 4 of Q4_0; the mean over all matrices.
  double bits(Precision precision) const;

 private:
  struct Matrix {
    StoredPiece piece;
    Format stored = Format::F32;
    SlotMatrix slot;
  };
  const Matrix& at(const ExpertVersion& v, size_t which) const;
  void add(const TensorView& view, Format compute, bool exact, int64_t& offset, std::vector<Matrix>& to);

  std::vector<Layer> layers_;  // keeps the mappings
  int64_t experts_ = 0;
  bool has_low_ = false;
  std::vector<std::filesystem::path> files_;
  std::vector<Matrix> matrices_[2];  // low, high: [layer, expert, 3]
  int64_t slot_bytes_[2] = {0, 0};
};

}  // namespace moiety
