#pragma once
// Where the fields of each block format lie: scales, and the quants as small integers. Shared by decoding and products;
// unnamed, because files built for different instruction sets must not share a copy.
#include <cstddef>
#include <cstdint>

#include "moiety/kernels/half.h"

namespace moiety {
namespace {

template <class T>
[[gnu::always_inline]] inline T load(const uint8_t* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
[[gnu::always_inline]] inline float load_half(const uint8_t* p) {
  return half_to_float(load<uint16_t>(p));
}

struct ScaleMin {
  int scale, min;
};
// Six-bit scale and minimum of sub-block g of Q4_K and Q5_K, s at the 12 bytes.
[[gnu::always_inline]] inline ScaleMin k_scale(const uint8_t* s, int g) {
  if (g < 4) return {s[g] & 63, s[g + 4] & 63};
  return {(s[g + 4] & 15) | (s[g - 4] >> 6) << 4, (s[g + 4] >> 4) | (s[g] >> 6) << 4};
}

// Digit of a byte that holds five base-3 digits as ceil(256 v / 243), most significant first; `power` is 3^(its
// number).
[[gnu::always_inline]] inline int base3_digit(uint8_t byte, int power) {
  return (static_cast<int>(static_cast<uint8_t>(byte * power)) * 3) >> 8;
}
constexpr int kPowersOf3[5] = {1, 3, 9, 27, 81};

// E2M1 values times two.
constexpr int8_t kE2m1Twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(e - 128): half the stored scale, because the table is doubled. 255 is NaN.
[[gnu::always_inline]] inline float e8m0_half(uint8_t e) {
  const uint32_t small = 0x00200000u << (e & 1), normal = (static_cast<uint32_t>(e) - 1) << 23;
  return float_from_bits(e < 2 ? small : e == 255 ? 0x7fc00000u : normal);
}

// unpack: quants with their offset removed, in element order.
struct Q80 {
  static constexpr int kBytes = 34;
  static constexpr bool kMin = false;
  [[gnu::always_inline]] static float scale(const uint8_t* p) { return load_half(p); }
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) { __builtin_memcpy(v, p + 2, 32); }
};

struct Q40 {
  static constexpr int kBytes = 18;
  static constexpr bool kMin = false;
  [[gnu::always_inline]] static float scale(const uint8_t* p) { return load_half(p); }
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    for (int j = 0; j < 16; ++j) v[j] = static_cast<int8_t>((p[2 + j] & 15) - 8);
    for (int j = 0; j < 16; ++j) v[j + 16] = static_cast<int8_t>((p[2 + j] >> 4) - 8);
  }
};

struct Q41 {
  static constexpr int kBytes = 20;
  static constexpr bool kMin = true;
  [[gnu::always_inline]] static float scale(const uint8_t* p) { return load_half(p); }
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    for (int j = 0; j < 16; ++j) v[j] = static_cast<int8_t>(p[4 + j] & 15);
    for (int j = 0; j < 16; ++j) v[j + 16] = static_cast<int8_t>(p[4 + j] >> 4);
  }
};

// Nibbles at q with the fifth bits in `high`.
[[gnu::always_inline]] inline void unpack_5(const uint8_t* q, uint32_t high, int offset, int8_t* v) {
  for (int j = 0; j < 16; ++j)
    v[j] = static_cast<int8_t>(((q[j] & 15) | static_cast<int>(high >> j & 1u) << 4) - offset);
  for (int j = 0; j < 16; ++j)
    v[j + 16] = static_cast<int8_t>(((q[j] >> 4) | static_cast<int>(high >> (j + 16) & 1u) << 4) - offset);
}

struct Q50 {
  static constexpr int kBytes = 22;
  static constexpr bool kMin = false;
  [[gnu::always_inline]] static float scale(const uint8_t* p) { return load_half(p); }
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    unpack_5(p + 6, load<uint32_t>(p + 2), 16, v);
  }
};

struct Q51 {
  static constexpr int kBytes = 24;
  static constexpr bool kMin = true;
  [[gnu::always_inline]] static float scale(const uint8_t* p) { return load_half(p); }
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    unpack_5(p + 8, load<uint32_t>(p + 4), 0, v);
  }
};

struct Mxfp4 {
  static constexpr int kBytes = 17;
  static constexpr bool kMin = false;
  [[gnu::always_inline]] static float scale(const uint8_t* p) { return e8m0_half(p[0]); }
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    for (int j = 0; j < 16; ++j) v[j] = kE2m1Twice[p[1 + j] & 15];
    for (int j = 0; j < 16; ++j) v[j + 16] = kE2m1Twice[p[1 + j] >> 4];
  }
};

struct Q4K {
  static constexpr int kBytes = 144;
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    const uint8_t* q = p + 16;
    for (int c = 0; c < 4; ++c, q += 32, v += 64) {
      for (int l = 0; l < 32; ++l) v[l] = static_cast<int8_t>(q[l] & 15);
      for (int l = 0; l < 32; ++l) v[l + 32] = static_cast<int8_t>(q[l] >> 4);
    }
  }
};

struct Q5K {
  static constexpr int kBytes = 176;
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    const uint8_t* high = p + 16;
    const uint8_t* q = p + 48;
    for (int c = 0; c < 4; ++c, q += 32, v += 64) {
      for (int l = 0; l < 32; ++l) v[l] = static_cast<int8_t>((q[l] & 15) | (high[l] >> (2 * c) & 1) << 4);
      for (int l = 0; l < 32; ++l) v[l + 32] = static_cast<int8_t>((q[l] >> 4) | (high[l] >> (2 * c + 1) & 1) << 4);
    }
  }
};

struct Q6K {
  static constexpr int kBytes = 210;
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    for (int half = 0; half < 2; ++half)
      for (int part = 0; part < 4; ++part, v += 32) {
        const uint8_t* low = p + 64 * half + 32 * (part & 1);
        const uint8_t* high = p + 128 + 32 * half;
        const int nibble = part < 2 ? 0 : 4, pair = 2 * part;
        for (int l = 0; l < 32; ++l)
          v[l] = static_cast<int8_t>(((low[l] >> nibble & 15) | (high[l] >> pair & 3) << 4) - 32);
      }
  }
};

struct TQ10 {
  static constexpr int kBytes = 54;
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    for (int k = 0; k < 5; ++k)
      for (int m = 0; m < 32; ++m) v[m + 32 * k] = static_cast<int8_t>(base3_digit(p[m], kPowersOf3[k]) - 1);
    for (int k = 0; k < 5; ++k)
      for (int m = 0; m < 16; ++m) v[160 + m + 16 * k] = static_cast<int8_t>(base3_digit(p[32 + m], kPowersOf3[k]) - 1);
    for (int k = 0; k < 4; ++k)
      for (int m = 0; m < 4; ++m) v[240 + m + 4 * k] = static_cast<int8_t>(base3_digit(p[48 + m], kPowersOf3[k]) - 1);
  }
};

struct TQ20 {
  static constexpr int kBytes = 66;
  [[gnu::always_inline]] static void unpack(const uint8_t* p, int8_t* v) {
    for (int j = 0; j < 2; ++j)
      for (int k = 0; k < 4; ++k, v += 32)
        for (int m = 0; m < 32; ++m) v[m] = static_cast<int8_t>((p[32 * j + m] >> (2 * k) & 3) - 1);
  }
};

}  // namespace
}  // namespace moiety
