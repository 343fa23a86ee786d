#pragma once
// How a group of 16 packed rows lies in memory: planes one behind another, each with its bytes of all blocks, what
// blocks are multiplied by first. A "quad" is 4 elements of each of the 16 rows, 64 bytes, what one product instruction
// takes (internal to kernels/).
#include <cstdint>

namespace moiety {

struct PackedLayout {
  int block;          ///< elements of a block
  int offset;         ///< added to the quants to make them unsigned
  int quants;         ///< bytes a block: whole quads, or low and high halves of bytes, or pairs of bits
  int high = 0;       ///< bytes a block of the bits above the fourth
  int scales = 0;     ///< bytes a block of integer scales (Q4_K, Q5_K: 8 [16], then 4 pairs of minimums [16][2]; Q6_K)
  bool min = false;   ///< halves of minimums follow the halves of scales
  bool e2m1 = false;  ///< quants are codes of E2M1, doubled where they are looked up, scales bytes of E8M0
  constexpr int64_t ends() const { return e2m1 ? 16 : min ? 64 : 32; }  ///< bytes of what a block is multiplied by
  constexpr int64_t block_bytes() const { return quants + high + scales + ends(); }  ///< in all planes
  // Small planes first: what a kernel asks for behind the quants are then the small planes of the next group.
  constexpr int64_t scales_at(int64_t blocks) const { return (blocks * ends() + 63) / 64 * 64; }
  constexpr int64_t high_at(int64_t blocks) const { return scales_at(blocks) + blocks * scales; }
  constexpr int64_t quants_at(int64_t blocks) const { return high_at(blocks) + blocks * high; }
  constexpr int64_t bytes(int64_t blocks) const { return quants_at(blocks) + blocks * quants; }
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
constexpr PackedLayout kPackedQ6_K{.block = 256, .offset = 32, .quants = 2048, .high = 1024, .scales = 256};
// Quad 8c + z: elements 128c + 32k + 4z in bits 2k of bytes. Three values of a weight, of TQ1_0 as of TQ2_0.
constexpr PackedLayout kPackedTernary{.block = 256, .offset = 1, .quants = 1024};

// Asks the second cache for a share of what comes kAhead bytes later: the hardware looks ahead to the end of a page of
// memory only. Shares 0, 1, ... of a group, `parts` of them a block, are together as many bytes as the group has, so
// that none is left out, planes of the next group included.
constexpr int64_t kAhead = 8192;
template <int64_t block_bytes, int64_t parts>
[[gnu::always_inline]] inline void ask_ahead(const uint8_t* quants, int64_t share) {
  constexpr int64_t kShare = block_bytes / parts;
  const uint8_t* p = quants + kAhead + share * kShare;
#pragma GCC unroll 9
  for (int64_t i = 0; i < kShare; i += 64) __builtin_prefetch(p + i, 0, 2);
}

}  // namespace moiety
