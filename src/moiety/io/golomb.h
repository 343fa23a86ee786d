#pragma once
// Sparse signs: two bit masks to compute with, and the Golomb position code that files hold (ComPEFT, Yadav et al.
// 2023, arXiv 2311.13171; the code: Golomb 1966, Strom 2015). Nothing here depends on the number of threads.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace moiety {

/// d entries of -1, 0 or 1: entry i is bit i mod 64, counted from the least significant, of word i div 64 of both
/// masks. No bit is set in both, none behind d.
struct TernaryMasks {
  TernaryMasks() = default;
  explicit TernaryMasks(int64_t entries);
  int64_t d = 0;
  std::vector<uint64_t> positive, negative;

  /// Entries that are not 0, of all or of the first `end`.
  int64_t kept() const { return kept(d); }
  int64_t kept(int64_t end) const;
  bool operator==(const TernaryMasks&) const = default;
};

/// Error: a value that is not -1, 0 or 1.
TernaryMasks ternary_masks(std::span<const int8_t> signs);
std::vector<int8_t> ternary_signs(const TernaryMasks& masks);

/// By population counts, exact; Error when the two are of different lengths.
int64_t ternary_dot(const TernaryMasks& a, const TernaryMasks& b);
/// dot / sqrt(kept_a kept_b); 0 when one of them keeps nothing.
double ternary_cosine(const TernaryMasks& a, const TernaryMasks& b);
/// Entries in which the two differ.
int64_t ternary_hamming(const TernaryMasks& a, const TernaryMasks& b);

/// b, the low bits of a gap that are written as they are: max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - p)))), p = kept /
/// d; 0 where p is 0 or 1.
int64_t golomb_low_bits(int64_t kept, int64_t d);
/// What d signs hold by Shannon, with 16 bits for their scale: 16 - d ((1 - p) log2(1 - p) + p log2(p / 2)).
double ternary_entropy_bits(int64_t kept, int64_t d);
/// Bits that the code is expected to take for one kept entry, its sign included: b + 1 / (1 - (1 - p)^(2^b)) + 1.
double golomb_expected_bits(int64_t kept, int64_t d);

struct GolombCode {
  std::vector<std::byte> bytes;  ///< the first bit in the most significant place, zeros at the end
  int64_t bits = 0;
};
/// For every kept entry, g = entries since the one before it: g >> b ones, a zero, the b low bits of g with the most
/// significant first, and, with `signs`, a 1 where it is negative, else a 0.
GolombCode golomb_encode(const TernaryMasks& masks, int64_t b, bool signs = true);

/// Reads such a code one kept entry at a time; trusts nothing of it and allocates nothing.
class GolombReader {
 public:
  /// Error: a count, d or b that cannot be. `where` names the source in errors.
  GolombReader(std::span<const std::byte> code, int64_t d, int64_t kept, int64_t b, bool signs, std::string where);
  /// The next kept entry; false behind the last one. Throws Error: the code ends early or leads beyond d, and, behind
  /// the last one, more than the zeros that fill a byte.
  bool next(int64_t& position, bool& negative);

 private:
  uint64_t window() const;
  int64_t quotient();

  std::span<const std::byte> code_;
  int64_t d_, left_, b_;
  bool signs_;
  std::string where_;
  int64_t at_ = 0, end_, previous_ = -1;  // in bits; entry
};
/// All of it, d / 4 bytes: ask only for a d that something else vouches for.
TernaryMasks golomb_decode(std::span<const std::byte> code, int64_t d, int64_t kept, int64_t b, bool signs = true,
                           const std::string& where = "a Golomb code");

}  // namespace moiety
