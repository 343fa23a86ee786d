// Compiled without fused multiply-add: results may not depend on the machine.
#include "moiety/base/random.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

uint64_t splitmix(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

constexpr std::string_view state_prefix = "xoshiro256ss";

}  // namespace

RandomStream::RandomStream(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a of the name
  for (char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  uint64_t state = seed;
  state = splitmix(state) ^ hash;
  for (uint64_t& word : s_) word = splitmix(state);
}

uint64_t RandomStream::bits() {
  uint64_t result = std::rotl(s_[1] * 5, 7) * 9;
  uint64_t t = s_[1] << 17;
  s_[2] ^= s_[0];
  s_[3] ^= s_[1];
  s_[1] ^= s_[2];
  s_[0] ^= s_[3];
  s_[2] ^= t;
  s_[3] = std::rotl(s_[3], 45);
  return result;
}

double RandomStream::uniform() {
  return static_cast<double>(bits() >> 11) * 0x1p-53;
}

double RandomStream::uniform(double low, double high) {
  return low + (high - low) * uniform();
}

double RandomStream::normal() {
  for (;;) {
    double x = 2 * uniform() - 1, y = 2 * uniform() - 1;
    double s = x * x + y * y;
    if (s > 0 && s < 1) return x * std::sqrt(-2 * portable_log(s) / s);
  }
}

uint64_t RandomStream::below(uint64_t n) {
  check(n > 0, "cannot draw a number below 0");
  unsigned __int128 product = static_cast<unsigned __int128>(bits()) * n;
  if (static_cast<uint64_t>(product) < n) {
    uint64_t threshold = (0 - n) % n;
    while (static_cast<uint64_t>(product) < threshold) product = static_cast<unsigned __int128>(bits()) * n;
  }
  return static_cast<uint64_t>(product >> 64);
}

std::vector<int64_t> RandomStream::permutation(int64_t n) {
  check(n >= 0, "cannot permute {} things", n);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  shuffle(order);
  return order;
}

std::vector<int64_t> RandomStream::sample(int64_t n, int64_t k) {
  check(k >= 0 && k <= n, "cannot draw {} different things of {}", k, n);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = 0; i < k; ++i) std::swap(order[i], order[i + below(static_cast<uint64_t>(n - i))]);
  order.resize(static_cast<size_t>(k));
  return order;
}

std::vector<int64_t> RandomStream::sample_weighted(std::span<const double> weights, int64_t k) {
  std::vector<std::pair<double, int64_t>> keys;  // an exponential waiting time each: the first k are the sample
  for (size_t i = 0; i < weights.size(); ++i) {
    check(std::isfinite(weights[i]) && weights[i] >= 0, "weight {} is {}; a finite number of at least 0 is right", i,
          weights[i]);
    double u = 1 - uniform();  // drawn for every weight: a zero changes no other draw
    if (weights[i] > 0) keys.emplace_back(-portable_log(u) / weights[i], static_cast<int64_t>(i));
  }
  check(k >= 0 && static_cast<size_t>(k) <= keys.size(), "cannot draw {} of {} things with positive weight", k,
        keys.size());
  std::partial_sort(keys.begin(), keys.begin() + k, keys.end());
  std::vector<int64_t> drawn;
  for (int64_t i = 0; i < k; ++i) drawn.push_back(keys[i].second);
  return drawn;
}

std::string RandomStream::state() const {
  return fmt::format("{}:{:016x}:{:016x}:{:016x}:{:016x}", state_prefix, s_[0], s_[1], s_[2], s_[3]);
}

void RandomStream::restore(const std::string& state) {
  uint64_t words[4];
  bool ok = state.size() == state_prefix.size() + 4 * 17 && state.compare(0, state_prefix.size(), state_prefix) == 0;
  for (int i = 0; ok && i < 4; ++i) {
    std::string word = state.substr(state_prefix.size() + 17 * i, 17);
    ok = word[0] == ':' && word.find_first_not_of("0123456789abcdef", 1) == std::string::npos;
    if (ok) words[i] = std::stoull(word.substr(1), nullptr, 16);
  }
  ok = ok && (words[0] | words[1] | words[2] | words[3]) != 0;
  check(ok, "`{}` is not the state of a random stream; {}: and four 16-digit hexadecimal numbers are right",
        shown(state), state_prefix);
  std::copy(words, words + 4, s_);
}

double portable_log(double x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) with s = (m - 1) / (m + 1), |s| < 0.1716: eleven
  // terms.
  int e = 0;
  double m = std::frexp(x, &e);
  if (m < 0.70710678118654752440) {
    m *= 2;
    e -= 1;
  }
  double s = (m - 1) / (m + 1), z = s * s, series = 0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * z;
  // ln 2 in two parts, the first with zeros at its end: e times it is exact.
  constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  return e * ln2_high + (2 * s + (2 * s * series + e * ln2_low));
}

}  // namespace moiety
