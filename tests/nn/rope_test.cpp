// Rotary angles against the published formulas, written out here in another form than the library's.
#include "moiety/nn/rope.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <numbers>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

RopeConfig config(const std::string& type, json parameters = json::object()) {
  RopeConfig c;
  c.type = type;
  c.parameters = std::move(parameters);
  c.head_dim = 16;
  c.theta = 10000.0;
  c.max_positions = 4096;
  return c;
}

struct Measured {
  std::vector<double> frequency;
  double factor;
};

// What the angles of position 1 say when the longest position is `length` - 1.
Measured measure(const Rope& rope, int64_t length = 2) {
  const auto [c, s] = rope.angles(torch::tensor({{int64_t{1}, length - 1}}));
  Measured m{{}, 0.0};
  for (int64_t i = 0; i < rope.dim() / 2; ++i) {
    const double x = c[0][0][0][i].item<double>(), y = s[0][0][0][i].item<double>();
    m.frequency.push_back(std::atan2(y, x));
    m.factor = std::hypot(x, y);
    EXPECT_NEAR(m.factor, std::hypot(c[0][0][0][0].item<double>(), s[0][0][0][0].item<double>()), 1e-6);
  }
  return m;
}

// f32 arithmetic: a few units in the last place, relative to the frequency.
void expect_frequencies(const Measured& m, const std::vector<double>& expected) {
  ASSERT_EQ(m.frequency.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_NEAR(m.frequency[i] / expected[i], 1.0, 2e-6) << "frequency " << i;
}

// theta^(-2i/d) by repeated division.
std::vector<double> plain(double theta, int64_t d) {
  std::vector<double> f(d / 2);
  const double ratio = std::exp(-2.0 * std::log(theta) / static_cast<double>(d));
  f[0] = 1.0;
  for (size_t i = 1; i < f.size(); ++i) f[i] = f[i - 1] * ratio;
  return f;
}

TEST(Rope, Default) {
  const auto m = measure(Rope(config("default")));
  expect_frequencies(m, plain(10000.0, 16));
  EXPECT_NEAR(m.factor, 1.0, 1e-6);
}

TEST(Rope, AnglesGrowWithThePosition) {
  const Rope rope(config("default"));
  const auto positions = torch::tensor({{0, 5, 100}, {7, 7, 3000}}, torch::kInt64);
  const auto [c, s] = rope.angles(positions);
  ASSERT_EQ(c.sizes(), (std::vector<int64_t>{2, 1, 3, 8}));
  const auto f = plain(10000.0, 16);
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 3; ++t)
      for (int64_t i = 0; i < 8; ++i) {
        // The angle is rounded to f32 before the sine: its last place is 3000 * 2^-24.
        const double angle = positions[b][t].item<double>() * f[i], tolerance = 1e-6 + angle * 3e-7;
        EXPECT_NEAR(c[b][0][t][i].item<double>(), std::cos(angle), tolerance);
        EXPECT_NEAR(s[b][0][t][i].item<double>(), std::sin(angle), tolerance);
      }
}

TEST(Rope, Linear) {
  auto expected = plain(10000.0, 16);
  for (double& f : expected) f /= 4.0;
  expect_frequencies(measure(Rope(config("linear", {{"factor", 4.0}}))), expected);
}

TEST(Rope, DynamicChangesOnlyBeyondTheTrainedLength) {
  const Rope rope(config("dynamic", {{"factor", 2.0}}));
  expect_frequencies(measure(rope, 4096), plain(10000.0, 16));
  // NTK: theta' = theta * (factor * L / L0 - (factor - 1))^(d / (d - 2)); L / L0 = 3 gives 2 * 3 - 1 = 5.
  expect_frequencies(measure(rope, 3 * 4096), plain(10000.0 * std::pow(5.0, 16.0 / 14.0), 16));
}

TEST(Rope, Llama3) {
  auto c = config("llama3", {{"factor", 8.0},
                             {"low_freq_factor", 1.0},
                             {"high_freq_factor", 4.0},
                             {"original_max_position_embeddings", 256}});
  auto expected = plain(10000.0, 16);
  int kept = 0, divided = 0, between = 0;
  for (double& f : expected) {
    // Turns made within the old context: at most 1: divided by the factor, at least 4: kept, linear between.
    const double turns = 256.0 * f / (2.0 * std::numbers::pi), share = std::clamp((turns - 1.0) / 3.0, 0.0, 1.0);
    (share == 1.0 ? kept : share == 0.0 ? divided : between) += 1;
    f *= share + (1.0 - share) / 8.0;
  }
  EXPECT_TRUE(kept > 0 && divided > 0 && between > 0);
  expect_frequencies(measure(Rope(c)), expected);
}

// The ramp runs over feature pairs: from the last that turns at least beta_fast times within the old context to the
// first that turns at most beta_slow times.
std::vector<double> yarn(double theta, int64_t d, double factor, double old, double fast, double slow, bool whole) {
  const auto turns = [&](double i) {
    return old * std::pow(theta, -2.0 * i / static_cast<double>(d)) / 2.0 / std::numbers::pi;
  };
  double low = 0.0, high = static_cast<double>(d) - 1.0;
  const double step = whole ? 1.0 : 1e-5;
  const auto steps = static_cast<int64_t>(high / step);
  for (int64_t i = 0; i <= steps; ++i)
    if (turns(static_cast<double>(i) * step) >= fast) low = static_cast<double>(i) * step;
  for (int64_t i = steps; i >= 0; --i)
    if (turns(static_cast<double>(i) * step) <= slow) high = static_cast<double>(i) * step;
  auto f = plain(theta, d);
  for (size_t i = 0; i < f.size(); ++i) {
    const double stretched = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    f[i] = f[i] * (1.0 - stretched) + f[i] / factor * stretched;
  }
  return f;
}

TEST(Rope, Yarn) {
  auto c = config("yarn", {{"factor", 16.0}, {"original_max_position_embeddings", 4096}});
  c.head_dim = 64;
  const auto m = measure(Rope(c));
  expect_frequencies(m, yarn(10000.0, 64, 16.0, 4096.0, 32.0, 1.0, true));
  EXPECT_NEAR(m.factor, 0.1 * std::log(16.0) + 1.0, 1e-6);
}

TEST(Rope, YarnOptions) {
  auto c = config("yarn", {{"factor", 32.0},
                           {"original_max_position_embeddings", 4096},
                           {"beta_fast", 24.0},
                           {"beta_slow", 2.0},
                           {"truncate", false},
                           {"mscale", 0.7},
                           {"mscale_all_dim", 0.5}});
  c.head_dim = 64;
  c.theta = 150000.0;
  const auto m = measure(Rope(c));
  const auto expected = yarn(150000.0, 64, 32.0, 4096.0, 24.0, 2.0, false);
  for (size_t i = 0; i < expected.size(); ++i)  // the ends of the ramp are searched in steps of 1e-5 here
    EXPECT_NEAR(m.frequency[i] / expected[i], 1.0, 3e-5) << "frequency " << i;
  EXPECT_NEAR(m.factor, (0.07 * std::log(32.0) + 1.0) / (0.05 * std::log(32.0) + 1.0), 1e-6);
  c.parameters["attention_factor"] = 1.5;
  EXPECT_NEAR(measure(Rope(c)).factor, 1.5, 1e-6);
}

TEST(Rope, YarnTakesItsFactorFromTheLengths) {
  auto c = config("yarn", {{"original_max_position_embeddings", 1024}});
  c.head_dim = 64;
  expect_frequencies(measure(Rope(c)), yarn(10000.0, 64, 4.0, 1024.0, 32.0, 1.0, true));
}

json long_parameters() {
  json p = {{"original_max_position_embeddings", 1024}, {"short_mscale", 1.25}, {"long_mscale", 1.75}};
  for (int i = 0; i < 8; ++i) {
    p["short_factor"].push_back(1.0 + 0.125 * i);
    p["long_factor"].push_back(2.0 + i);
  }
  return p;
}

TEST(Rope, LongRopeChoosesFactorsByLength) {
  for (const char* name : {"longrope", "su"}) {
    const Rope rope(config(name, long_parameters()));
    auto near = plain(10000.0, 16), far = near;
    for (int i = 0; i < 8; ++i) {
      near[i] /= 1.0 + 0.125 * i;
      far[i] /= 2.0 + i;
    }
    expect_frequencies(measure(rope, 1024), near);
    expect_frequencies(measure(rope, 1025), far);
    // 4096 / 1024 = 4 times the trained length.
    EXPECT_NEAR(measure(rope, 1025).factor, std::sqrt(1.0 + std::log(4.0) / std::log(1024.0)), 1e-6);
  }
}

TEST(Rope, LongRopeScaledByLengthKeepsTheShortFactors) {
  auto c = config("longrope", long_parameters());
  c.scale_by_length = true;
  const Rope rope(c);
  auto near = plain(10000.0, 16);
  for (int i = 0; i < 8; ++i) near[i] /= 1.0 + 0.125 * i;
  const auto before = measure(rope, 1024), after = measure(rope, 1025);
  expect_frequencies(before, near);
  expect_frequencies(after, near);
  EXPECT_NEAR(before.factor, 1.25, 1e-6);
  EXPECT_NEAR(after.factor, 1.75, 1e-6);
}

TEST(Rope, DivisorsOfAFile) {
  auto c = config("default");
  auto expected = plain(10000.0, 16);
  for (int i = 0; i < 8; ++i) {
    c.frequency_divisors.push_back(1.0f + static_cast<float>(i));
    expected[i] /= 1.0 + i;
  }
  expect_frequencies(measure(Rope(c)), expected);
  c.frequency_divisors.pop_back();
  EXPECT_THROW(Rope{c}, Error);
}

TEST(Rope, BadConfigurationsAreErrors) {
  EXPECT_THROW(Rope(config("linear")), Error);
  EXPECT_THROW(Rope(config("linear", {{"factor", "four"}})), Error);
  EXPECT_THROW(Rope(config("dynamic")), Error);
  EXPECT_THROW(Rope(config("llama3", {{"factor", 8.0}})), Error);
  EXPECT_THROW(Rope(config("yarn", {{"factor", "x"}})), Error);
  EXPECT_THROW(Rope(config("yarn", {{"factor", 2.0}, {"truncate", 3}})), Error);
  EXPECT_THROW(Rope(config("longrope", {{"short_factor", {1.0, 2.0}}})), Error);
  EXPECT_THROW(Rope(config("longrope", {{"short_factor", json::array({1, 1, 1, 1, 1, 1, 1, "x"})}})), Error);
  EXPECT_THROW(Rope(config("spiral")), Error);
  auto odd = config("default");
  odd.head_dim = 7;
  EXPECT_THROW(Rope{odd}, Error);
  auto none = config("default");
  none.partial = 0.0;
  EXPECT_THROW(Rope{none}, Error);
}

// x as complex numbers times exp(i * angle).
Tensor turned(const Tensor& real, const Tensor& imaginary, const std::pair<Tensor, Tensor>& angles, bool take_real) {
  const auto z = torch::complex(real, imaginary) * torch::complex(angles.first, angles.second);
  return take_real ? torch::real(z) : torch::imag(z);
}

TEST(Rope, HalvesAndNeighboursAreComplexMultiplication) {
  torch::manual_seed(1);
  const auto x = torch::randn({2, 3, 5, 16});
  const auto positions = torch::arange(10, torch::kInt64).view({2, 5}) * 3;
  auto c = config("default");
  const Rope halves(c);
  auto angles = halves.angles(positions);
  const auto a = x.narrow(-1, 0, 8), b = x.narrow(-1, 8, 8);
  const auto y = halves.rotate(x, angles);
  EXPECT_LT((y.narrow(-1, 0, 8) - turned(a, b, angles, true)).abs().max().item<double>(), 1e-6);
  EXPECT_LT((y.narrow(-1, 8, 8) - turned(a, b, angles, false)).abs().max().item<double>(), 1e-6);
  c.interleaved = true;
  const Rope neighbours(c);
  angles = neighbours.angles(positions);
  const auto even = x.slice(-1, 0, 16, 2), odd = x.slice(-1, 1, 16, 2);
  const auto z = neighbours.rotate(x, angles);
  EXPECT_LT((z.slice(-1, 0, 16, 2) - turned(even, odd, angles, true)).abs().max().item<double>(), 1e-6);
  EXPECT_LT((z.slice(-1, 1, 16, 2) - turned(even, odd, angles, false)).abs().max().item<double>(), 1e-6);
}

TEST(Rope, PartialLeavesTheRestAlone) {
  torch::manual_seed(2);
  const auto x = torch::randn({1, 2, 4, 16});
  auto c = config("default");
  c.partial = 0.25;
  const Rope rope(c);
  EXPECT_EQ(rope.dim(), 4);
  const auto angles = rope.angles(torch::arange(4, torch::kInt64).unsqueeze(0));
  const auto y = rope.rotate(x, angles);
  EXPECT_TRUE(torch::equal(y.narrow(-1, 4, 12), x.narrow(-1, 4, 12)));
  // The rotated part is a rope of its own size.
  auto small = config("default");
  small.head_dim = 4;
  const Rope alone(small);
  EXPECT_TRUE(torch::equal(y.narrow(-1, 0, 4), alone.rotate(x.narrow(-1, 0, 4).contiguous(), angles)));
  EXPECT_FALSE(torch::equal(y.narrow(-1, 0, 4), x.narrow(-1, 0, 4)));
}

RC_GTEST_PROP(Rope, ProductsDependOnTheDistanceOnly, ()) {
  const auto distance = *rc::gen::inRange<int64_t>(0, 50), shift = *rc::gen::inRange<int64_t>(0, 500);
  auto c = config("default");
  c.interleaved = *rc::gen::arbitrary<bool>();
  const Rope rope(c);
  torch::manual_seed(*rc::gen::inRange<uint64_t>(0, 1000));
  const auto q = torch::randn({1, 1, 1, 16}), k = torch::randn({1, 1, 1, 16});
  const auto product = [&](int64_t at) {
    return (rope.rotate(q, rope.angles(torch::tensor({{at + distance}}))) *
            rope.rotate(k, rope.angles(torch::tensor({{at}}))))
        .sum()
        .item<double>();
  };
  // Angles up to 550 carry 550 * 2^-24 of rounding, products are of size 16.
  RC_ASSERT(std::abs(product(0) - product(shift)) < 1e-3);
}

// In f64 the rotation is a composite of torch's operations.
TEST(Rope, KernelsEqualTheCompositeAndItsGradient) {
  torch::manual_seed(1);
  for (const bool interleaved : {false, true})
    for (const double partial : {1.0, 0.5}) {
      auto c = config("default");
      c.interleaved = interleaved;
      c.partial = partial;
      const Rope rope(c);
      const auto positions = torch::tensor({{3, 4, 5}, {0, 1, 2}});
      const auto angles = rope.angles(positions);
      const auto x = torch::randn({2, 3, 4, 16}), dy = torch::randn({2, 4, 3, 16});  // as projections give them
      const auto run = [&](torch::Dtype type) {
        const auto from = x.to(type).clone().requires_grad_(true);
        const auto y = rope.rotate(from.transpose(1, 2), angles);
        y.backward(dy.to(type));
        return std::pair(y.detach().to(torch::kFloat64), from.grad().to(torch::kFloat64));
      };
      const auto want = run(torch::kFloat64), got = run(torch::kFloat32), half = run(torch::kBFloat16);
      EXPECT_LT((got.first - want.first).abs().max().item<double>(), 1e-6);
      EXPECT_LT((got.second - want.second).abs().max().item<double>(), 1e-6);
      EXPECT_LT((half.first - want.first).abs().max().item<double>(), 0.03);
      EXPECT_LT((half.second - want.second).abs().max().item<double>(), 0.03);
    }
}

}  // namespace
}  // namespace moiety
