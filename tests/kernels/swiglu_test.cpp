#include "moiety/kernels/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "each_isa.h"
#include "elements.h"

namespace moiety {
namespace {

class Swiglu : public EachIsa {
 protected:
  template <class T>
  static void check_backward(double tolerance);
};

template <class T>
void Swiglu::check_backward(double tolerance) {
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  for (const int64_t n : {1, 15, 16, 17, 100}) {
    std::vector<T> g(n), u(n), t(n);
    for (auto* v : {&g, &u, &t})
      for (T& x : *v) set(x, 4.f * normal(engine));
    set(g[0], n == 1 ? 200.f : -200.f);  // where e^x leaves f32
    const float share = 0.3f;
    for_each_isa([&] {
      std::vector<T> h(n), du(n), dg = t;  // dg may be t
      const double sum = swiglu_backward(g.data(), u.data(), dg.data(), share, h.data(), dg.data(), du.data(), n);
      double want_sum = 0, size = 0;
      const auto near = [&](T got, double want) { EXPECT_NEAR(value(got), want, tolerance * (0.1 + std::abs(want))); };
      for (int64_t i = 0; i < n; ++i) {
        const double x = value(g[i]), s = 1 / (1 + std::exp(-x)), a = x * s, up = value(u[i]), grad = value(t[i]);
        near(h[i], share * a * up);
        near(du[i], share * grad * a);
        near(dg[i], share * grad * up * (s + a * (1 - s)));
        want_sum += grad * a * up;
        size += std::abs(grad * a * up);
      }
      EXPECT_NEAR(sum, want_sum, 1e-5 * (size + 1));
      std::vector<T> dg2 = t, du2(n);
      EXPECT_EQ(
          swiglu_backward(g.data(), u.data(), t.data(), share, static_cast<T*>(nullptr), dg2.data(), du2.data(), n),
          static_cast<float>(sum));
      EXPECT_EQ(dg2, dg);
      EXPECT_EQ(du2, du);
    });
  }
}

TEST_F(Swiglu, BackwardEqualsTheFormulaInF32) {
  check_backward<float>(2e-6);
}
TEST_F(Swiglu, BackwardEqualsTheFormulaInBf16) {
  check_backward<uint16_t>(5e-3);
}

TEST_F(Swiglu, NotANumberStaysOne) {
  const float nan = std::nanf(""), one = 1.f;
  for_each_isa([&] {
    float h = 0, dg = 0, du = 0;
    EXPECT_TRUE(std::isnan(swiglu_backward(&nan, &one, &one, 1.f, &h, &dg, &du, 1)));
    EXPECT_TRUE(std::isnan(h) && std::isnan(dg) && std::isnan(du));
  });
}

TEST_F(Swiglu, WeightedSumAddsRows) {
  const int64_t n = 300;
  std::vector<float> a(n), b(n);
  for (int64_t i = 0; i < n; ++i) a[i] = static_cast<float>(i), b[i] = static_cast<float>(-2 * i);
  const float* rows[] = {a.data(), b.data()};
  const float weights[] = {0.5f, 2.f};
  for_each_isa([&] {
    std::vector<float> out(n, 7.f);
    weighted_sum(rows, weights, 2, out.data(), n);
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(out[i], 0.5f * a[i] + 2.f * b[i]);
    weighted_sum(rows, nullptr, 2, out.data(), n);
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(out[i], a[i] + b[i]);
    weighted_sum(rows, weights, 0, out.data(), n);
    EXPECT_EQ(out, std::vector<float>(n, 0.f));
  });
}

}  // namespace
}  // namespace moiety
