// Plain products, one a format, and the quantization of activations. Included by dot*.cpp, each built for another
// instruction set; the sets with hand-written kernels replace some. Everything is in an unnamed namespace so that no
// copy is shared between them.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "moiety/kernels/block_layout.h"
#include "moiety/kernels/dot_kernels.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

// ---- activations ----------------------------------------------------------------------------------------------------

// Largest magnitude as bits: orders like the values, and anything from 0x7f800000 on is not finite.
template <int kSize>
[[gnu::always_inline]] inline uint32_t largest_bits(const float* x) {
  int32_t largest = 0;
  for (int i = 0; i < kSize; ++i) {
    const auto bits = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return static_cast<uint32_t>(largest);
}

// A quantized block in int8, and what its quants are multiplied by to give x. Instruction sets may have one of their
// own for tile_row(), with the same numbers.
template <int kBlock>
struct Quants {
  static constexpr int kSize = kBlock;
  int32_t q[kSize];
  float scale;

  [[gnu::always_inline]] void take(const float* x);
  [[gnu::always_inline]] void narrow(int8_t* to) const {
    int8_t bytes[kSize];  // by way of what nothing else points to: all at once
    for (int i = 0; i < kSize; ++i) bytes[i] = static_cast<int8_t>(q[i]);
    std::memcpy(to, bytes, kSize);
  }
  /// Sum of the magnitudes.
  [[gnu::always_inline]] int32_t size() const {
    int32_t sum = 0;
    for (int i = 0; i < kSize; ++i) sum += q[i] < 0 ? -q[i] : q[i];
    return sum;
  }
  /// The largest sum of magnitudes of 32.
  [[gnu::always_inline]] int32_t largest_32() const {
    int32_t most = 0;
    for (int g = 0; g < kSize; g += 32) {
      int32_t sum = 0;
      for (int i = g; i < g + 32; ++i) sum += q[i] < 0 ? -q[i] : q[i];
      most = sum > most ? sum : most;
    }
    return most;
  }
  /// Bit i of the words: whether the magnitude of element i is above `bound` >= 0.
  [[gnu::always_inline]] void larger(int32_t bound, uint64_t* bits) const {
    for (int word = 0; word < (kSize + 63) / 64; ++word) bits[word] = 0;
    for (int i = 0; i < kSize; ++i) bits[i / 64] |= static_cast<uint64_t>(q[i] > bound || q[i] < -bound) << (i % 64);
  }
  /// The sum, or sums of 16.
  [[gnu::always_inline]] void sums(int32_t* to) const {
    constexpr int kEach = kSize == 32 ? 32 : 16;
    for (int g = 0; g < kSize / kEach; ++g) {
      int32_t sum = 0;
      for (int i = kEach * g; i < kEach * g + kEach; ++i) sum += q[i];
      to[g] = sum;
    }
  }
  [[gnu::always_inline]] void clear(uint32_t largest) {
    for (int i = 0; i < kSize; ++i) q[i] = 0;
    scale = empty_scale(largest);
  }
  static float empty_scale(uint32_t largest) { return largest >= 0x7f800000u ? float_from_bits(0x7fc00000u) : 0.f; }
};

// The inverse of a block's scale; false: the block is of zeros, or its largest magnitude (as bits) is not finite.
[[gnu::always_inline]] inline bool inverse_32(uint32_t largest, float& d, float& inverse) {
  d = float_from_bits(largest) / 127.f;
  inverse = 1.f / d;
  // A scale whose inverse is infinite is 0 in half precision anyway.
  return largest < 0x7f800000u && inverse < 0x1p127f;
}
[[gnu::always_inline]] inline float scale_32(float d) {
  const float rounded = half_to_float(float_to_half(d));
  return rounded < 65536.f ? rounded : d;  // beyond half precision: keep the value rather than make it infinite
}
[[gnu::always_inline]] inline bool inverse_256(uint32_t largest, float extreme, float& inverse) {
  inverse = -127.f / extreme;
  return largest < 0x7f800000u && inverse < 0x1p127f && inverse > -0x1p127f;
}
// Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
constexpr float kRounding = 12582912.f;
constexpr int32_t kRoundingBits = 0x4b400000;

template <>
[[gnu::always_inline]] inline void Quants<32>::take(const float* x) {
  const uint32_t largest = largest_bits<32>(x);
  float d = 0, inverse = 0;
  if (!inverse_32(largest, d, inverse)) return clear(largest);
  for (int i = 0; i < 32; ++i) {
    const float v = x[i] * inverse;
    const auto whole = static_cast<int32_t>(v);
    const float rest = v - static_cast<float>(whole);
    q[i] = whole + (rest >= 0.5f) - (rest <= -0.5f);
  }
  scale = scale_32(d);
}

template <>
[[gnu::always_inline]] inline void Quants<256>::take(const float* x) {
  const uint32_t largest = largest_bits<256>(x);
  int at = 0;
  while (at < 255 && (bits_of(x[at]) & 0x7fffffffu) != largest) ++at;
  float inverse = 0;
  if (!inverse_256(largest, x[at], inverse)) return clear(largest);
  for (int i = 0; i < 256; ++i) {
    const int32_t nearest = static_cast<int32_t>(bits_of(x[i] * inverse + kRounding)) - kRoundingBits;
    q[i] = nearest < 127 ? nearest : 127;
  }
  scale = 1.f / inverse;
}

template <int kSize>
float quantize_block(const float* x, int8_t* q) {
  Quants<kSize> now;
  now.take(x);
  now.narrow(q);
  return now.scale;
}

// An element is an outlier when its quant is larger than kFar times the mean magnitude of its block's. The largest is
// 127, unless all are 0.
constexpr int32_t kFar = 5;

template <class Q>
int64_t tile_row(const float* x, int64_t blocks, const TileRow& to, int64_t most, int32_t* at, float* whole) {
  constexpr int kSize = Q::kSize;
  int64_t found = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t place = b * to.rows;
    int8_t* q = to.q + place * kSize;
    Q now;
    now.take(x + b * kSize);
    now.narrow(q);
    const int32_t size = now.size();
    if (size > 0 && 127 * kSize > kFar * size && found < most) {
      uint64_t far[(kSize + 63) / 64];
      now.larger(kFar * size / kSize, far);
      float rest[kSize];
      std::memcpy(rest, x + b * kSize, sizeof rest);
      for (int word = 0; word < (kSize + 63) / 64; ++word)
        for (uint64_t bits = far[word]; bits != 0 && found < most; bits &= bits - 1) {
          const int i = 64 * word + __builtin_ctzll(bits);
          at[found] = static_cast<int32_t>(b * kSize + i);
          whole[found++] = rest[i];
          rest[i] = 0.f;
        }
      now.take(rest);
      now.narrow(q);
    }
    to.scale[place] = now.scale;
    if constexpr (kSize == 32) {
      now.sums(to.sums + place);
      to.minimum[place] = now.scale * static_cast<float>(to.sums[place]);
    } else {
      int32_t* sums = to.sums + 16 * place;
      now.sums(sums);
      const int32_t largest = now.largest_32();
      if (largest > to.largest[b]) to.largest[b] = largest;
      for (int g = 0; g < 8; ++g) to.pairs[8 * place + g] = static_cast<int16_t>(sums[2 * g] + sums[2 * g + 1]);
    }
  }
  return found;
}

// ---- products -------------------------------------------------------------------------------------------------------

template <float (*dot)(const uint8_t*, int64_t, const ActivationView&), int kBytes>
void each_row(const uint8_t* w, int64_t rows, int64_t blocks, const ActivationView& a, float* y) {
  for (int64_t r = 0; r < rows; ++r) y[r] = dot(w + r * blocks * kBytes, blocks, a);
}

// sum over 32-element blocks of (scale * da) * sum q * qa + min * (da * sum qa).
template <class F>
float dot_32(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  float total = 0, mins = 0;
  for (int64_t b = 0; b < blocks; ++b, w += F::kBytes) {
    int8_t v[32];
    F::unpack(w, v);
    const int8_t* q = a.q + 32 * b;
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += v[i] * q[i];
    total += F::scale(w) * a.scale[b] * static_cast<float>(sum);
    if constexpr (F::kMin) mins += load_half(w + 2) * a.scaled_sum[b];
  }
  return total + mins;
}

// Q4_K and Q5_K: da * (d * sum sc * (sum q * qa) - dmin * sum mn * (sum qa)).
template <class F>
float dot_scale_min(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  float total = 0;
  for (int64_t b = 0; b < blocks; ++b, w += F::kBytes) {
    int8_t v[256];
    F::unpack(w, v);
    const int8_t* q = a.q + 256 * b;
    int32_t products = 0, mins = 0;
    for (int g = 0; g < 8; ++g) {
      const ScaleMin s = k_scale(w + 4, g);
      int32_t sum = 0;
      for (int i = 32 * g; i < 32 * g + 32; ++i) sum += v[i] * q[i];
      products += s.scale * sum;
      mins += s.min * a.sums32[8 * b + g];
    }
    total += a.scale[b] * (load_half(w) * static_cast<float>(products) - load_half(w + 2) * static_cast<float>(mins));
  }
  return total;
}

float dot_q6_k(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  float total = 0;
  for (int64_t b = 0; b < blocks; ++b, w += Q6K::kBytes) {
    int8_t v[256];
    Q6K::unpack(w, v);
    const int8_t* q = a.q + 256 * b;
    int32_t products = 0;
    for (int g = 0; g < 16; ++g) {
      int32_t sum = 0;
      for (int i = 16 * g; i < 16 * g + 16; ++i) sum += v[i] * q[i];
      products += static_cast<int8_t>(w[192 + g]) * sum;
    }
    total += load_half(w + 208) * a.scale[b] * static_cast<float>(products);
  }
  return total;
}

template <class F>
float dot_ternary(const uint8_t* w, int64_t blocks, const ActivationView& a) {
  float total = 0;
  for (int64_t b = 0; b < blocks; ++b, w += F::kBytes) {
    int8_t v[256];
    F::unpack(w, v);
    const int8_t* q = a.q + 256 * b;
    int32_t sum = 0;
    for (int i = 0; i < 256; ++i) sum += v[i] * q[i];
    total += load_half(w + F::kBytes - 2) * a.scale[b] * static_cast<float>(sum);
  }
  return total;
}

// 16 partial sums: the order is fixed, and the compiler may keep them in vectors.
template <class Load, int kBytes>
void dot_floats(const uint8_t* w, int64_t rows, int64_t cols, const float* x, float* y) {
  for (int64_t r = 0; r < rows; ++r, w += cols * kBytes) {
    float part[16] = {};
    int64_t i = 0;
    for (; i + 16 <= cols; i += 16)
      for (int k = 0; k < 16; ++k) part[k] += Load::at(w + (i + k) * kBytes) * x[i + k];
    float total = 0;
    for (; i < cols; ++i) total += Load::at(w + i * kBytes) * x[i];
    for (float p : part) total += p;
    y[r] = total;
  }
}

struct LoadF32 {
  [[gnu::always_inline]] static float at(const uint8_t* p) { return load<float>(p); }
};
struct LoadF16 {
  [[gnu::always_inline]] static float at(const uint8_t* p) { return load_half(p); }
};
struct LoadBf16 {
  [[gnu::always_inline]] static float at(const uint8_t* p) { return bf16_to_float(load<uint16_t>(p)); }
};

constexpr DotKernels kPlain = {
    .f32 = dot_floats<LoadF32, 4>,
    .f16 = dot_floats<LoadF16, 2>,
    .bf16 = dot_floats<LoadBf16, 2>,
    .q8_0 = each_row<dot_32<Q80>, Q80::kBytes>,
    .q4_0 = each_row<dot_32<Q40>, Q40::kBytes>,
    .q4_1 = each_row<dot_32<Q41>, Q41::kBytes>,
    .q5_0 = each_row<dot_32<Q50>, Q50::kBytes>,
    .q5_1 = each_row<dot_32<Q51>, Q51::kBytes>,
    .q4_k = each_row<dot_scale_min<Q4K>, Q4K::kBytes>,
    .q5_k = each_row<dot_scale_min<Q5K>, Q5K::kBytes>,
    .q6_k = each_row<dot_q6_k, Q6K::kBytes>,
    .tq1_0 = each_row<dot_ternary<TQ10>, TQ10::kBytes>,
    .tq2_0 = each_row<dot_ternary<TQ20>, TQ20::kBytes>,
    .mxfp4 = each_row<dot_32<Mxfp4>, Mxfp4::kBytes>,
    .quantize_32 = quantize_block<32>,
    .quantize_256 = quantize_block<256>,
    .tile_row_32 = tile_row<Quants<32>>,
    .tile_row_256 = tile_row<Quants<256>>,
};

}  // namespace
}  // namespace moiety
