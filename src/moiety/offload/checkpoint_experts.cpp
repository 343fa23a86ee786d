#include "moiety/offload/checkpoint_experts.h"

#include <algorithm>
#include <cstring>

#include "moiety/base/error.h"
#include "moiety/io/mapped_file.h"
#include "moiety/kernels/packed.h"

namespace moiety {
namespace {

int64_t whole_lines(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

int64_t slot_bytes_of(const SlotMatrix& m) {
  return m.packed ? packed_groups(m.rows) * packed_group_bytes(m.format, m.cols) : m.rows * row_bytes(m.format, m.cols);
}

}  // namespace

std::string low_tensor(int64_t block, int which) {
  static constexpr const char* kNames[] = {"gate", "up", "down"};
  return fmt::format("gguf.blk.{}.ffn_{}_exps.low.weight", block, kNames[which]);
}

CheckpointExperts::CheckpointExperts(std::vector<Layer> layers, Format compute, bool exact)
    : layers_(std::move(layers)) {
  check(!layers_.empty() && !layers_[0].high.empty(), "no expert layers: there is nothing to offload");
  experts_ = static_cast<int64_t>(layers_[0].high.size());
  has_low_ = std::all_of(layers_.begin(), layers_.end(), [](const Layer& l) { return !l.low.empty(); });
  for (const Layer& l : layers_) {
    check(static_cast<int64_t>(l.high.size()) == experts_ && (l.low.empty() || l.low.size() == l.high.size()),
          "layers with {} and {} experts cannot share one store", experts_, l.high.size());
    for (const auto p : {Precision::low, Precision::high}) {
      const size_t i = p == Precision::high ? 1 : 0;
      if (p == Precision::low && !has_low_) continue;
      for (const ExpertViews& e : i == 1 ? l.high : l.low) {
        int64_t offset = 0;
        for (const TensorView& v : e.matrices) add(v, compute, exact, offset, matrices_[i]);
        slot_bytes_[i] = std::max(slot_bytes_[i], offset);
      }
    }
  }
}

void CheckpointExperts::add(const TensorView& view, Format compute, bool exact, int64_t& offset,
                            std::vector<Matrix>& to) {
  const auto place = MappedFile::locate(view.data.data());
  check(place.has_value(),
        "tensor '{}' lies in no file in the form that is computed with, so its experts cannot be read from one; write "
        "the model out first (moiety convert)",
        view.name);
  const auto file = std::find(files_.begin(), files_.end(), place->path);
  Matrix m;
  m.piece = {static_cast<size_t>(file - files_.begin()), static_cast<int64_t>(place->offset),
             static_cast<int64_t>(view.data.size())};
  if (file == files_.end()) files_.push_back(place->path);
  m.stored = view.format;
  m.slot = {.offset = offset,
            .packed = !exact && can_pack(view.format),
            .format = view.format,
            .rows = view.rows(),
            .cols = view.cols()};
  if (!is_block(view.format)) m.slot.format = compute;
  offset = whole_lines(offset + slot_bytes_of(m.slot));
  to.push_back(m);
}

const CheckpointExperts::Matrix& CheckpointExperts::at(const ExpertVersion& v, size_t which) const {
  return matrices_[v.precision == Precision::high ? 1 : 0]
                  [static_cast<size_t>((v.layer * experts_ + v.expert) * 3) + which];
}

std::vector<StoredPiece> CheckpointExperts::pieces(const ExpertVersion& v) const {
  return {at(v, 0).piece, at(v, 1).piece, at(v, 2).piece};
}

SlotMatrix CheckpointExperts::matrix(const ExpertVersion& v, int which) const {
  return at(v, static_cast<size_t>(which)).slot;
}

void CheckpointExperts::unpack(const ExpertVersion& v, size_t piece, std::span<const std::byte> bytes,
                               std::byte* slot) const {
  const Matrix& m = at(v, piece);
  std::byte* to = slot + m.slot.offset;
  if (m.slot.packed) {
    const int64_t group = packed_group_bytes(m.slot.format, m.slot.cols);
    for (int64_t g = 0; g < packed_groups(m.slot.rows); ++g)
      pack_group(m.slot.format, bytes.data(), m.slot.rows, m.slot.cols, g, to + g * group);
    return;
  }
  if (m.stored == m.slot.format) {
    std::memcpy(to, bytes.data(), bytes.size());
    return;
  }
  // Plain numbers of another type than products take.
  const int64_t from_row = row_bytes(m.stored, m.slot.cols), to_row = row_bytes(m.slot.format, m.slot.cols);
  std::vector<float> row(static_cast<size_t>(m.slot.cols));
  for (int64_t r = 0; r < m.slot.rows; ++r) {
    dequantize_row(m.stored, bytes.data() + r * from_row, row.data(), m.slot.cols);
    quantize_row(m.slot.format, row.data(), to + r * to_row, m.slot.cols);
  }
}

double CheckpointExperts::bits(Precision p) const {
  double sum = 0.0, all = 0.0;
  for (const Matrix& m : matrices_[p == Precision::high ? 1 : 0]) {
    const FormatInfo& f = info(m.stored);
    const auto elements = static_cast<double>(m.slot.rows * m.slot.cols);
    sum += elements * static_cast<double>(8 * f.bytes / f.block);
    all += elements;
  }
  return all > 0.0 ? sum / all : 0.0;
}

}  // namespace moiety
