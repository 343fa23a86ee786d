#include "moiety/kernels/packed.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/kernels/block_layout.h"
#include "moiety/kernels/cpu.h"
#include "moiety/kernels/dot_kernels.h"
#include "moiety/kernels/packed_kernels.h"
#include "moiety/kernels/packed_layout.h"

namespace moiety {
namespace {

struct Packable {
  Format format;
  PackedLayout layout;
  PackedFormat PackedKernels::*kernels;
};
constexpr Packable kPackable[] = {
    {Format::Q8_0, kPackedQ8_0, &PackedKernels::q8_0},       {Format::Q4_0, kPackedQ4_0, &PackedKernels::q4_0},
    {Format::Q4_1, kPackedQ4_1, &PackedKernels::q4_1},       {Format::Q5_0, kPackedQ5_0, &PackedKernels::q5_0},
    {Format::Q5_1, kPackedQ5_1, &PackedKernels::q5_1},       {Format::MXFP4, kPackedMXFP4, &PackedKernels::mxfp4},
    {Format::Q4_K, kPackedQ4_K, &PackedKernels::q4_k},       {Format::Q5_K, kPackedQ5_K, &PackedKernels::q5_k},
    {Format::Q6_K, kPackedQ6_K, &PackedKernels::q6_k},       {Format::TQ1_0, kPackedTernary, &PackedKernels::ternary},
    {Format::TQ2_0, kPackedTernary, &PackedKernels::ternary}};

const Packable* find(Format format) {
  const auto* it =
      std::find_if(std::begin(kPackable), std::end(kPackable), [&](const Packable& p) { return p.format == format; });
  return it == std::end(kPackable) ? nullptr : it;
}

const Packable& packable(Format format) {
  const Packable* p = find(format);
  check(p != nullptr, "rows of {} cannot be packed", info(format).name);
  return *p;
}

// A block's quads of quants, or of bits above, from one of them on.
template <PackedLayout l, bool above = false, int first = 0>
struct Quads {
  uint8_t* body;
  uint8_t* at(int z) const { return body + (above ? l.above_at(first + z) : l.quad_at(first + z)); }
};

// Words of one row, `count` of them, to its places in as many quads.
template <class Places, class Change>
void spread(const uint8_t* from, int count, Places to, int row, Change change) {
  for (int z = 0; z < count; ++z) {
    const uint32_t word = change(z, load<uint32_t>(from + 4 * z));
    std::memcpy(to.at(z) + 4 * row, &word, 4);
  }
}
template <class Places>
void spread(const uint8_t* from, int count, Places to, int row) {
  spread(from, count, to, row, [](int, uint32_t word) { return word; });
}

// Quants of one row's block to their places. Nibbles lie in the file as quads want them, in all formats but Q6_K.
void spread_quants(Format format, const uint8_t* p, int row, uint8_t* body) {
  constexpr uint32_t kNibbles = 0x0f0f0f0fu, kPairs = 0x03030303u;
  switch (format) {
    case Format::Q8_0:
      return spread(p + 2, 8, Quads<kPackedQ8_0>{body}, row, [](int, uint32_t word) { return word ^ 0x80808080u; });
    case Format::Q4_0:
      return spread(p + 2, 4, Quads<kPackedQ4_0>{body}, row);
    case Format::Q4_1:
      return spread(p + 4, 4, Quads<kPackedQ4_1>{body}, row);
    case Format::MXFP4:
      return spread(p + 1, 4, Quads<kPackedMXFP4>{body}, row);
    case Format::Q5_0:
    case Format::Q5_1: {
      p += format == Format::Q5_0 ? 2 : 4;
      spread(p + 4, 4, Quads<kPackedQ5_0>{body}, row);  // as of Q5_1
      const auto bits = load<uint32_t>(p);
      uint32_t word = 0;  // bit z of byte i from bit 4z + i
      for (int z = 0; z < 8; ++z)
        for (int i = 0; i < 4; ++i) word |= (bits >> (4 * z + i) & 1u) << (8 * i + z);
      std::memcpy(Quads<kPackedQ5_0, true>{body}.at(0) + 4 * row, &word, 4);
      return;
    }
    case Format::Q4_K:
      return spread(p + 16, 32, Quads<kPackedQ4_K>{body}, row);
    case Format::Q5_K:
      spread(p + 16, 8, Quads<kPackedQ5_K, true>{body}, row);
      return spread(p + 48, 32, Quads<kPackedQ5_K>{body}, row);
    case Format::TQ1_0: {
      int8_t v[256];
      TQ10::unpack(p, v);
      uint8_t pairs[64];
      for (int i = 0; i < 64; ++i) {
        const int8_t* from = v + 128 * (i / 32) + i % 32;
        pairs[i] =
            static_cast<uint8_t>((from[0] + 1) | (from[32] + 1) << 2 | (from[64] + 1) << 4 | (from[96] + 1) << 6);
      }
      return spread(pairs, 16, Quads<kPackedTernary>{body}, row);
    }
    case Format::TQ2_0:
      return spread(p, 16, Quads<kPackedTernary>{body}, row);
    default:
      break;
  }
  // Q6_K. The file has elements 0 and 64 (128 and 192) behind in one byte, quads 0 and 128.
  spread(p, 16, Quads<kPackedQ6_K>{body}, row,
         [&](int z, uint32_t word) { return (word & kNibbles) | (load<uint32_t>(p + 64 + 4 * z) & kNibbles) << 4; });
  spread(p, 16, Quads<kPackedQ6_K, false, 16>{body}, row,
         [&](int z, uint32_t word) { return (word >> 4 & kNibbles) | (load<uint32_t>(p + 64 + 4 * z) & ~kNibbles); });
  for (int z = 0; z < 16; ++z) {
    const auto first = load<uint32_t>(p + 128 + 4 * (z % 8)), second = load<uint32_t>(p + 160 + 4 * (z % 8));
    const int shift = 2 * (z / 8);
    const uint32_t word = (first >> shift & kPairs) | (first >> (shift + 4) & kPairs) << 2 |
                          (second >> shift & kPairs) << 4 | (second >> (shift + 4) & kPairs) << 6;
    std::memcpy(Quads<kPackedQ6_K, true>{body}.at(z) + 4 * row, &word, 4);
  }
}

// Where a block's scale stands in the file.
int scale_at(Format format) {
  switch (format) {
    case Format::Q6_K:
      return 208;
    case Format::TQ1_0:
      return 52;
    case Format::TQ2_0:
      return 64;
    default:
      return 0;
  }
}

// The integer scales of one row's block.
void spread_scales(Format format, const uint8_t* p, int row, uint8_t* scales) {
  if (format == Format::Q6_K) {
    for (int g = 0; g < 16; ++g) scales[16 * g + row] = p[192 + g];
    return;
  }
  for (int g = 0; g < 8; ++g) {
    const ScaleMin s = k_scale(p + 4, g);
    scales[16 * g + row] = static_cast<uint8_t>(s.scale);
    scales[128 + 32 * (g / 2) + 2 * row + g % 2] = static_cast<uint8_t>(s.min);
  }
}

const PackedKernels& all_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::Avx512) return packed_kernels_avx512();
  if (isa() == Isa::Avx2) return packed_kernels_avx2();
#endif
  fail("this machine has no products for packed rows");
}

}  // namespace

bool can_pack(Format format) {
  return isa() >= Isa::Avx2 && find(format) != nullptr;
}

int64_t packed_groups(int64_t rows) {
  return (rows + kPackedRows - 1) / kPackedRows;
}

int64_t packed_group_bytes(Format format, int64_t cols) {
  const PackedLayout& l = packable(format).layout;
  check(cols > 0 && cols % l.block == 0, "{} columns are not a multiple of the block of {}", cols, l.block);
  return l.bytes(cols / l.block);
}

void pack_group(Format format, const std::byte* data, int64_t rows, int64_t cols, int64_t group, std::byte* to) {
  const PackedLayout& l = packable(format).layout;
  const int64_t blocks = cols / l.block, stride = row_bytes(format, cols);
  auto* out = reinterpret_cast<uint8_t*>(to);
  std::memset(out, 0, static_cast<size_t>(l.bytes(blocks)));
  const int at = scale_at(format);
  const auto size = static_cast<size_t>(l.e2m1 ? 1 : 2);
  const int64_t together = l.together(), end_bytes = l.ends(), body_bytes = l.body(), file_bytes = info(format).bytes;
  for (int row = 0; row < kPackedRows && group * kPackedRows + row < rows; ++row) {
    const auto* p = reinterpret_cast<const uint8_t*>(data) + (group * kPackedRows + row) * stride;
    uint8_t *ends = out, *body = out + 64;
    for (int64_t b = 0, left = together; b < blocks; ++b, p += file_bytes) {
      spread_quants(format, p, row, body);
      if (l.scales > 0) spread_scales(format, p, row, body);
      std::memcpy(ends + size * static_cast<size_t>(row), p + at, size);
      if (l.min) std::memcpy(ends + 32 + 2 * row, p + 2, 2);
      ends += end_bytes;
      body += body_bytes;
      if (--left > 0) continue;
      ends = body;  // of the next stretch
      body += 64;
      left = together;
    }
  }
}

void QuantizedTiles::Free::operator()(std::byte* p) const {
  ::operator delete[](p, std::align_val_t{64});
}

void QuantizedTiles::resize(ActivationKind kind, int64_t n, int64_t cols) {
  check(kind != ActivationKind::Float, "float activations are not quantized");
  block_ = kind == ActivationKind::Blocks32 ? 32 : 256;
  check(cols >= 0 && cols % block_ == 0, "{} activations are not a multiple of the block of {}", cols, block_);
  kind_ = kind;
  n_ = n;
  cols_ = cols;
  blocks_ = cols / block_;
  const auto all = static_cast<size_t>(n * blocks_);
  const auto whole = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  scale_at_ = whole(static_cast<size_t>(n * cols));
  minimum_at_ = scale_at_ + whole(4 * all);
  sums_at_ = minimum_at_ + whole(4 * all);
  pairs_at_ = sums_at_ + whole((block_ == 32 ? 4 : 64) * all);
  largest_at_ = pairs_at_ + (block_ == 32 ? 0 : whole(16 * all));
  columns_at_ = largest_at_ + (block_ == 32 ? 0 : whole(static_cast<size_t>(4 * tiles() * blocks_)));
  most_ = (cols + kShareWhole - 1) / kShareWhole;
  const auto rows = static_cast<size_t>(tiles() * kRows), most = static_cast<size_t>(most_);
  outliers_at_ = columns_at_ + whole(4 * (rows * most + static_cast<size_t>(tiles())));
  const size_t bytes = outliers_at_ + 4 * rows * most * kRows;
  if (bytes > capacity_) {
    memory_.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
    capacity_ = bytes;
  }
}

QuantizedTiles::View QuantizedTiles::view(int64_t tile) const {
  const int64_t before = tile * kRows * blocks_;  // blocks of rows in front
  const std::byte* p = memory_.get();
  return {reinterpret_cast<const int8_t*>(p) + before * block_,
          reinterpret_cast<const float*>(p + scale_at_) + before,
          reinterpret_cast<const float*>(p + minimum_at_) + before,
          reinterpret_cast<const int32_t*>(p + sums_at_) + before * (block_ == 32 ? 1 : 16),
          reinterpret_cast<const int16_t*>(p + pairs_at_) + before * 8,
          reinterpret_cast<const int32_t*>(p + largest_at_) + tile * blocks_,
          *columns(tile),
          columns(tile) + 1,
          reinterpret_cast<const float*>(p + outliers_at_) + tile * kRows * most_ * kRows};
}

int32_t* QuantizedTiles::columns(int64_t tile) const {
  return reinterpret_cast<int32_t*>(memory_.get() + columns_at_) + tile * (kRows * most_ + 1);
}

void QuantizedTiles::fill(int64_t tile, const float* x, int64_t stride, const int64_t* index) {
  int32_t* found = columns(tile);
  *found = 0;
  const View v = view(tile);
  const int64_t count = rows(tile);
  const QuantizeTileRow quantize = tile_row_quantizer(kind_);
  struct Whole {
    int32_t column, row;
    float value;
  };
  static thread_local std::vector<Whole> all;
  static thread_local std::vector<int32_t> places;
  static thread_local std::vector<float> values;
  all.clear();
  places.resize(static_cast<size_t>(most_));
  values.resize(static_cast<size_t>(most_));
  const int64_t each = block_ == 32 ? 1 : 16;  // sums of a block
  auto* largest = const_cast<int32_t*>(v.largest);
  if (block_ > 32) std::fill_n(largest, blocks_, 0);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = tile * kRows + t;
    const TileRow to{const_cast<int8_t*>(v.q) + t * block_,
                     const_cast<float*>(v.scale) + t,
                     const_cast<float*>(v.minimum) + t,
                     const_cast<int32_t*>(v.sums) + t * each,
                     const_cast<int16_t*>(v.pairs) + t * 8,
                     largest,
                     count};
    const int64_t kept =
        quantize(x + (index != nullptr ? index[i] : i) * stride, blocks_, to, most_, places.data(), values.data());
    for (int64_t k = 0; k < kept; ++k)
      all.push_back({places[static_cast<size_t>(k)], static_cast<int32_t>(t), values[static_cast<size_t>(k)]});
  }
  if (count > 1) std::sort(all.begin(), all.end(), [](const Whole& a, const Whole& b) { return a.column < b.column; });
  auto* outliers = const_cast<float*>(v.outliers);
  for (size_t k = 0; k < all.size(); ++k) {
    if (k == 0 || all[k].column != all[k - 1].column) {
      found[++*found] = all[k].column;
      std::fill_n(outliers + (*found - 1) * count, count, 0.f);
    }
    outliers[(*found - 1) * count + all[k].row] = all[k].value;
  }
}

namespace {

// What products begin with is asked for: the hardware looks ahead only once it has seen where they go, and products of
// several rows ask for what comes so far behind.
constexpr int64_t kStart = 8192;

void ask(const std::byte* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

}  // namespace

void packed_prefetch(Format format, const std::byte* packed, int64_t cols, int64_t first) {
  const PackedLayout& l = packable(format).layout;
  const int64_t bytes = l.bytes(cols / l.block);
  ask(packed + first * bytes, std::min(bytes, kStart));
}

void packed_products(Format format, const std::byte* packed, int64_t rows, int64_t cols, int64_t first, int64_t last,
                     const QuantizedTiles& x, float* y, int64_t stride) {
  const Packable& p = packable(format);
  const PackedLayout& l = p.layout;
  check(x.cols() == cols && x.kind() == activation_kind(format),
        "{} activations, quantized for {}, do not fit {} rows of {} columns", x.cols(),
        x.kind() == activation_kind(format) ? "this format" : "another format", info(format).name, cols);
  const int64_t blocks = cols / l.block, bytes = l.bytes(blocks);
  const PackedFormat& kernel = all_kernels().*p.kernels;
  if (first < last) ask(packed + first * bytes, std::min(bytes, kStart));
  for (int64_t g = first; g < last; ++g) {
    const auto* group = reinterpret_cast<const uint8_t*>(packed) + g * bytes;
    const int64_t have = std::min(kPackedRows, rows - g * kPackedRows);
    for (int64_t tile = 0; tile < x.tiles(); ++tile) {
      const int64_t count = x.rows(tile);
      const QuantizedTiles::View view = x.view(tile);
      float* to = y + tile * QuantizedTiles::kRows * stride + g * kPackedRows;
      const auto run = [&](float* out, int64_t step) {
        kernel.product[count - 1](group, blocks, view, out, step);
        if (view.whole > 0) kernel.columns[count - 1](group, blocks, view, out, step);
      };
      if (have == kPackedRows) {
        run(to, stride);
        continue;
      }
      float out[QuantizedTiles::kRows * kPackedRows];
      run(out, kPackedRows);
      for (int64_t t = 0; t < count; ++t)
        std::memcpy(to + t * stride, out + t * kPackedRows, static_cast<size_t>(have) * 4);
    }
  }
}

int64_t packed_peak(int64_t rounds) {
  return all_kernels().peak(rounds);
}

}  // namespace moiety
