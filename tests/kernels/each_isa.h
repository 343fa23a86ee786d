#pragma once
// What tests of kernels share.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "moiety/kernels/cpu.h"

namespace moiety {

/// Runs a test's body once with every instruction set of this machine.
class EachIsa : public testing::Test {
 protected:
  void TearDown() override { set_isa(best_isa()); }
  template <class F>
  static void for_each_isa(const F& f) {
    for (Isa each : {Isa::Portable, Isa::Avx2, Isa::Avx512})
      if (each <= best_isa()) {
        SCOPED_TRACE(std::string(isa_name(each)));
        set_isa(each);
        f();
      }
  }
};

inline std::vector<float> gaussian(size_t n, unsigned seed, float scale = 1.f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.f, scale);
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

}  // namespace moiety
