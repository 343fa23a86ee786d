#pragma once
// Where experts are stored, and how stored bytes become what computes. The store asks for bytes and hands them back; it
// knows no formats.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "moiety/kernels/format.h"
#include "moiety/offload/policy.h"

namespace moiety {

/// Bytes of a file: a matrix of an expert, or all of it.
struct StoredPiece {
  size_t file = 0;  ///< index into ExpertSource::files()
  int64_t offset = 0, bytes = 0;
};

/// One matrix [rows, cols] in a slot.
struct SlotMatrix {
  int64_t offset = 0;   ///< a multiple of 64
  bool packed = false;  ///< for products (kernels/packed.h); otherwise as `format` says: blocks, or plain numbers
  Format format = Format::F32;
  int64_t rows = 0, cols = 0;
};

/// Safe to use from the reading thread and the computing one at once: const functions change nothing.
class ExpertSource {
 public:
  virtual ~ExpertSource() = default;
  virtual int64_t layers() const = 0;
  virtual int64_t experts() const = 0;
  virtual bool has_low() const = 0;
  virtual const std::vector<std::filesystem::path>& files() const = 0;
  /// What has to be read for a version, in the order in which it is unpacked. The number of pieces is the same for all.
  virtual std::vector<StoredPiece> pieces(const ExpertVersion& version) const = 0;
  /// Where and how matrix `which` (0 gate, 1 up, 2 down) of a version lies in its slot.
  virtual SlotMatrix matrix(const ExpertVersion& version, int which) const = 0;
  /// Bytes of a slot that holds any expert of this precision in the form that computes.
  virtual int64_t slot_bytes(Precision precision) const = 0;
  /// Puts piece `piece` of a version, as read, into its slot (64-byte aligned). Runs on the reading thread.
  virtual void unpack(const ExpertVersion& version, size_t piece, std::span<const std::byte> bytes,
                      std::byte* slot) const = 0;
};

}  // namespace moiety
