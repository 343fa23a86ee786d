#include "moiety/kernels/scan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "each_isa.h"

namespace moiety {
namespace {

class Scan : public EachIsa {};

struct Numbers {
  int64_t tokens, channels, states;
  std::vector<float> u, dt, a, b, c, h, dy, dh;
  std::vector<ScanToken> what;

  Numbers(int64_t t, int64_t d, int64_t n) : tokens(t), channels(d), states(n) {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> even(0.01f, 0.5f);
    const auto fill = [&](std::vector<float>& v, int64_t count, auto& from, float scale = 1.f) {
      v.resize(static_cast<size_t>(count));
      for (float& x : v) x = scale * from(engine);
    };
    fill(u, t * d, normal);
    fill(dt, t * d, even);
    fill(a, n * d, even, -4.f);
    fill(b, t * n, normal);
    fill(c, t * n, normal);
    fill(h, n * d, normal);
    fill(dy, t * d, normal);
    fill(dh, n * d, normal);
    for (int64_t i = 0; i < t; ++i) what.push_back(static_cast<ScanToken>(i % 7 == 3 ? 2 : i % 11 == 5 ? 1 : 0));
  }
  ScanRow row() const {
    return {tokens, channels, states, u.data(), dt.data(), a.data(), b.data(), c.data(), what.data()};
  }
};

// y and the last state by the definition, in f64.
std::pair<std::vector<double>, std::vector<double>> by_definition(const Numbers& x) {
  std::vector<double> y(x.u.size()), h(x.h.begin(), x.h.end());
  for (int64_t t = 0; t < x.tokens; ++t) {
    const ScanToken what = x.what[static_cast<size_t>(t)];
    if (what == ScanToken::skip) continue;
    for (int64_t n = 0; n < x.states; ++n)
      for (int64_t d = 0; d < x.channels; ++d) {
        const double dt = x.dt[t * x.channels + d], u = x.u[t * x.channels + d];
        double& s = h[n * x.channels + d];
        if (what == ScanToken::fresh) s = 0;
        s = std::exp(dt * x.a[n * x.channels + d]) * s + dt * u * x.b[t * x.states + n];
        y[t * x.channels + d] += x.c[t * x.states + n] * s;
      }
  }
  return {y, h};
}

double loss(const Numbers& x) {
  const auto [y, h] = by_definition(x);
  double sum = 0;
  for (size_t i = 0; i < y.size(); ++i) sum += y[i] * x.dy[i];
  for (size_t i = 0; i < h.size(); ++i) sum += h[i] * x.dh[i];
  return sum;
}

TEST_F(Scan, EqualsTheDefinition) {
  for (const int64_t channels : {1, 16, 37}) {
    const Numbers x(70, channels, 3);
    const auto [y, h] = by_definition(x);
    for_each_isa([&] {
      std::vector<float> got(y.size()), state = x.h;
      scan(x.row(), 0, channels, state.data(), got.data(), nullptr);
      for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(got[i], y[i], 1e-5 * (1 + std::abs(y[i])));
      for (size_t i = 0; i < h.size(); ++i) ASSERT_NEAR(state[i], h[i], 1e-5 * (1 + std::abs(h[i])));
    });
  }
}

TEST_F(Scan, BackwardHasTheGradientsOfTheDefinition) {
  const int64_t tokens = 40, channels = 21, states = 2;
  Numbers x(tokens, channels, states);
  for_each_isa([&] {
    std::vector<float> y(x.u.size()), state = x.h, kept(2 * states * channels), scratch(scan_scratch(states));
    scan(x.row(), 0, channels, state.data(), y.data(), kept.data());
    std::vector<float> du(x.u.size()), ddt(x.u.size()), da(x.a.size()), db(x.b.size()), dc(x.c.size()), dh = x.dh;
    scan_backward(x.row(), 0, channels, x.dy.data(), kept.data(), dh.data(),
                  {du.data(), ddt.data(), da.data(), db.data(), dc.data()}, scratch.data());
    const auto compare = [&](std::vector<float>& values, const std::vector<float>& got) {
      for (size_t i = 0; i < values.size(); i += 5) {
        const float held = values[i], step = 1e-3f;
        values[i] = held + step;
        const double above = values[i], up = loss(x);
        values[i] = held - step;
        const double below = values[i], down = loss(x);
        values[i] = held;
        const double want = (up - down) / (above - below);
        // The second difference of a step of 1e-3, and sums of 40 tokens in f32.
        ASSERT_NEAR(got[i], want, 1e-4 * (1 + std::abs(want))) << i;
      }
    };
    compare(x.u, du);
    compare(x.dt, ddt);
    compare(x.a, da);
    compare(x.b, db);
    compare(x.c, dc);
    compare(x.h, dh);
  });
}

}  // namespace
}  // namespace moiety
