#pragma once
// Named random streams: every use of chance has its own, derived from one seed, so that adding one use changes no
// other. The same numbers on every platform: integer arithmetic and exactly rounded floating point only, no
// std::distribution.
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moiety {

/// xoshiro256** (Blackman and Vigna 2018), its state filled by splitmix64 from a hash of seed and name. Not
/// thread-safe.
class RandomStream {
 public:
  RandomStream(uint64_t seed, std::string_view name);

  uint64_t bits();   ///< 64 random bits
  double uniform();  ///< [0, 1), a multiple of 2^-53
  double uniform(double low, double high);
  double normal();  ///< mean 0, variance 1 (Marsaglia's polar method)
  /// 0 ... n-1, each equally likely (Lemire 2019). n > 0, else Error.
  uint64_t below(uint64_t n);
  bool chance(double probability) { return uniform() < probability; }

  template <class T>
  void shuffle(std::span<T> items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    shuffle(std::span<T>(items));
  }
  std::vector<int64_t> permutation(int64_t n);        ///< 0 ... n-1 in random order
  std::vector<int64_t> sample(int64_t n, int64_t k);  ///< k different of 0 ... n-1, in random order; Error when k > n
  /// k different indices, drawn one after another, each with probability in proportion to its weight among those left
  /// (Efraimidis and Spirakis 2006), in the order drawn. Error for negative, infinite or NaN weights and when fewer
  /// than k are positive.
  std::vector<int64_t> sample_weighted(std::span<const double> weights, int64_t k);

  /// The whole state as text, and back (Error when it is no such text).
  std::string state() const;
  void restore(const std::string& state);

 private:
  uint64_t s_[4];
};

/// The natural logarithm in exactly rounded operations only: the same bits everywhere; within 2 units in the last
/// place. x > 0, finite.
double portable_log(double x);

}  // namespace moiety
