#include "moiety/kernels/matmul.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "each_isa.h"
#include "elements.h"

namespace moiety {
namespace {

class Matmul : public EachIsa {
 protected:
  // Against sums in f64 of what `T` has of both operands. `rounding`: of the output, relative.
  template <class T, class Right, class Out>
  static void check_products(double rounding);
};

template <class T, class Right, class Out>
void Matmul::check_products(double rounding) {
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  const auto filled = [&](int64_t n, auto of_type) {
    std::vector<decltype(of_type)> v(static_cast<size_t>(n));
    for (auto& x : v) set(x, normal(engine));
    return v;
  };
  const auto used = [](auto x) {
    T as;
    set(as, value(x));
    return static_cast<double>(value(as));
  };
  struct Shape {
    int64_t m, n, k;
  };
  // Tiles are 14 x 32 or 6 x 16, blocks 196 or 192 rows, depths 512 or 256 units: below, at and above each of them.
  for (const auto [m, n, k] : {Shape{1, 1, 1},
                               {6, 16, 8},
                               {7, 17, 9},
                               {5, 15, 257},
                               {14, 32, 16},
                               {13, 31, 17},
                               {15, 33, 1},
                               {28, 16, 33},
                               {3, 70, 512},
                               {193, 9, 256},
                               {197, 5, 3},
                               {210, 40, 30},
                               {5, 18, 1025},
                               {16, 47, 1700}}) {
    for (int kind = 0; kind < 16; ++kind) {
      const bool at = kind & 1, bt = kind & 2, gathered = kind & 4, add = kind & 8;
      // Twice the lines, of which the gathered ones are odd and backwards; a stride longer than a line.
      const int64_t a_lines = at ? k : m, a_length = at ? m : k, b_lines = bt ? n : k, b_length = bt ? k : n, gap = 3;
      const auto a = filled(2 * a_lines * (a_length + gap), T());
      const auto b = filled(2 * b_lines * (b_length + gap), Right());
      std::vector<int64_t> a_index, b_index;
      for (int64_t i = a_lines - 1; i >= 0; --i) a_index.push_back(2 * i + 1);
      for (int64_t i = b_lines - 1; i >= 0; --i) b_index.push_back(2 * i + 1);
      const MatrixView<T> A{a.data(), a_length + gap, at, gathered ? a_index.data() : nullptr};
      const MatrixView<Right> B{b.data(), b_length + gap, bt, gathered ? b_index.data() : nullptr};
      const auto before = filled(m * (n + 2), Out());
      for_each_isa([&] {
        auto out = before;
        matmul(m, n, k, A, B, out.data(), n + 2, add);
        double worst = 0;
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            double sum = add ? value(before[i * (n + 2) + j]) : 0.0, size = std::abs(sum);
            for (int64_t p = 0; p < k; ++p) {
              const double product = used(at ? A.line(p)[i] : A.line(i)[p]) * used(bt ? B.line(j)[p] : B.line(p)[j]);
              sum += product;
              size += std::abs(product);
            }
            const double allowed = rounding * std::abs(sum) + 1e-6 * size;
            worst = std::max(worst, std::abs(value(out[i * (n + 2) + j]) - sum) / allowed);
          }
          for (int64_t j = n; j < n + 2; ++j) ASSERT_EQ(out[i * (n + 2) + j], before[i * (n + 2) + j]);
        }
        EXPECT_LE(worst, 1.0) << m << " x " << n << " x " << k << ", kind " << kind;
      });
    }
  }
}

TEST_F(Matmul, EqualsSumsInF32) {
  check_products<float, float, float>(1e-7);
}
TEST_F(Matmul, EqualsSumsInBf16) {
  check_products<uint16_t, uint16_t, uint16_t>(std::exp2(-8));
}
TEST_F(Matmul, LeavesSumsOfBf16InF32) {
  check_products<uint16_t, uint16_t, float>(1e-7);
}
TEST_F(Matmul, RoundsTheRightOperandToBf16) {
  check_products<uint16_t, float, uint16_t>(std::exp2(-8));
  check_products<uint16_t, float, float>(1e-7);
}

TEST_F(Matmul, NoDepthGivesZerosOrWhatWasThere) {
  const float one = 1.f;
  for_each_isa([&] {
    float out[2] = {5.f, 6.f};
    matmul(1, 2, 0, {&one, 1}, {&one, 1}, out, 2, true);
    EXPECT_EQ(out[1], 6.f);
    matmul(1, 2, 0, {&one, 1}, {&one, 1}, out, 2);
    EXPECT_EQ(out[0], 0.f);
    matmul(0, 2, 1, {&one, 1}, {&one, 1}, nullptr, 2);
  });
}

TEST_F(Matmul, InfinityAndNotANumberStay) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float x : {inf, std::nanf("")}) {
    for_each_isa([&] {
      float a[2] = {x, 1.f}, b[2] = {1.f, 1.f}, out = 0.f;
      matmul(1, 1, 2, {a, 2}, {b, 1}, &out, 1);
      EXPECT_EQ(std::isnan(out), std::isnan(x));
      EXPECT_EQ(std::isinf(out), std::isinf(x));
      uint16_t a16[2] = {float_to_bf16(x), float_to_bf16(1.f)}, b16[2] = {float_to_bf16(1.f), float_to_bf16(1.f)}, o16;
      matmul(1, 1, 2, {a16, 2}, {b16, 1}, &o16, 1);
      EXPECT_EQ(std::isnan(bf16_to_float(o16)), std::isnan(x));
      EXPECT_EQ(std::isinf(bf16_to_float(o16)), std::isinf(x));
    });
  }
}

}  // namespace
}  // namespace moiety
