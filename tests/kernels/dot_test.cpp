#include "moiety/kernels/dot.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/each_isa.h"
#include "kernels/random_rows.h"
#include "moiety/base/error.h"
#include "moiety/kernels/half.h"

namespace moiety {
namespace {

const Format kBlockFormats[] = {Format::Q8_0, Format::Q4_0, Format::Q4_1,  Format::Q5_0,  Format::Q5_1, Format::Q4_K,
                                Format::Q5_K, Format::Q6_K, Format::TQ1_0, Format::TQ2_0, Format::MXFP4};
using DotTest = EachIsa;

// The products of the decoded weights with the activations as they were quantized, and the sum of magnitudes for scale.
struct Expected {
  std::vector<double> y, size;
};
Expected expected(Format format, const std::vector<std::byte>& b, int64_t rows, int64_t cols, const QuantizedRow& x) {
  Expected e;
  const int block = x.kind() == ActivationKind::Blocks32 ? 32 : 256;
  std::vector<float> w(static_cast<size_t>(cols));
  for (int64_t r = 0; r < rows; ++r) {
    dequantize_row(format, b.data() + r * row_bytes(format, cols), w.data(), cols);
    double y = 0, size = 0;
    for (int64_t i = 0; i < cols; ++i) {
      const double term = static_cast<double>(w[static_cast<size_t>(i)]) * x.scale()[i / block] * x.q()[i];
      y += term;
      size += std::fabs(term);
    }
    e.y.push_back(y);
    e.size.push_back(size);
  }
  return e;
}

TEST_F(DotTest, EveryFormatAndPathAndLength) {
  for (Format format : kBlockFormats) {
    const int block = info(format).block;
    for (int blocks : {1, 2, 3, 7, 8, 9, 15, 18, 24, 48}) {
      const int64_t cols = static_cast<int64_t>(blocks) * block, rows = 3;
      const auto b = random_rows(format, rows, cols, static_cast<unsigned>(blocks));
      const auto x = gaussian(static_cast<size_t>(cols), static_cast<unsigned>(blocks) + 100);
      for_each_isa([&] {
        QuantizedRow q;
        quantize_activations(format, x.data(), cols, q);
        const Expected e = expected(format, b, rows, cols, q);
        std::vector<float> y(rows, -1.f);
        dot_rows(format, b.data(), rows, cols, q, y.data());
        // Integer products are exact; what is left is float32 rounding. Offsets are taken out afterwards, which
        // cancels terms some times larger than the sum of magnitudes.
        for (size_t r = 0; r < rows; ++r)
          EXPECT_NEAR(y[r], e.y[r], 4e-6 * e.size[r] + 1e-6)
              << info(format).name << ' ' << blocks << " blocks, row " << r;
      });
    }
  }
}

TEST_F(DotTest, ExtremeQuantsDoNotSaturate) {
  for (Format format : kBlockFormats) {
    const int64_t cols = 512;
    std::vector<std::byte> b(static_cast<size_t>(row_bytes(format, cols)), std::byte{0xff});
    // Scales of 1 (0x3c00) where the format keeps a half, the largest quants everywhere else.
    const FormatInfo& f = info(format);
    const auto one = [&](size_t at) { b[at] = std::byte{0}, b[at + 1] = std::byte{0x3c}; };
    for (size_t at = 0; at < b.size(); at += static_cast<size_t>(f.bytes)) {
      if (format == Format::MXFP4) {
        b[at] = std::byte{127};
        for (size_t i = 1; i < 17; ++i) b[at + i] = std::byte{0x77};
      } else if (format == Format::Q6_K) {
        one(at + 208);
      } else if (format == Format::TQ1_0 || format == Format::TQ2_0) {
        one(at + static_cast<size_t>(f.bytes) - 2);
      } else {
        one(at);
        if (format == Format::Q8_0)
          for (size_t i = 2; i < 34; ++i) b[at + i] = std::byte{0x80};  // -128, which writers avoid
        else if (format != Format::Q4_0 && format != Format::Q5_0)
          one(at + 2);
      }
    }
    for (float sign : {1.f, -1.f}) {
      const std::vector<float> x(static_cast<size_t>(cols), sign * 127.f);
      for_each_isa([&] {
        QuantizedRow q;
        quantize_activations(format, x.data(), cols, q);
        const Expected e = expected(format, b, 1, cols, q);
        float y = 0;
        dot_rows(format, b.data(), 1, cols, q, &y);
        EXPECT_NEAR(y, e.y[0], 1e-6 * e.size[0]) << f.name;
      });
    }
  }
}

TEST_F(DotTest, ActivationsOfBlocks32) {
  for_each_isa([] {
    std::vector<float> x(96, 0.f);
    x[0] = 127.f;
    x[1] = 0.5f;  // half away from zero
    x[2] = -2.5f;
    x[3] = 0.49999997f;
    x[64] = -1.f;
    x[65] = 1.f / 3;
    QuantizedRow q;
    q.assign(ActivationKind::Blocks32, x.data(), 96);
    EXPECT_EQ(q.scale()[0], 1.f);
    EXPECT_EQ(std::vector<int>(q.q(), q.q() + 4), (std::vector<int>{127, 1, -3, 0}));
    EXPECT_EQ(q.sum()[0], 125.f);
    EXPECT_EQ(q.scale()[1], 0.f);
    EXPECT_EQ(q.q()[32], 0);
    EXPECT_EQ(q.scale()[2], half_to_float(float_to_half(1.f / 127.f)));
    EXPECT_EQ(q.q()[64], -127);
    EXPECT_EQ(q.q()[65], 42);
    EXPECT_EQ(q.scaled_sum()[2], q.scale()[2] * -85.f);
    for (int i = 96; i < 256; ++i) EXPECT_EQ(q.q()[i], 0);
  });
}

TEST_F(DotTest, ActivationsOfBlocks256) {
  for_each_isa([] {
    std::vector<float> x(512, 0.f);
    x[5] = 254.f;    // the signed extreme: becomes -127
    x[6] = 1.f;      // half: to even, 0
    x[7] = 3.f;      // 1.5: to even, 2
    x[40] = -254.f;  // equal magnitude, opposite sign
    QuantizedRow q;
    q.assign(ActivationKind::Blocks256, x.data(), 512);
    EXPECT_EQ(q.scale()[0], -2.f);
    EXPECT_EQ(q.q()[5], -127);
    EXPECT_EQ(q.q()[6], 0);
    EXPECT_EQ(q.q()[7], -2);
    EXPECT_EQ(q.q()[40], 127);
    EXPECT_EQ(q.sums16()[0], -129);
    EXPECT_EQ(q.sums16()[2], 127);
    EXPECT_EQ(q.sums32()[0], -129);
    EXPECT_EQ(q.sums32()[1], 127);
    EXPECT_EQ(q.sum()[0], -2.f);
    EXPECT_EQ(q.scale()[1], 0.f);
  });
}

RC_GTEST_PROP(DotActivations, AllPathsQuantizeAlike, ()) {
  std::vector<float> x(512);
  const float scale = std::exp2(static_cast<float>(*rc::gen::inRange(-20, 20)));
  for (float& v : x) v = scale * static_cast<float>(*rc::gen::inRange(-1000, 1001)) / 16.f;
  for (ActivationKind kind : {ActivationKind::Blocks32, ActivationKind::Blocks256}) {
    QuantizedRow first;
    set_isa(Isa::Portable);
    first.assign(kind, x.data(), 512);
    for (Isa each : {Isa::Avx2, Isa::Avx512}) {
      if (each > best_isa()) continue;
      set_isa(each);
      QuantizedRow other;
      other.assign(kind, x.data(), 512);
      RC_ASSERT(std::memcmp(first.q(), other.q(), 512) == 0);
      const size_t blocks = kind == ActivationKind::Blocks32 ? 16 : 2;
      RC_ASSERT(std::memcmp(first.scale(), other.scale(), blocks * 4) == 0);
      RC_ASSERT(std::memcmp(first.sum(), other.sum(), blocks * 4) == 0);
    }
    set_isa(best_isa());
  }
}

TEST_F(DotTest, OddActivations) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (Format format : {Format::Q4_0, Format::Q4_1, Format::Q8_0, Format::Q4_K, Format::Q6_K, Format::TQ2_0}) {
    const auto b = random_rows(format, 1, 512, 3);
    for_each_isa([&] {
      for (float bad : {inf, -inf, nan}) {
        auto x = gaussian(512, 4);
        x[100] = bad;
        QuantizedRow q;
        quantize_activations(format, x.data(), 512, q);
        float y = 0;
        dot_rows(format, b.data(), 1, 512, q, &y);
        EXPECT_TRUE(std::isnan(y)) << info(format).name;
      }
      for (float tiny : {0.f, 1e-45f, 1e-39f}) {
        const std::vector<float> x(512, tiny);
        QuantizedRow q;
        quantize_activations(format, x.data(), 512, q);
        float y = 1;
        dot_rows(format, b.data(), 1, 512, q, &y);
        EXPECT_EQ(y, 0.f) << info(format).name;
      }
      // Beyond the range of a half-precision scale.
      const std::vector<float> x(512, 1e8f);
      QuantizedRow q;
      quantize_activations(format, x.data(), 512, q);
      float y = 0;
      dot_rows(format, b.data(), 1, 512, q, &y);
      EXPECT_TRUE(std::isfinite(y)) << info(format).name;
    });
  }
}

TEST_F(DotTest, SeveralRowsOfActivations) {
  const int64_t rows = 19, cols = 256;
  for (Format format : kBlockFormats) {
    const auto b = random_rows(format, rows, cols, 9);
    std::vector<QuantizedRow> x(3);
    for (size_t t = 0; t < 3; ++t)
      quantize_activations(format, gaussian(256, static_cast<unsigned>(t)).data(), cols, x[t]);
    for_each_isa([&] {
      std::vector<float> all(3 * 32, -7.f), one(rows);
      dot_rows(format, b.data(), rows, cols, x, all.data(), 32);
      for (size_t t = 0; t < 3; ++t) {
        dot_rows(format, b.data(), rows, cols, x[t], one.data());
        for (size_t r = 0; r < rows; ++r) EXPECT_EQ(all[t * 32 + r], one[r]);
        EXPECT_EQ(all[t * 32 + rows], -7.f);
      }
    });
  }
}

TEST_F(DotTest, FloatWeights) {
  for (Format format : {Format::F32, Format::F16, Format::BF16})
    for (int64_t cols : {1, 7, 15, 16, 17, 63, 64, 65, 100, 576}) {
      const int64_t rows = 3;
      const auto source = gaussian(static_cast<size_t>(rows * cols), 1), x = gaussian(static_cast<size_t>(cols), 2);
      std::vector<std::byte> w(static_cast<size_t>(rows * row_bytes(format, cols)));
      std::vector<float> rounded(source.size());
      quantize_row(format, source.data(), w.data(), rows * cols);
      dequantize_row(format, w.data(), rounded.data(), rows * cols);
      for_each_isa([&] {
        std::vector<float> y(rows);
        dot_rows_float(format, w.data(), rows, cols, x.data(), y.data());
        for (int64_t r = 0; r < rows; ++r) {
          double sum = 0, size = 0;
          for (int64_t i = 0; i < cols; ++i) {
            const double term =
                static_cast<double>(rounded[static_cast<size_t>(r * cols + i)]) * x[static_cast<size_t>(i)];
            sum += term;
            size += std::fabs(term);
          }
          EXPECT_NEAR(y[static_cast<size_t>(r)], sum, 1e-6 * size + 1e-12) << info(format).name << cols;
        }
      });
    }
}

TEST_F(DotTest, ReusesItsMemory) {
  QuantizedRow q;
  const auto x = gaussian(1024, 1);
  q.assign(ActivationKind::Blocks32, x.data(), 1024);
  const int8_t* before = q.q();
  q.assign(ActivationKind::Blocks32, x.data(), 96);
  EXPECT_EQ(q.q(), before);
  EXPECT_EQ(q.cols(), 96);
  for (int i = 96; i < 256; ++i) EXPECT_EQ(q.q()[i], 0);
  for (int i = 3; i < 8; ++i) EXPECT_EQ(q.scale()[i], 0.f);
}

TEST_F(DotTest, RefusesWhatDoesNotFit) {
  const auto b = random_rows(Format::Q4_0, 1, 256, 1);
  const auto x = gaussian(256, 1);
  QuantizedRow q;
  float y;
  q.assign(ActivationKind::Blocks256, x.data(), 256);
  EXPECT_THROW(dot_rows(Format::Q4_0, b.data(), 1, 256, q, &y), Error);
  q.assign(ActivationKind::Blocks32, x.data(), 224);
  EXPECT_THROW(dot_rows(Format::Q4_0, b.data(), 1, 256, q, &y), Error);
  EXPECT_THROW(dot_rows(Format::F32, b.data(), 1, 224, q, &y), Error);
  EXPECT_THROW(dot_rows_float(Format::Q4_0, b.data(), 1, 32, x.data(), &y), Error);
  EXPECT_THROW(q.assign(ActivationKind::Blocks256, x.data(), 96), Error);
  EXPECT_THROW(q.assign(ActivationKind::Float, x.data(), 96), Error);
  EXPECT_THROW(activation_kind(Format::I8), Error);
}

}  // namespace
}  // namespace moiety
