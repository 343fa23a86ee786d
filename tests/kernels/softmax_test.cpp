#include "moiety/kernels/softmax.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "each_isa.h"
#include "elements.h"

namespace moiety {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Case {
  int64_t n;
  float softcap = 0.f, sink = -kInfinity;
  bool masked = false;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t n : {1, 15, 16, 17, 100})
    for (const float cap : {0.f, 3.f})
      for (const float sink : {-kInfinity, 1.f})
        for (const bool masked : {false, true}) all.push_back({n, cap, sink, masked});
  return all;
}

class Softmax : public EachIsa {
 protected:
  static constexpr float kScale = 0.7f;

  template <class T>
  static void check_rows(double tolerance);
};

template <class T>
void Softmax::check_rows(double tolerance) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(testing::Message() << c.n << " keys, cap " << c.softcap << ", sink " << c.sink << ", masked "
                                    << c.masked);
    const auto scores = gaussian(c.n, 1, 4.f), dp = gaussian(c.n, 2);
    const auto seen = std::make_unique<bool[]>(c.n);
    for (int64_t i = 0; i < c.n; ++i) seen[i] = i % 3 == 0;
    const Logits logits{c.n, kScale, c.softcap, c.masked ? seen.get() : nullptr};
    std::vector<double> z(c.n), slope(c.n);
    double sum = std::exp(static_cast<double>(c.sink));
    for (int64_t i = 0; i < c.n; ++i) {
      z[i] = kScale * scores[i], slope[i] = kScale;
      if (c.softcap != 0.f) {
        const double t = std::tanh(z[i] / c.softcap);
        z[i] = c.softcap * t, slope[i] *= 1 - t * t;
      }
      if (c.masked && !seen[i]) z[i] = -kInfinity;
      sum += std::exp(z[i]);
    }
    double delta = 0;
    for (int64_t i = 0; i < c.n; ++i) delta += std::exp(z[i]) / sum * dp[i];
    for_each_isa([&] {
      auto work = scores;
      std::vector<T> to(c.n), p(c.n), ds(c.n);
      const SoftmaxSums sums = softmax_row(logits, work.data(), c.sink, to.data());
      EXPECT_NEAR(sums.log_sum, std::log(sum), 1e-6 * (1 + std::abs(std::log(sum))));
      softmax_backward(logits, scores.data(), dp.data(), sums.log_sum, static_cast<float>(delta), p.data(), ds.data());
      for (int64_t i = 0; i < c.n; ++i) {
        const double want = std::exp(z[i]) / sum, want_ds = want * (dp[i] - delta) * slope[i];
        EXPECT_NEAR(value(to[i]) * sums.factor, want, tolerance * (want + 1e-3));
        EXPECT_NEAR(value(p[i]), want, tolerance * (want + 1e-3));
        EXPECT_NEAR(value(ds[i]), want_ds, tolerance * (std::abs(want_ds) + 1e-2));
      }
      std::vector<T> alone(c.n);
      softmax_backward(logits, scores.data(), nullptr, sums.log_sum, 0.f, alone.data(), static_cast<T*>(nullptr));
      EXPECT_EQ(alone, p);
    });
  }
}

TEST_F(Softmax, EqualsTheFormulaInF32) {
  check_rows<float>(5e-6);  // e^z of z near 10 carries ten times the rounding of z
}
TEST_F(Softmax, EqualsTheFormulaInBf16) {
  check_rows<uint16_t>(5e-3);
}

TEST_F(Softmax, MayBeInPlace) {
  const int64_t n = 37;
  const auto scores = gaussian(n, 1, 4.f), dp = gaussian(n, 2);
  for (const float cap : {0.f, 3.f})
    for_each_isa([&] {
      const Logits logits{n, kScale, cap, nullptr};
      auto from = scores, to = scores;
      const float log_sum = softmax_row(logits, from.data(), -kInfinity, to.data()).log_sum;
      auto place = scores;
      softmax_row(logits, place.data(), -kInfinity, place.data());
      EXPECT_EQ(place, to);
      std::vector<float> p(n), ds(n);
      softmax_backward(logits, scores.data(), dp.data(), log_sum, 0.3f, p.data(), ds.data());
      auto p_place = scores, ds_place = dp;
      softmax_backward(logits, p_place.data(), ds_place.data(), log_sum, 0.3f, p_place.data(), ds_place.data());
      EXPECT_EQ(p_place, p);
      EXPECT_EQ(ds_place, ds);
    });
}

TEST_F(Softmax, TangentIsExactNearZeroAndFarAway) {
  for_each_isa([&] {
    for (const float x : {0.f, 1e-20f, -1e-6f, 0.01f, -0.3f, 0.6249f, 0.6251f, -2.f, 9.f, -90.f, 1e30f}) {
      float z = x, to = 0.f;
      softmax_row({1, 1.f, 1.f, nullptr}, &z, -kInfinity, &to);
      EXPECT_NEAR(z, std::tanh(x), 2.5e-7f * std::abs(std::tanh(x))) << x;
    }
  });
}

TEST_F(Softmax, ARowThatSeesNothingIsZero) {
  const int64_t n = 20;
  const auto seen = std::make_unique<bool[]>(n);
  const Logits logits{n, 1.f, 0.f, seen.get()};
  for (const float sink : {-kInfinity, 2.f})
    for_each_isa([&] {
      std::vector<float> scores(n, 3.f), p(n, 1.f), dp(n, kInfinity);
      const SoftmaxSums sums = softmax_row(logits, scores.data(), sink, p.data());
      EXPECT_EQ(p, std::vector<float>(n, 0.f));
      EXPECT_EQ(sums.log_sum, sink > 0.f ? 2.f : kInfinity);
      EXPECT_EQ(sums.factor, sink > 0.f ? 1.f : 0.f);
      std::vector<float> ds(n, 1.f);
      p.assign(n, 1.f);
      softmax_backward(logits, scores.data(), dp.data(), sums.log_sum, 0.f, p.data(), ds.data());
      EXPECT_EQ(p, std::vector<float>(n, 0.f));
      EXPECT_EQ(ds, p);
    });
}

TEST_F(Softmax, NotANumberStaysOne) {
  for (const int64_t n : {1, 20})
    for_each_isa([&] {
      std::vector<float> scores(n, std::nanf("")), p(n);
      const SoftmaxSums sums = softmax_row({n, 1.f, 0.f, nullptr}, scores.data(), -kInfinity, p.data());
      EXPECT_TRUE(std::isnan(sums.log_sum) && std::isnan(sums.factor) && std::isnan(p[n - 1]));
    });
}

template <class T>
void check_dot_and_scale() {
  const int64_t n = 37;
  const auto x = gaussian(n, 1), y = gaussian(n, 2);
  std::vector<T> a(n), b(n), scaled(n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    set(a[i], x[i]);
    set(b[i], y[i]);
    sum += static_cast<double>(value(a[i])) * value(b[i]);
  }
  EXPECT_NEAR(row_dot(a.data(), b.data(), n), sum, 1e-5);
  scale_row(x.data(), 0.3f, scaled.data(), n);
  for (int64_t i = 0; i < n; ++i) {
    T want;
    set(want, 0.3f * x[i]);
    EXPECT_EQ(scaled[i], want);
  }
}

TEST_F(Softmax, DotsAndScales) {
  for_each_isa([] {
    check_dot_and_scale<float>();
    check_dot_and_scale<uint16_t>();
  });
}

}  // namespace
}  // namespace moiety
