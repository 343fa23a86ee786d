#pragma once
// How a group of 16 packed rows lies in memory: as it is read, so that the hardware, which looks ahead along a single
// stream, has the next bytes ready: stretches of so many blocks that what these are multiplied by at their end fills a
// line, first these, then block by block integer scales, and quants with the bits above the fourth woven in where they
// are met first. A "quad" is 4 elements of each of the 16 rows, 64 bytes, what one product instruction takes (internal
// to kernels/).
#include <cstdint>

namespace moiety {

struct PackedLayout {
  int block;          ///< elements of a block
  int offset;         ///< added to the quants to make them unsigned
  int quants;         ///< bytes a block: whole quads, or low and high halves of bytes, or pairs of bits
  int high = 0;       ///< bytes a block of the bits above the fourth
  int scales = 0;     ///< bytes a block of integer scales (Q4_K, Q5_K: 8 [16], then 4 pairs of minimums [16][2]; Q6_K)
  int weave = 1;      ///< so many quads of bits above, then those of quants that they belong to,
  int lots = 1;       ///< as many in so many lots; quants that meet them again later follow in order
  bool min = false;   ///< halves of minimums follow the halves of scales
  bool e2m1 = false;  ///< quants are codes of E2M1, doubled where they are looked up, scales bytes of E8M0
  constexpr int64_t ends() const { return e2m1 ? 16 : min ? 64 : 32; }  ///< bytes of what a block is multiplied by
  constexpr int64_t body() const { return scales + high + quants; }     ///< bytes of the rest of a block
  constexpr int64_t together() const { return 64 / ends(); }            ///< blocks of a stretch
  // The last stretch may have fewer blocks: only their bodies are left out.
  constexpr int64_t bytes(int64_t blocks) const { return blocks == 0 ? 0 : body_at(blocks - 1) + body(); }
  constexpr int64_t ends_at(int64_t b) const { return stretch_at(b) + b % together() * ends(); }
  constexpr int64_t body_at(int64_t b) const { return stretch_at(b) + 64 + b % together() * body(); }
  // In a body, whose scales come first: quad z of the quants, and of the bits above.
  constexpr int64_t quad_at(int64_t z) const {
    const int64_t all = high / 64;
    if (z >= lots * all) return scales + high + 64 * z;
    return scales + 64 * (weave * ((lots + 1) * (z % all / weave) + 1 + z / all) + z % weave);
  }
  constexpr int64_t above_at(int64_t z) const { return scales + 64 * (weave * (lots + 1) * (z / weave) + z % weave); }

 private:
  constexpr int64_t stretch_at(int64_t b) const { return b / together() * (64 + together() * body()); }
};

// Quad z of a 32-block of nibbles: elements 4z in the low halves, 16 + 4z in the high ones. Bits above: bit z of byte i
// is that of element 4z + i.
constexpr PackedLayout kPackedQ8_0{.block = 32, .offset = 128, .quants = 512};
constexpr PackedLayout kPackedQ4_0{.block = 32, .offset = 8, .quants = 256};
constexpr PackedLayout kPackedQ4_1{.block = 32, .offset = 0, .quants = 256, .min = true};
constexpr PackedLayout kPackedQ5_0{.block = 32, .offset = 16, .quants = 256, .high = 64};
constexpr PackedLayout kPackedQ5_1{.block = 32, .offset = 0, .quants = 256, .high = 64, .min = true};
constexpr PackedLayout kPackedMXFP4{.block = 32, .offset = 16, .quants = 256, .e2m1 = true};
// Quad 8c + z: elements 64c + 4z in the low halves, 64c + 32 + 4z in the high ones. Bits above: quad z, bit g of byte i
// is that of element 32g + 4z + i.
constexpr PackedLayout kPackedQ4_K{.block = 256, .offset = 0, .quants = 2048, .scales = 256, .min = true};
constexpr PackedLayout kPackedQ5_K{.block = 256, .offset = 0, .quants = 2048, .high = 512, .scales = 256, .min = true};
// Quad z: elements 4z in the low halves, 128 + 4z in the high ones. Bits above: quad z, bits 2p of byte i are those of
// element 64p + 4z + i.
constexpr PackedLayout kPackedQ6_K{
    .block = 256, .offset = 32, .quants = 2048, .high = 1024, .scales = 256, .weave = 4, .lots = 2};
// Quad 8c + z: elements 128c + 32k + 4z in bits 2k of bytes. Three values of a weight, of TQ1_0 as of TQ2_0.
constexpr PackedLayout kPackedTernary{.block = 256, .offset = 1, .quants = 1024};

// The blocks of a group one after another.
template <PackedLayout l>
struct PackedBlock {
  const uint8_t *ends, *body;
  [[gnu::always_inline]] explicit PackedBlock(const uint8_t* group) : ends(group), body(group + 64) {}
  /// Asks the second cache for a share of what comes later; shares 0 ... parts - 1 are a block. One row of activations
  /// is better without: its loads go far enough ahead for the hardware to follow, which more rows leave no room for.
  template <int parts>
  [[gnu::always_inline]] void ask(int share) const {
    constexpr int64_t kAhead = 8192, kShare = (l.ends() + l.body() + 64 * parts - 1) / (64 * parts) * 64;
#pragma GCC unroll 12
    for (int64_t i = 0; i < kShare; i += 64) __builtin_prefetch(body + kAhead + share * kShare + i, 0, 2);
  }
  /// From block b to the one behind it.
  [[gnu::always_inline]] void next(int64_t b) {
    ends += l.ends();
    body += l.body();
    if ((b + 1) % l.together() == 0) {
      ends = body;
      body += 64;
    }
  }
};

}  // namespace moiety
