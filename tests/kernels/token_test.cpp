#include "moiety/kernels/token.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/each_isa.h"

namespace moiety {
namespace {

using TokenTest = EachIsa;

TEST_F(TokenTest, NormEqualsTheFormula) {
  for (const int64_t n : {1, 15, 16, 100, 576}) {
    const auto x = gaussian(static_cast<size_t>(n), 1), w = gaussian(static_cast<size_t>(n), 2);
    double square = 0;
    for (const float v : x) square += static_cast<double>(v) * v;
    const double scale = 1.0 / std::sqrt(square / static_cast<double>(n) + 1e-5);
    for_each_isa([&] {
      auto y = x;  // out may be x
      rms_norm(y.data(), w.data(), 1.f, 1e-5f, y.data(), n);
      for (size_t i = 0; i < x.size(); ++i) {
        const double want = x[i] * scale * (1.0 + w[i]);
        EXPECT_NEAR(y[i], want, 2e-6 * (1.0 + std::abs(want)));
      }
    });
  }
}

TEST_F(TokenTest, RotationEqualsTheFormula) {
  const int64_t n = 21;
  const auto x = gaussian(static_cast<size_t>(n), 3);
  for (const int64_t half : {1, 8, 10}) {
    std::vector<float> c, s;
    for (int64_t i = 0; i < half; ++i) c.push_back(std::cos(0.3f * (i + 1))), s.push_back(std::sin(0.3f * (i + 1)));
    for (const bool interleaved : {false, true}) {
      for_each_isa([&] {
        std::vector<float> y(static_cast<size_t>(n));
        rotate_head(x.data(), c.data(), s.data(), half, interleaved, y.data(), n);
        for (int64_t i = 0; i < half; ++i) {
          const size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half, at = i;
          EXPECT_NEAR(y[a], x[a] * c[at] - x[b] * s[at], 1e-6);
          EXPECT_NEAR(y[b], x[b] * c[at] + x[a] * s[at], 1e-6);
        }
        for (size_t i = 2 * half; i < x.size(); ++i) EXPECT_EQ(y[i], x[i]);
      });
    }
  }
}

TEST_F(TokenTest, SiluEqualsTheFormula) {
  auto g = gaussian(50, 4, 5.f);
  g[0] = 200.f, g[1] = -200.f;
  const auto u = gaussian(50, 5);
  for_each_isa([&] {
    auto y = g;
    silu_times(y.data(), u.data(), 50);
    for (size_t i = 0; i < y.size(); ++i) {
      const double want = g[i] / (1.0 + std::exp(-static_cast<double>(g[i]))) * u[i];
      EXPECT_NEAR(y[i], want, 2e-6 * (1.0 + std::abs(want)));
    }
  });
}

TEST_F(TokenTest, GeluEqualsTheFormula) {
  auto g = gaussian(50, 4, 5.f);
  g[0] = 200.f, g[1] = -200.f, g[2] = 0.f;
  const auto u = gaussian(50, 5);
  for_each_isa([&] {
    auto y = g;
    gelu_tanh_times(y.data(), u.data(), 50);
    for (size_t i = 0; i < y.size(); ++i) {
      const double x = g[i], want = 0.5 * x * (1.0 + std::tanh(0.7978845608 * (x + 0.044715 * x * x * x))) * u[i];
      EXPECT_NEAR(y[i], want, 2e-6 * (1.0 + std::abs(want)));
    }
  });
}

TEST_F(TokenTest, ClampedGateEqualsTheFormula) {
  auto g = gaussian(50, 4, 5.f), u = gaussian(50, 5, 5.f);
  g[0] = 200.f, g[1] = -200.f, g[2] = 0.f, u[3] = 200.f, u[4] = -200.f;
  const float alpha = 1.702f, limit = 7.f;
  for_each_isa([&] {
    auto y = g;
    clamped_times(y.data(), u.data(), alpha, limit, 50);
    for (size_t i = 0; i < y.size(); ++i) {
      const double x = std::min(g[i], limit), by = std::clamp(u[i], -limit, limit) + 1.0;
      const double want = by * x / (1.0 + std::exp(-static_cast<double>(alpha) * x));
      EXPECT_NEAR(y[i], want, 2e-6 * (1.0 + std::abs(want)));
    }
    float none = std::numeric_limits<float>::quiet_NaN(), one = 1.f;
    clamped_times(&none, &one, alpha, limit, 1);
    EXPECT_TRUE(std::isnan(none));
  });
}

TEST_F(TokenTest, ProductsOfRowsEqualTheFormula) {
  for (const int64_t n : {1, 16, 77}) {
    const auto w = gaussian(static_cast<size_t>(5 * n), 8), x = gaussian(static_cast<size_t>(n), 9);
    for_each_isa([&] {
      std::vector<float> y(5);
      rows_times(w.data(), 5, n, x.data(), y.data());
      for (int64_t r = 0; r < 5; ++r) {
        double want = 0;
        for (int64_t i = 0; i < n; ++i)
          want += static_cast<double>(w[static_cast<size_t>(r * n + i)]) * x[static_cast<size_t>(i)];
        EXPECT_NEAR(y[static_cast<size_t>(r)], want, 1e-5 * (1.0 + std::abs(want)));
      }
    });
  }
}

TEST_F(TokenTest, AttentionEqualsTheFormula) {
  struct Case {
    int64_t heads, size, v_size, length;
    float softcap;
    bool seen, sinks;
  };
  for (const Case& c : {Case{1, 16, 16, 1, 0.f, false, false},
                        {3, 64, 64, 40, 0.f, false, false},
                        {2, 20, 83, 17, 0.f, true, false},
                        {4, 32, 8, 33, 2.f, false, true},
                        {1, 128, 128, 200, 5.f, true, true}}) {
    const auto q = gaussian(static_cast<size_t>(c.heads * c.size), 6),
               k = gaussian(static_cast<size_t>(c.length * c.size), 7),
               v = gaussian(static_cast<size_t>(c.length * c.v_size), 8),
               sinks = gaussian(static_cast<size_t>(c.heads), 9);
    const auto seen = std::make_unique<bool[]>(static_cast<size_t>(c.length));
    for (int64_t s = 0; s < c.length; ++s) seen[static_cast<size_t>(s)] = s % 3 != 1;
    AttendRow a{q.data(),
                k.data(),
                v.data(),
                c.heads,
                c.size,
                c.v_size,
                c.length,
                0.3f,
                c.softcap,
                c.seen ? seen.get() : nullptr,
                c.sinks ? sinks.data() : nullptr};
    for_each_isa([&] {
      std::vector<float> scratch(static_cast<size_t>(attend_scratch(a))), y(static_cast<size_t>(c.heads * c.v_size));
      attend_row(a, scratch.data(), y.data());
      for (int64_t h = 0; h < c.heads; ++h) {
        std::vector<double> p(static_cast<size_t>(c.length));
        double sum = c.sinks ? std::exp(static_cast<double>(sinks[static_cast<size_t>(h)])) : 0.0;
        for (int64_t s = 0; s < c.length; ++s) {
          double logit = 0;
          for (int64_t i = 0; i < c.size; ++i)
            logit +=
                static_cast<double>(q[static_cast<size_t>(h * c.size + i)]) * k[static_cast<size_t>(s * c.size + i)];
          logit *= 0.3f;
          if (c.softcap != 0.f) logit = c.softcap * std::tanh(logit / c.softcap);
          const bool on = !c.seen || seen[static_cast<size_t>(s)];
          sum += p[static_cast<size_t>(s)] = on ? std::exp(logit) : 0.0;
        }
        for (int64_t i = 0; i < c.v_size; ++i) {
          double want = 0;
          for (int64_t s = 0; s < c.length; ++s)
            want += p[static_cast<size_t>(s)] / sum * v[static_cast<size_t>(s * c.v_size + i)];
          EXPECT_NEAR(y[static_cast<size_t>(h * c.v_size + i)], want, 3e-6) << c.length;
        }
      }
    });
  }
}

TEST_F(TokenTest, WhatIsFarBelowTheLargestLogitCountsAsNothing) {
  const float q = 1.f, k[3] = {0.f, 300.f, 100.f}, v[3] = {1e30f, 2.f, 1e30f};
  for_each_isa([&] {
    const AttendRow a{&q, k, v, 1, 1, 1, 3, 1.f, 0.f, nullptr, nullptr};
    std::vector<float> scratch(static_cast<size_t>(attend_scratch(a)));
    float y = 0.f;
    attend_row(a, scratch.data(), &y);
    EXPECT_EQ(y, 2.f);
  });
}

RC_GTEST_FIXTURE_PROP(TokenTest, AttentionOverStoredRowsEqualsThatOverTheirNumbers, ()) {
  const auto heads = *rc::gen::inRange<int64_t>(1, 6), length = *rc::gen::inRange<int64_t>(1, 400);
  const auto seed = *rc::gen::inRange(0u, 1u << 20);
  const auto side = [&](int64_t& size, std::vector<std::byte>& stored, std::vector<float>& numbers) {
    const Format format = *rc::gen::element(Format::F32, Format::BF16, Format::F16, Format::Q8_0);
    size = format == Format::Q8_0 ? 32 * *rc::gen::inRange<int64_t>(1, 9) : *rc::gen::inRange<int64_t>(1, 270);
    numbers = gaussian(static_cast<size_t>(length * size), seed + static_cast<unsigned>(size));
    stored.resize(static_cast<size_t>(length * row_bytes(format, size)));
    for (int64_t s = 0; s < length; ++s) {
      std::byte* row = stored.data() + s * row_bytes(format, size);
      quantize_row(format, numbers.data() + s * size, row, size);
      dequantize_row(format, row, numbers.data() + s * size, size);
    }
    return format;
  };
  AttendRow a{};
  std::vector<std::byte> keys, values;
  std::vector<float> key_numbers, value_numbers;
  const Format k_format = side(a.size, keys, key_numbers), v_format = side(a.v_size, values, value_numbers);
  const auto q = gaussian(static_cast<size_t>(heads * a.size), seed + 1);
  a.q = q.data();
  a.heads = heads;
  a.length = length;
  a.scale = 0.2f;
  const auto run = [&](const void* k, Format k_is, const void* v, Format v_is) {
    a.k = k;
    a.v = v;
    a.k_format = k_is;
    a.v_format = v_is;
    std::vector<float> scratch(static_cast<size_t>(attend_scratch(a))), y(static_cast<size_t>(heads * a.v_size));
    attend_row(a, scratch.data(), y.data());
    return y;
  };
  for_each_isa([&] {
    const auto found = run(keys.data(), k_format, values.data(), v_format),
               want = run(key_numbers.data(), Format::F32, value_numbers.data(), Format::F32);
    RC_ASSERT(found == want);
  });
}

}  // namespace
}  // namespace moiety
