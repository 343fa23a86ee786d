#include "moiety/offload/edge_source.h"

namespace moiety {

EdgeExpertSource::EdgeExpertSource(std::shared_ptr<const EdgeExperts> experts)
    : experts_(std::move(experts)), files_{experts_->path()} {}

std::vector<StoredPiece> EdgeExpertSource::pieces(const ExpertVersion& v) const {
  const auto range = experts_->range(v.layer, v.expert);
  return {{0, range.offset, range.bytes}};
}

SlotMatrix EdgeExpertSource::matrix(const ExpertVersion&, int which) const {
  const EdgeLayout& l = experts_->layout();
  const bool down = which == 2;
  return {.offset = which * stride(),
          .packed = false,
          .format = l.bf16 ? Format::BF16 : Format::F32,
          .rows = down ? l.hidden : l.width,
          .cols = down ? l.width : l.hidden};
}

int64_t EdgeExpertSource::slot_bytes(Precision precision) const {
  return precision == Precision::high ? 3 * stride() : 0;
}

void EdgeExpertSource::unpack(const ExpertVersion& v, size_t, std::span<const std::byte> bytes, std::byte* slot) const {
  experts_->decode(v.layer, v.expert, bytes, {slot, slot + stride(), slot + 2 * stride()});
}

}  // namespace moiety
