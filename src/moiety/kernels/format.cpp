#include "moiety/kernels/format.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <limits>

#include "moiety/base/error.h"
#include "moiety/kernels/cpu.h"
#include "moiety/kernels/format_loops.h"

namespace moiety {
namespace {

constexpr FormatInfo kFormats[] = {
    {Format::F32, "F32", 1, 4, 0, true},           {Format::F16, "F16", 1, 2, 1, true},
    {Format::BF16, "BF16", 1, 2, 30, true},        {Format::F64, "F64", 1, 8, -1, false},
    {Format::I8, "I8", 1, 1, -1, false},           {Format::U8, "U8", 1, 1, -1, false},
    {Format::I16, "I16", 1, 2, -1, false},         {Format::U16, "U16", 1, 2, -1, false},
    {Format::I32, "I32", 1, 4, -1, false},         {Format::U32, "U32", 1, 4, -1, false},
    {Format::I64, "I64", 1, 8, -1, false},         {Format::U64, "U64", 1, 8, -1, false},
    {Format::BOOL, "BOOL", 1, 1, -1, false},       {Format::F8_E4M3, "F8_E4M3", 1, 1, -1, false},
    {Format::F8_E5M2, "F8_E5M2", 1, 1, -1, false}, {Format::Q8_0, "Q8_0", 32, 34, 8, true},
    {Format::Q4_0, "Q4_0", 32, 18, 2, true},       {Format::Q4_1, "Q4_1", 32, 20, 3, true},
    {Format::Q5_0, "Q5_0", 32, 22, 6, true},       {Format::Q5_1, "Q5_1", 32, 24, 7, true},
    {Format::Q4_K, "Q4_K", 256, 144, 12, true},    {Format::Q5_K, "Q5_K", 256, 176, 13, true},
    {Format::Q6_K, "Q6_K", 256, 210, 14, true},    {Format::TQ1_0, "TQ1_0", 256, 54, 34, true},
    {Format::TQ2_0, "TQ2_0", 256, 66, 35, true},   {Format::MXFP4, "MXFP4", 32, 17, 39, true},
};
constexpr size_t kCount = std::size(kFormats);
static_assert(kCount == static_cast<size_t>(Format::MXFP4) + 1);
static_assert(std::size(kDecoders) == kCount);
static_assert([] {
  for (size_t i = 0; i < kCount; ++i)
    if (static_cast<size_t>(kFormats[i].format) != i) return false;
  return true;
}());

// ---- encoding -------------------------------------------------------------------------------------------------------

template <class T>
void store(uint8_t* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

// Where a block stands in its row, for messages.
struct Place {
  Format format;
  int64_t first;  ///< element number of the block's first element
};

// Half of a block's scale or minimum; the message names the element that makes it too large.
uint16_t checked_half(float value, const Place& place, int64_t element, float culprit) {
  const uint16_t half = float_to_half(value);
  check((half & 0x7c00) != 0x7c00,
        "element {} is {}: the scale {} of its {} block overflows half precision (at most 65504)",
        place.first + element, culprit, value, info(place.format).name);
  return half;
}

void check_finite(Format format, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    check(std::isfinite(x[i]), "element {} is {}: {} holds finite values only", i, x[i], info(format).name);
}

// First element with the largest magnitude, 0 if all are zero.
struct Extreme {
  float value = 0.f;  ///< signed; +0 if all are 0 or -0
  int at = 0;
};
Extreme extreme(const float* x, int n) {
  Extreme found;
  float largest = 0.f;
  for (int i = 0; i < n; ++i)
    if (std::fabs(x[i]) > largest) largest = std::fabs(x[i]), found = {x[i], i};
  return found;
}

struct Range {
  float min, max;
  int min_at, max_at;
};
Range range(const float* x, int n) {
  Range r{x[0], x[0], 0, 0};
  for (int i = 1; i < n; ++i) {
    if (x[i] < r.min) r.min = x[i], r.min_at = i;
    if (x[i] > r.max) r.max = x[i], r.max_at = i;
  }
  return r;
}

// 1 / d, and 0 for a scale so small that its inverse is not finite (such a scale is 0 in half precision anyway).
float inverse(float d) {
  const float id = d != 0.f ? 1.f / d : 0.f;
  return std::isfinite(id) ? id : 0.f;
}

// Half away from zero; exact also just below .5, unlike adding .5.
int round_away(float x) {
  return static_cast<int>(std::round(x));
}
// Ties to even, for |x| < 2^22.
int nearest(float x) {
  return static_cast<int>(std::nearbyint(x));
}

void encode_f16(const float* x, uint8_t* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t half = float_to_half(x[i]);
    check((half & 0x7fff) != 0x7c00 || std::isinf(x[i]), "element {} is {}: F16 holds at most 65504", i, x[i]);
    store(p + 2 * i, half);
  }
}

void encode_bf16(const float* x, uint8_t* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(p + 2 * i, float_to_bf16(x[i]));
}

void encode_q8_0(const float* x, uint8_t* p, const Place& place) {
  const Extreme m = extreme(x, 32);
  const float d = std::fabs(m.value) / 127.f;
  const float id = inverse(d);
  store(p, checked_half(d, place, m.at, m.value));
  for (int i = 0; i < 32; ++i) p[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(round_away(x[i] * id)));
}

// Quants of Q4_0 and Q5_0 (signed extreme at q = 0) and Q4_1 and Q5_1 (offset from the minimum).
void nibbles(const uint8_t* q, uint8_t* out) {
  for (int j = 0; j < 16; ++j) out[j] = static_cast<uint8_t>((q[j] & 15) | (q[j + 16] & 15) << 4);
}
void fifth_bits(const uint8_t* q, uint8_t* out) {
  uint32_t high = 0;
  for (int i = 0; i < 32; ++i) high |= static_cast<uint32_t>(q[i] >> 4 & 1) << i;
  store(out, high);
}

uint16_t centred(const float* x, int half_levels, uint8_t* q, const Place& place) {
  const Extreme m = extreme(x, 32);
  const float d = m.value / static_cast<float>(-half_levels);
  const float id = inverse(d);
  const float offset = static_cast<float>(half_levels) + 0.5f;
  for (int i = 0; i < 32; ++i)
    q[i] = static_cast<uint8_t>(std::min(2 * half_levels - 1, static_cast<int>(x[i] * id + offset)));
  return checked_half(d, place, m.at, m.value);
}

void offset_from_min(const float* x, int levels, uint8_t* q, uint8_t* header, const Place& place) {
  const Range r = range(x, 32);
  const float d = (r.max - r.min) / static_cast<float>(levels);
  const float id = inverse(d);
  const bool low = std::fabs(r.min) > std::fabs(r.max);
  store(header, checked_half(d, place, low ? r.min_at : r.max_at, low ? r.min : r.max));
  store(header + 2, checked_half(r.min, place, r.min_at, r.min));
  for (int i = 0; i < 32; ++i)
    q[i] = static_cast<uint8_t>(std::min(levels, static_cast<int>((x[i] - r.min) * id + 0.5f)));
}

void encode_q4_0(const float* x, uint8_t* p, const Place& place) {
  uint8_t q[32];
  store(p, centred(x, 8, q, place));
  nibbles(q, p + 2);
}

void encode_q5_0(const float* x, uint8_t* p, const Place& place) {
  uint8_t q[32];
  store(p, centred(x, 16, q, place));
  fifth_bits(q, p + 2);
  nibbles(q, p + 6);
}

void encode_q4_1(const float* x, uint8_t* p, const Place& place) {
  uint8_t q[32];
  offset_from_min(x, 15, q, p, place);
  nibbles(q, p + 4);
}

void encode_q5_1(const float* x, uint8_t* p, const Place& place) {
  uint8_t q[32];
  offset_from_min(x, 31, q, p, place);
  fifth_bits(q, p + 4);
  nibbles(q, p + 8);
}

void encode_mxfp4(const float* x, uint8_t* p) {
  const int field = static_cast<int>(bits_of(extreme(x, 32).value) >> 23 & 255);
  const int e = std::clamp(field - 2, 0, 254);
  p[0] = static_cast<uint8_t>(e);
  const double scale = std::ldexp(1.0, 128 - e);
  uint8_t q[32];
  for (int i = 0; i < 32; ++i) {
    const double v = std::fabs(static_cast<double>(x[i])) * scale;  // in units of the doubled table
    int level = 0;
    for (double middle : {0.5, 1.5, 2.5, 3.5, 5., 7., 10.}) level += v > middle;
    q[i] = static_cast<uint8_t>(level != 0 && x[i] < 0 ? level | 8 : level);
  }
  nibbles(q, p + 1);
}

// Codes 0, 1, 2 of a ternary block and its scale.
uint16_t ternary(const float* x, uint8_t* codes, const Place& place) {
  const Extreme m = extreme(x, 256);
  const float d = std::fabs(m.value);
  const float id = inverse(d);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(1 + round_away(x[i] * id));
  return checked_half(d, place, m.at, m.value);
}

void encode_tq2_0(const float* x, uint8_t* p, const Place& place) {
  uint8_t c[256];
  store(p + 64, ternary(x, c, place));
  for (int j = 0; j < 2; ++j)
    for (int m = 0; m < 32; ++m) {
      const uint8_t* from = c + 128 * j + m;
      p[32 * j + m] = static_cast<uint8_t>(from[0] | from[32] << 2 | from[64] << 4 | from[96] << 6);
    }
}

void encode_tq1_0(const float* x, uint8_t* p, const Place& place) {
  uint8_t c[256];
  store(p + 52, ternary(x, c, place));
  const auto pack = [](const uint8_t* from, int stride, int digits) {
    int value = 0;
    for (int k = 0; k < 5; ++k) value = 3 * value + (k < digits ? from[k * stride] : 0);
    return static_cast<uint8_t>((value * 256 + 242) / 243);
  };
  for (int m = 0; m < 32; ++m) p[m] = pack(c + m, 32, 5);
  for (int m = 0; m < 16; ++m) p[32 + m] = pack(c + 160 + m, 16, 5);
  for (int m = 0; m < 4; ++m) p[48 + m] = pack(c + 240 + m, 4, 4);
}

// ---- K formats: a search for the scale and minimum of each sub-block that lower the weighted squared error ----------

struct SubBlock {
  float scale = 0.f;  ///< >= 0
  float min = 0.f;    ///< subtracted, >= 0
};

// x ~ scale * q - min with q in 0..levels. Tries inverse scales around levels / (max - min); for each rounding solves
// the weighted least squares for scale and min.
SubBlock search_scale_min(const float* x, const float* w, int levels, uint8_t* q) {
  constexpr int kSize = 32, kSteps = 20;
  const Range r = range(x, kSize);
  const float low = std::min(0.f, r.min);
  std::fill_n(q, kSize, uint8_t{0});
  const float span = r.max - low;
  if (!(span > 0.f) || !std::isfinite(static_cast<float>(levels + 1) / span)) return {0.f, -low};
  double sum_w = 0, sum_x = 0;
  for (int i = 0; i < kSize; ++i) sum_w += w[i], sum_x += static_cast<double>(w[i]) * x[i];

  SubBlock best;
  double best_error = std::numeric_limits<double>::infinity();
  uint8_t trial[kSize];
  const auto keep_if_better = [&](double scale, double min) {
    double error = 0;
    for (int i = 0; i < kSize; ++i) {
      const double off = scale * trial[i] + min - x[i];
      error += w[i] * off * off;
    }
    if (error < best_error) {
      best_error = error;
      best = {static_cast<float>(scale), static_cast<float>(-min)};
      std::memcpy(q, trial, kSize);
    }
  };
  for (int step = -1; step <= kSteps; ++step) {
    const float inverse_scale =
        (step < 0 ? static_cast<float>(levels) : static_cast<float>(levels) - 1.f + 0.1f * static_cast<float>(step)) /
        span;
    double sum_q = 0, sum_qq = 0, sum_qx = 0;
    for (int i = 0; i < kSize; ++i) {
      trial[i] = static_cast<uint8_t>(std::clamp(nearest(inverse_scale * (x[i] - low)), 0, levels));
      sum_q += static_cast<double>(w[i]) * trial[i];
      sum_qq += static_cast<double>(w[i]) * trial[i] * trial[i];
      sum_qx += static_cast<double>(w[i]) * trial[i] * x[i];
    }
    if (step < 0) keep_if_better(1.0 / inverse_scale, low);
    const double determinant = sum_w * sum_qq - sum_q * sum_q;
    if (!(determinant > 0)) continue;
    double scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
    double min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
    if (min > 0) min = 0, scale = sum_qx / sum_qq;
    if (scale > 0) keep_if_better(scale, min);
  }
  return best;
}

// Weights of the squared error of one sub-block.
void error_weights(const float* x, const float* importance, float mean_square, float* w, int n) {
  bool any = false;
  if (importance != nullptr)
    for (int i = 0; i < n; ++i) {
      w[i] = importance[i] * std::sqrt(mean_square + x[i] * x[i]);
      any = any || w[i] > 0;
    }
  if (any) return;
  float own = 0;
  for (int i = 0; i < n; ++i) own += x[i] * x[i];
  own = std::sqrt(own / static_cast<float>(n));
  for (int i = 0; i < n; ++i) w[i] = own + std::fabs(x[i]);
}

// Beyond this no scale of half precision reaches, and squares might overflow.
void check_k_range(const float* x, const Place& place) {
  const Extreme m = extreme(x, 256);
  check(std::fabs(m.value) < 1e9f, "element {} is {}: the scale of its {} block overflows half precision",
        place.first + m.at, m.value, info(place.format).name);
}

// Eight scales and minimums of six bits each.
void pack_k_scales(const uint8_t* scales, const uint8_t* mins, uint8_t* s) {
  for (int g = 0; g < 4; ++g) {
    s[g] = static_cast<uint8_t>(scales[g] | (scales[g + 4] >> 4) << 6);
    s[g + 4] = static_cast<uint8_t>(mins[g] | (mins[g + 4] >> 4) << 6);
    s[g + 8] = static_cast<uint8_t>((scales[g + 4] & 15) | (mins[g + 4] & 15) << 4);
  }
}

// Q4_K (levels 15) and Q5_K (31): header of 16 bytes, quants of 256 elements in q.
void encode_scale_min(const float* x, const float* importance, int levels, uint8_t* header, uint8_t* q,
                      const Place& place) {
  check_k_range(x, place);
  float mean_square = 0;
  for (int i = 0; i < 256; ++i) mean_square += x[i] * x[i];
  mean_square /= 256.f;
  SubBlock sub[8];
  float largest_scale = 0, largest_min = 0;
  for (int g = 0; g < 8; ++g) {
    float w[32];
    error_weights(x + 32 * g, importance == nullptr ? nullptr : importance + 32 * g, mean_square, w, 32);
    sub[g] = search_scale_min(x + 32 * g, w, levels, q + 32 * g);
    largest_scale = std::max(largest_scale, sub[g].scale);
    largest_min = std::max(largest_min, sub[g].min);
  }
  const Extreme m = extreme(x, 256);
  const uint16_t d_half = checked_half(largest_scale / 63.f, place, m.at, m.value);
  const uint16_t dmin_half = checked_half(largest_min / 63.f, place, m.at, m.value);
  store(header, d_half);
  store(header + 2, dmin_half);
  const float d = half_to_float(d_half), dmin = half_to_float(dmin_half);
  const auto six_bits = [](float value, float unit) {
    return static_cast<uint8_t>(unit > 0 ? std::clamp(nearest(std::min(value / unit, 64.f)), 0, 63) : 0);
  };
  uint8_t scales[8], mins[8];
  for (int g = 0; g < 8; ++g) {
    scales[g] = six_bits(sub[g].scale, d);
    mins[g] = six_bits(sub[g].min, dmin);
    const float scale = d * static_cast<float>(scales[g]), min = dmin * static_cast<float>(mins[g]);
    if (scale == 0.f) continue;
    for (int i = 32 * g; i < 32 * g + 32; ++i)
      q[i] = static_cast<uint8_t>(
          std::clamp(nearest(std::clamp((x[i] + min) / scale, 0.f, static_cast<float>(levels))), 0, levels));
  }
  pack_k_scales(scales, mins, header + 4);
}

void encode_q4_k(const float* x, const float* importance, uint8_t* p, const Place& place) {
  uint8_t q[256];
  encode_scale_min(x, importance, 15, p, q, place);
  for (int c = 0; c < 4; ++c)
    for (int l = 0; l < 32; ++l) p[16 + 32 * c + l] = static_cast<uint8_t>(q[64 * c + l] | q[64 * c + 32 + l] << 4);
}

void encode_q5_k(const float* x, const float* importance, uint8_t* p, const Place& place) {
  uint8_t q[256];
  encode_scale_min(x, importance, 31, p, q, place);
  for (int l = 0; l < 32; ++l) {
    int high = 0;
    for (int g = 0; g < 8; ++g) high |= (q[32 * g + l] >> 4) << g;
    p[16 + l] = static_cast<uint8_t>(high);
  }
  for (int c = 0; c < 4; ++c)
    for (int l = 0; l < 32; ++l)
      p[48 + 32 * c + l] = static_cast<uint8_t>((q[64 * c + l] & 15) | (q[64 * c + 32 + l] & 15) << 4);
}

// x ~ scale * q with q in -32..31, 16 elements; the sign of the scale is free.
float search_scale(const float* x, const float* importance, int8_t* q) {
  constexpr int kSize = 16;
  std::fill_n(q, kSize, int8_t{0});
  const float m = extreme(x, kSize).value;
  if (m == 0.f || !std::isfinite(33.f / m)) return 0.f;
  double w[kSize];
  bool any = false;
  for (int i = 0; i < kSize; ++i) {
    w[i] = importance != nullptr ? importance[i] : 0.0;
    any = any || (w[i] > 0 && x[i] != 0.f);
  }
  if (!any)
    for (int i = 0; i < kSize; ++i) w[i] = static_cast<double>(x[i]) * x[i];
  float best = 0.f;
  double best_gain = 0;  // of sum w x^2, by the best scale for a rounding
  for (int step = -9; step <= 9; ++step) {
    const float inverse_scale = -(32.f + 0.1f * static_cast<float>(step)) / m;
    int8_t trial[kSize];
    double sum_qx = 0, sum_qq = 0;
    for (int i = 0; i < kSize; ++i) {
      trial[i] = static_cast<int8_t>(std::clamp(nearest(inverse_scale * x[i]), -32, 31));
      sum_qx += w[i] * trial[i] * x[i];
      sum_qq += w[i] * trial[i] * trial[i];
    }
    if (sum_qq > 0 && sum_qx * sum_qx > best_gain * sum_qq) {
      best_gain = sum_qx * sum_qx / sum_qq;
      best = static_cast<float>(sum_qx / sum_qq);
      std::memcpy(q, trial, kSize);
    }
  }
  return best;
}

void encode_q6_k(const float* x, const float* importance, uint8_t* p, const Place& place) {
  check_k_range(x, place);
  int8_t q[256];
  float scales[16];
  for (int g = 0; g < 16; ++g)
    scales[g] = search_scale(x + 16 * g, importance == nullptr ? nullptr : importance + 16 * g, q + 16 * g);
  const Extreme m = extreme(x, 256);
  const uint16_t d_half = checked_half(extreme(scales, 16).value / -128.f, place, m.at, m.value);
  const float d = half_to_float(d_half);
  if (d == 0.f) std::memset(q, 0, sizeof q);
  for (int g = 0; g < 16; ++g) {
    const int sc = d == 0.f ? 0 : std::clamp(nearest(std::clamp(scales[g] / d, -128.f, 127.f)), -128, 127);
    p[192 + g] = static_cast<uint8_t>(static_cast<int8_t>(sc));
    const float scale = d * static_cast<float>(sc);
    if (scale == 0.f) continue;
    for (int i = 16 * g; i < 16 * g + 16; ++i)
      q[i] = static_cast<int8_t>(nearest(std::clamp(x[i] / scale, -32.f, 31.f)));
  }
  for (int half = 0; half < 2; ++half)
    for (int l = 0; l < 32; ++l) {
      uint8_t v[4];
      for (int part = 0; part < 4; ++part) v[part] = static_cast<uint8_t>(q[128 * half + 32 * part + l] + 32);
      p[64 * half + l] = static_cast<uint8_t>((v[0] & 15) | (v[2] & 15) << 4);
      p[64 * half + 32 + l] = static_cast<uint8_t>((v[1] & 15) | (v[3] & 15) << 4);
      p[128 + 32 * half + l] = static_cast<uint8_t>(v[0] >> 4 | (v[1] >> 4) << 2 | (v[2] >> 4) << 4 | (v[3] >> 4) << 6);
    }
  store(p + 208, d_half);
}

}  // namespace

std::span<const FormatInfo> formats() {
  return kFormats;
}

const FormatInfo& info(Format format) {
  return kFormats[static_cast<size_t>(format)];
}

const FormatInfo* find_format(std::string_view name) {
  const auto same = [](char a, char b) {
    return std::toupper(static_cast<unsigned char>(a)) == std::toupper(static_cast<unsigned char>(b));
  };
  for (const FormatInfo& each : kFormats)
    if (std::equal(name.begin(), name.end(), each.name.begin(), each.name.end(), same)) return &each;
  return nullptr;
}

bool is_block(Format format) {
  return info(format).block > 1;
}

int64_t row_bytes(Format format, int64_t cols) {
  const FormatInfo& f = info(format);
  check(cols >= 0 && cols % f.block == 0, "{} columns are not a multiple of the {}-element blocks of {}", cols, f.block,
        f.name);
  const int64_t blocks = cols / f.block;
  check(blocks <= std::numeric_limits<int64_t>::max() / f.bytes, "a row of {} {} elements overflows 64 bits", cols,
        f.name);
  return blocks * f.bytes;
}

void dequantize_row(Format format, const std::byte* blocks, float* out, int64_t cols) {
  const int64_t bytes = row_bytes(format, cols);
  if (cols == 0) return;
  const auto* p = reinterpret_cast<const uint8_t*>(blocks);
  if (format == Format::MXFP4)
    for (int64_t at = 0; at < bytes; at += 17)
      check(p[at] != 255, "block {} of an MXFP4 row has the scale exponent 255, which is not a number", at / 17);
  const Decoder* decoders = kDecoders;
#if defined(__x86_64__)
  if (isa() == Isa::Avx512)
    decoders = decoders_avx512();
  else if (isa() == Isa::Avx2)
    decoders = decoders_avx2();
#endif
  decoders[static_cast<size_t>(format)](p, out, cols);
}

void quantize_row(Format format, const float* x, std::byte* blocks, int64_t cols, const float* importance) {
  const FormatInfo& f = info(format);
  check(f.can_quantize, "values cannot be written as {}", f.name);
  row_bytes(format, cols);
  if (cols == 0) return;
  auto* p = reinterpret_cast<uint8_t*>(blocks);
  switch (format) {
    case Format::F32:
      std::memcpy(p, x, static_cast<size_t>(cols) * 4);
      return;
    case Format::F16:
      return encode_f16(x, p, cols);
    case Format::BF16:
      return encode_bf16(x, p, cols);
    default:
      break;
  }
  check_finite(format, x, cols);
  for (int64_t at = 0; at < cols; at += f.block, p += f.bytes, x += f.block) {
    const Place place{format, at};
    const float* weights = importance == nullptr ? nullptr : importance + at;
    switch (format) {
      case Format::Q8_0:
        encode_q8_0(x, p, place);
        break;
      case Format::Q4_0:
        encode_q4_0(x, p, place);
        break;
      case Format::Q4_1:
        encode_q4_1(x, p, place);
        break;
      case Format::Q5_0:
        encode_q5_0(x, p, place);
        break;
      case Format::Q5_1:
        encode_q5_1(x, p, place);
        break;
      case Format::Q4_K:
        encode_q4_k(x, weights, p, place);
        break;
      case Format::Q5_K:
        encode_q5_k(x, weights, p, place);
        break;
      case Format::Q6_K:
        encode_q6_k(x, weights, p, place);
        break;
      case Format::TQ1_0:
        encode_tq1_0(x, p, place);
        break;
      case Format::TQ2_0:
        encode_tq2_0(x, p, place);
        break;
      default:
        encode_mxfp4(x, p);
        break;
    }
  }
}

}  // namespace moiety
