#include "moiety/kernels/packed.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <vector>

#include "kernels/each_isa.h"
#include "kernels/random_rows.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

const Format kPackable[] = {Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q5_0,  Format::Q5_1, Format::MXFP4,
                            Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::TQ1_0, Format::TQ2_0};

struct Free {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Packed = std::unique_ptr<std::byte[], Free>;

Packed pack(Format format, const std::vector<std::byte>& rows, int64_t count, int64_t cols) {
  const int64_t bytes = packed_group_bytes(format, cols), groups = packed_groups(count);
  Packed p(static_cast<std::byte*>(::operator new[](static_cast<size_t>(bytes * groups), std::align_val_t{64})));
  for (int64_t g = 0; g < groups; ++g) pack_group(format, rows.data(), count, cols, g, p.get() + g * bytes);
  return p;
}

class PackedTest : public EachIsa {
 protected:
  void SetUp() override {
    for_each_isa([&] { any_ = any_ || can_pack(Format::Q8_0); });
    if (!any_) GTEST_SKIP() << "no products for packed rows on this machine";
  }
  // Every instruction set of this machine that has such products.
  template <class F>
  static void for_each_packing(const F& f) {
    for_each_isa([&] {
      if (can_pack(Format::Q8_0)) f();
    });
  }

 private:
  bool any_ = false;
};

QuantizedTiles tiles_of(Format format, const std::vector<float>& x, int64_t n, int64_t cols) {
  QuantizedTiles tiles;
  tiles.resize(activation_kind(format), n, cols);
  for (int64_t t = 0; t < tiles.tiles(); ++t) tiles.fill(t, x.data(), cols);
  return tiles;
}

// Normal numbers with a long tail: several in a hundred lie far above the others.
std::vector<float> long_tailed(size_t n, unsigned seed) {
  auto x = gaussian(n, seed);
  for (float& v : x) v = v * v * v;
  return x;
}

// Row t of the activations as products take it: what lies far above its block, by its quants, stays whole, and the rest
// is what QuantizedRow makes of it.
std::vector<double> rounded(const QuantizedTiles& tiles, Format format, const std::vector<float>& x, int64_t t,
                            int64_t cols) {
  const int64_t block = info(format).block, tile = t / QuantizedTiles::kRows, row = t % QuantizedTiles::kRows;
  const int64_t most = (cols + QuantizedTiles::kShareWhole - 1) / QuantizedTiles::kShareWhole;
  const auto view = tiles.view(tile);
  std::vector<float> rest(x.begin() + t * cols, x.begin() + (t + 1) * cols);
  std::vector<float> kept(static_cast<size_t>(cols));
  for (int64_t u = 0; u < view.whole; ++u) {
    EXPECT_TRUE(u == 0 || view.columns[u - 1] < view.columns[u]);
    kept[static_cast<size_t>(view.columns[u])] = view.outliers[u * tiles.rows(tile) + row];
  }
  std::vector<double> out(kept.begin(), kept.end());
  QuantizedRow q;
  quantize_activations(format, rest.data(), cols, q);
  int64_t left = most;
  for (int64_t i = 0; i < cols; ++i) {
    int64_t size = 0;
    for (int64_t k = i / block * block; k < i / block * block + block; ++k) size += std::abs(q.q()[k]);
    const bool far = left > 0 && std::abs(q.q()[i]) * block > 5 * size;
    EXPECT_EQ(kept[static_cast<size_t>(i)], far ? rest[static_cast<size_t>(i)] : 0.f) << i;
    if (!far) continue;
    --left;
    rest[static_cast<size_t>(i)] = 0.f;
  }
  quantize_activations(format, rest.data(), cols, q);
  for (int64_t i = 0; i < cols; ++i)
    out[static_cast<size_t>(i)] += static_cast<double>(q.scale()[i / block]) * q.q()[i];
  return out;
}

// The largest error of products [n, rows], each relative to the sum of the magnitudes it is made of: against the
// decoded weights times the activations as they were rounded, in f64. What lies beside the products is left alone.
double worst_error(Format format, const std::vector<std::byte>& b, int64_t rows, int64_t cols,
                   const std::vector<float>& x, int64_t n) {
  const Packed packed = pack(format, b, rows, cols);
  const auto tiles = tiles_of(format, x, n, cols);
  const int64_t stride = rows + 3;
  std::vector<float> y(static_cast<size_t>(n * stride), 7.f);
  packed_products(format, packed.get(), rows, cols, 0, packed_groups(rows), tiles, y.data(), stride);
  double worst = 0;
  std::vector<float> w(static_cast<size_t>(cols));
  for (int64_t t = 0; t < n; ++t) {
    const auto a = rounded(tiles, format, x, t, cols);
    for (int64_t r = 0; r < rows; ++r) {
      dequantize_row(format, b.data() + r * row_bytes(format, cols), w.data(), cols);
      double sum = 0, size = 0;
      for (size_t i = 0; i < a.size(); ++i) {
        const double term = static_cast<double>(w[i]) * a[i];
        sum += term;
        size += std::fabs(term);
      }
      worst = std::max(worst, std::fabs(y[static_cast<size_t>(t * stride + r)] - sum) / (size + 1e-30));
    }
    for (int64_t r = rows; r < stride; ++r) EXPECT_EQ(y[static_cast<size_t>(t * stride + r)], 7.f);
  }
  return worst;
}

TEST_F(PackedTest, EveryFormatAndNumberOfRows) {
  for_each_packing([] {
    for (const Format format : kPackable)
      for (const int64_t blocks : {1, 2, 5})
        for (const int64_t rows : {1, 15, 16, 17, 40}) {
          const int64_t cols = blocks * info(format).block;
          const auto b = random_rows(format, rows, cols, static_cast<unsigned>(rows + blocks));
          for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 19})
            for (const bool tail : {false, true})
              EXPECT_LT(worst_error(format, b, rows, cols,
                                    tail ? long_tailed(static_cast<size_t>(n * cols), static_cast<unsigned>(n))
                                         : gaussian(static_cast<size_t>(n * cols), static_cast<unsigned>(n)),
                                    n),
                        2e-6)
                  << info(format).name << " " << rows << " x " << cols << ", " << n << " rows";
        }
  });
}

TEST_F(PackedTest, EveryColumnOfAGroup) {
  // One element of each block that is far above the rest, in every place.
  for_each_packing([] {
    for (const Format format : kPackable) {
      const int64_t block = info(format).block, cols = 2 * block;
      const auto b = random_rows(format, 16, cols, 12);
      for (int64_t first = 0; first < block; first += 8) {
        auto x = gaussian(static_cast<size_t>(8 * cols), 13);
        for (int64_t t = 0; t < 8; ++t) x[static_cast<size_t>(t * cols + block + (first + t) % block)] = 40.f;
        const auto tiles = tiles_of(format, x, 8, cols);
        EXPECT_EQ(tiles.view(0).whole, 8);
        EXPECT_LT(worst_error(format, b, 16, cols, x, 8), 2e-6) << info(format).name << " " << first;
      }
    }
  });
}

TEST_F(PackedTest, OneLargeElementCostsTheOthersNoPrecision) {
  for_each_packing([] {
    for (const Format format : kPackable) {
      const int64_t cols = 512;
      auto x = gaussian(static_cast<size_t>(cols), 14);
      const auto error = [&] {
        const auto a = rounded(tiles_of(format, x, 1, cols), format, x, 0, cols);
        double sum = 0;
        for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - x[i]) * (a[i] - x[i]);
        return sum;
      };
      const double without = error();
      x[100] = 1000.f;
      EXPECT_LT(error(), 1.1 * without) << info(format).name;
    }
  });
}

TEST_F(PackedTest, EveryInstructionSetGivesTheSameBits) {
  for (const Format format : kPackable) {
    const int64_t cols = 1280, rows = 48;
    const auto b = random_rows(format, rows, cols, 8);
    const Packed packed = pack(format, b, rows, cols);
    for (const int64_t n : {1, 3, 8}) {
      const auto tiles = tiles_of(format, long_tailed(static_cast<size_t>(n * cols), 9), n, cols);
      std::vector<float> first;
      for_each_packing([&] {
        std::vector<float> y(static_cast<size_t>(n * rows));
        packed_products(format, packed.get(), rows, cols, 0, packed_groups(rows), tiles, y.data(), rows);
        if (first.empty()) first = y;
        EXPECT_EQ(std::memcmp(y.data(), first.data(), y.size() * 4), 0) << info(format).name << ", " << n << " rows";
      });
    }
  }
}

TEST_F(PackedTest, EveryInstructionSetRoundsAlike) {
  constexpr int64_t kCols = 1024;
  for (const ActivationKind kind : {ActivationKind::Blocks32, ActivationKind::Blocks256})
    for (unsigned seed = 0; seed < 40; ++seed) {
      auto x = seed % 2 == 0 ? long_tailed(8 * kCols, seed) : gaussian(8 * kCols, seed);
      std::mt19937 random(seed);
      // Halves and extremes of both signs, zeros, numbers too small for a scale, and what is not finite.
      for (int i = 0; i < 400; ++i) {
        const float special[] = {0.f, -0.f, 127.f, -127.f, 0.5f, -2.5f, 63.5f, 1e-42f, 3e38f, -3e38f};
        x[random() % x.size()] = special[random() % 10];
      }
      std::fill_n(x.begin() + 256, 256, 0.f);
      std::fill_n(x.begin() + 512, 256, 1e-41f);
      x[2000] = std::numeric_limits<float>::infinity();
      x[3000] = std::numeric_limits<float>::quiet_NaN();
      std::vector<std::byte> first;
      for_each_isa([&] {
        QuantizedTiles tiles;
        tiles.resize(kind, 8, kCols);
        tiles.fill(0, x.data(), kCols);
        const auto v = tiles.view(0);
        const int64_t block = kind == ActivationKind::Blocks32 ? 32 : 256, blocks = 8 * kCols / block;
        std::vector<std::byte> all;
        const auto add = [&](const auto* p, int64_t n) {
          const auto* bytes = reinterpret_cast<const std::byte*>(p);
          all.insert(all.end(), bytes, bytes + n * static_cast<int64_t>(sizeof(*p)));
        };
        add(v.q, 8 * kCols);
        for (int64_t i = 0; i < blocks; ++i) {  // one NaN is as good as another
          const float scale = std::isnan(v.scale[i]) ? -1.f : v.scale[i];
          add(&scale, 1);
        }
        add(v.sums, block == 32 ? blocks : 16 * blocks);
        if (block == 256) {
          add(v.pairs, 8 * blocks);
          add(v.largest, blocks / 8);
        }
        add(v.columns, v.whole);
        add(v.outliers, 8 * v.whole);
        if (first.empty()) first = all;
        EXPECT_EQ(all, first);
      });
    }
}

TEST_F(PackedTest, LargestSumIsThatOfAnyRow) {
  for_each_isa([] {
    std::vector<float> x(2 * 512, 1.f);  // quants 127 but for what follows
    std::fill_n(x.begin() + 256, 256, 0.f);
    x[256] = 1.f;
    std::fill_n(x.begin() + 512, 256, -0.5f);
    x[512 + 40] = -1.f;
    const auto tiles = tiles_of(Format::Q4_K, x, 2, 512);
    const auto v = tiles.view(0);
    EXPECT_EQ(v.largest[0], 32 * 127);  // of row 0
    EXPECT_EQ(v.largest[1], 32 * 127);  // of row 1
    const auto second = tiles_of(Format::Q4_K, {x.begin() + 512, x.end()}, 1, 512);
    EXPECT_EQ(second.view(0).largest[0], 127 + 31 * 64);
  });
}

TEST_F(PackedTest, SumsAtTheEdgeOf16Bits) {
  // Q4_K: products of 15 with quants whose magnitudes add up to 2173 and 2204; two such sums share a register while
  // they are 32767 at most, which is 2184.
  for_each_packing([] {
    const int64_t rows = 16, cols = 512;
    auto b = random_rows(Format::Q4_K, rows, cols, 21);
    for (size_t block = 0; block < b.size(); block += 144) std::fill_n(b.begin() + block + 16, 128, std::byte{255});
    for (const float each : {66.f, 67.f, 127.f})
      for (const float sign : {1.f, -1.f})
        for (const int64_t n : {1, 3, 8}) {
          std::vector<float> x(static_cast<size_t>(n * cols), sign * each);
          for (size_t i = 0; i < x.size(); i += 32) x[i] = sign * 127.f;
          EXPECT_LT(worst_error(Format::Q4_K, b, rows, cols, x, n), 2e-6) << each << " " << sign << " " << n;
        }
  });
}

TEST_F(PackedTest, RowsOfATileDoNotMeet) {
  // A row gives the same bits alone and beside others.
  for_each_packing([] {
    for (const Format format : kPackable) {
      const int64_t cols = 512, rows = 16, n = 8;
      const auto b = random_rows(format, rows, cols, 3);
      const Packed packed = pack(format, b, rows, cols);
      const auto x = long_tailed(static_cast<size_t>(n * cols), 4);
      const auto all = tiles_of(format, x, n, cols);
      QuantizedTiles one;
      std::vector<float> y(static_cast<size_t>(n * rows)), alone(static_cast<size_t>(rows));
      packed_products(format, packed.get(), rows, cols, 0, 1, all, y.data(), rows);
      for (int64_t t = 0; t < n; ++t) {
        one.resize(activation_kind(format), 1, cols);
        one.fill(0, x.data(), cols, &t);
        packed_products(format, packed.get(), rows, cols, 0, 1, one, alone.data(), rows);
        EXPECT_EQ(std::memcmp(alone.data(), y.data() + t * rows, static_cast<size_t>(rows) * 4), 0)
            << info(format).name;
      }
    }
  });
}

// Bits of quants and integer scales all alike, or one of some bytes by chance; the scales stay finite.
std::vector<std::byte> extreme_rows(Format format, int64_t rows, int64_t cols, int byte, unsigned seed) {
  const auto scales = random_rows(format, rows, cols, seed);
  auto b = scales;
  std::mt19937 random(seed);
  constexpr int kBytes[] = {0x00, 0xff, 0x7f, 0x80, 0x77};
  for (auto& v : b) v = static_cast<std::byte>(byte < 0 ? kBytes[random() % std::size(kBytes)] : byte);
  const ScaleBytes scale = scale_bytes(format);
  for (size_t at = static_cast<size_t>(scale.at); at < b.size(); at += static_cast<size_t>(info(format).bytes))
    std::copy_n(scales.data() + at, scale.count, b.data() + at);
  return b;
}

TEST_F(PackedTest, ExtremeQuantsDoNotSaturate) {
  for_each_packing([] {
    for (const Format format : kPackable)
      for (const int byte : {0x00, 0xff, 0x7f, 0x80, 0x77, -1, -1}) {
        const int64_t cols = 2 * info(format).block;
        for (const int64_t n : {1, 5}) {
          // Activations of 127 and -127 alone: all of one sign, where sums are largest, and mixed.
          for (const unsigned signs : {0u, 1u, 2u}) {
            std::mt19937 random(signs);
            std::vector<float> x(static_cast<size_t>(n * cols));
            for (float& v : x) v = signs == 2 ? (random() % 2 == 0 ? 1.f : -1.f) : signs == 1 ? -1.f : 1.f;
            EXPECT_LT(worst_error(format, extreme_rows(format, 16, cols, byte, 5 + signs), 16, cols, x, n), 2e-6)
                << info(format).name << " " << byte << ", signs " << signs << ", " << n << " rows";
          }
        }
      }
  });
}

TEST_F(PackedTest, NotANumberSpreadsToItsRowAlone) {
  for_each_packing([] {
    for (const Format format : kPackable) {
      const int64_t cols = 512;
      const auto b = random_rows(format, 16, cols, 6);
      const Packed packed = pack(format, b, 16, cols);
      auto x = gaussian(static_cast<size_t>(2 * cols), 7);
      x[static_cast<size_t>(cols + 5)] = std::numeric_limits<float>::infinity();
      const auto tiles = tiles_of(format, x, 2, cols);
      float y[32];
      packed_products(format, packed.get(), 16, cols, 0, 1, tiles, y, 16);
      for (int r = 0; r < 16; ++r) {
        EXPECT_TRUE(std::isfinite(y[r])) << info(format).name;
        EXPECT_TRUE(std::isnan(y[16 + r])) << info(format).name;
      }
    }
  });
}

TEST_F(PackedTest, ScalesOfMxfp4HaveEveryExponent) {
  // Row r has the exponent r in both blocks, the largest ones beside codes up to 3, which f32 holds. Activations are
  // whole multiples of a power of two that keeps products in f32's range, one of them far above the rest: nothing is
  // rounded.
  constexpr int64_t kRows = 256, kCols = 64;
  std::mt19937 random(15);
  std::vector<std::byte> b(static_cast<size_t>(kRows * row_bytes(Format::MXFP4, kCols)));
  const auto bytes = static_cast<size_t>(info(Format::MXFP4).bytes);
  for (size_t i = 0; i < b.size(); ++i) {
    const size_t exponent = i / (2 * bytes);
    b[i] = static_cast<std::byte>(i % bytes == 0 ? exponent : random() & (exponent < 253 ? 0xff : 0xbb));
  }
  for_each_packing([&] {
    const Packed packed = pack(Format::MXFP4, b, kRows, kCols);
    for (const float step : {0x1p14f, 0x1p-20f})
      for (const int64_t n : {1, 2, 5, 8}) {
        std::vector<float> x(static_cast<size_t>(n * kCols));
        for (float& v : x) v = step * static_cast<float>(static_cast<int>(random() % 255) - 127);
        for (int64_t t = 0; t < n; ++t) {
          x[static_cast<size_t>(t * kCols)] = -127.f * step;
          x[static_cast<size_t>(t * kCols + 32)] = 127.f * step;
          x[static_cast<size_t>(t * kCols + 33 + t)] = 5000.f * step;
        }
        const auto tiles = tiles_of(Format::MXFP4, x, n, kCols);
        ASSERT_EQ(tiles.view(0).whole, n);
        std::vector<float> y(static_cast<size_t>(n * kRows)), w(kCols);
        packed_products(Format::MXFP4, packed.get(), kRows, kCols, 0, packed_groups(kRows), tiles, y.data(), kRows);
        for (int64_t t = 0; t < n; ++t) {
          for (int64_t r = step > 1.f ? 0 : 128; r < (step > 1.f ? 128 : 255); ++r) {
            dequantize_row(Format::MXFP4, b.data() + r * row_bytes(Format::MXFP4, kCols), w.data(), kCols);
            double sum = 0;
            for (int64_t i = 0; i < kCols; ++i)
              sum += static_cast<double>(w[static_cast<size_t>(i)]) * x[static_cast<size_t>(t * kCols + i)];
            EXPECT_EQ(static_cast<double>(y[static_cast<size_t>(t * kRows + r)]), sum) << "exponent " << r;
          }
          EXPECT_TRUE(std::isnan(y[static_cast<size_t>(t * kRows + 255)]));
        }
      }
  });
}

TEST_F(PackedTest, RefusesWhatDoesNotFit) {
  EXPECT_FALSE(can_pack(Format::BF16));
  EXPECT_FALSE(can_pack(Format::F16));
  EXPECT_THROW(packed_group_bytes(Format::Q4_K, 128), Error);
  EXPECT_THROW(packed_group_bytes(Format::F16, 128), Error);
  QuantizedTiles tiles;
  EXPECT_THROW(tiles.resize(ActivationKind::Blocks256, 1, 128), Error);
  EXPECT_THROW(tiles.resize(ActivationKind::Float, 1, 128), Error);
  tiles.resize(ActivationKind::Blocks32, 1, 64);
  float y[16];
  EXPECT_THROW(packed_products(Format::Q8_0, nullptr, 16, 32, 0, 1, tiles, y, 16), Error);
  EXPECT_THROW(packed_products(Format::Q4_K, nullptr, 16, 256, 0, 1, tiles, y, 16), Error);
}

}  // namespace
}  // namespace moiety
