#pragma once
// The experts of an edgemoe model (io/edge_experts.h) as the store reads them: one contiguous read an expert, whatever
// its width, decoded by the reading thread, so that compute sees plain numbers.
#include <memory>
#include <vector>

#include "moiety/io/edge_experts.h"
#include "moiety/offload/source.h"

namespace moiety {

class EdgeExpertSource : public ExpertSource {
 public:
  explicit EdgeExpertSource(std::shared_ptr<const EdgeExperts> experts);

  int64_t layers() const override { return experts_->layout().layers(); }
  int64_t experts() const override { return experts_->layout().experts; }
  bool has_low() const override { return false; }
  const std::vector<std::filesystem::path>& files() const override { return files_; }
  std::vector<StoredPiece> pieces(const ExpertVersion& version) const override;
  SlotMatrix matrix(const ExpertVersion& version, int which) const override;
  int64_t slot_bytes(Precision precision) const override;
  void unpack(const ExpertVersion& version, size_t piece, std::span<const std::byte> bytes,
              std::byte* slot) const override;

 private:
  int64_t stride() const { return (experts_->matrix_bytes() + 63) / 64 * 64; }
  std::shared_ptr<const EdgeExperts> experts_;
  std::vector<std::filesystem::path> files_;
};

}  // namespace moiety
