#include "moiety/io/golomb.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "moiety/base/error.h"

namespace moiety {
namespace {

constexpr int64_t kWindow = 57;  // bits that are there wherever in a byte reading begins

uint64_t same(uint64_t p1, uint64_t n1, uint64_t p2, uint64_t n2) {
  return (p1 & p2) | (n1 & n2);
}
uint64_t opposite(uint64_t p1, uint64_t n1, uint64_t p2, uint64_t n2) {
  return (p1 & n2) | (n1 & p2);
}

struct Counts {
  int64_t dot = 0, different = 0;
};

[[gnu::always_inline]] inline Counts count(const TernaryMasks& a, const TernaryMasks& b) {
  Counts c;
  for (size_t i = 0; i < a.positive.size(); ++i) {
    const uint64_t p1 = a.positive[i], n1 = a.negative[i], p2 = b.positive[i], n2 = b.negative[i];
    c.dot += std::popcount(same(p1, n1, p2, n2)) - std::popcount(opposite(p1, n1, p2, n2));
    c.different += std::popcount((p1 ^ p2) | (n1 ^ n2));
  }
  return c;
}

Counts count_anywhere(const TernaryMasks& a, const TernaryMasks& b) {
  return count(a, b);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same by the instruction for it.
[[gnu::target("popcnt")]] Counts count_popcnt(const TernaryMasks& a, const TernaryMasks& b) {
  return count(a, b);
}
#endif

Counts compare(const TernaryMasks& a, const TernaryMasks& b) {
  check(a.d == b.d, "signs of {} entries cannot be compared with signs of {}", a.d, b.d);
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool counts = __builtin_cpu_supports("popcnt") != 0;
  if (counts) return count_popcnt(a, b);
#endif
  return count_anywhere(a, b);
}

// Collects bits, the first one in the most significant place of the first byte.
class BitWriter {
 public:
  // The `count` low bits of `value`, at most 57.
  void put(uint64_t value, int64_t count) {
    held_ = held_ << count | value;
    in_hand_ += count;
    total_ += count;
    while (in_hand_ >= 8) {
      in_hand_ -= 8;
      bytes_.push_back(static_cast<std::byte>(held_ >> in_hand_ & 0xff));
    }
  }
  void ones(int64_t count) {
    for (; count > 32; count -= 32) put(0xffffffffu, 32);
    put((uint64_t{1} << count) - 1, count);
  }
  GolombCode finish() {
    if (in_hand_ > 0) bytes_.push_back(static_cast<std::byte>(held_ << (8 - in_hand_) & 0xff));
    return {std::move(bytes_), total_};
  }
  void reserve(double bits) { bytes_.reserve(static_cast<size_t>(bits / 8.0) + 16); }

 private:
  std::vector<std::byte> bytes_;
  uint64_t held_ = 0;  // what was written already stays above in_hand_ and falls off
  int64_t in_hand_ = 0, total_ = 0;
};

template <class Body>
void each_kept(const TernaryMasks& masks, const Body& body) {
  for (size_t w = 0; w < masks.positive.size(); ++w) {
    const uint64_t negative = masks.negative[w];
    for (uint64_t any = masks.positive[w] | negative; any != 0; any &= any - 1) {
      const int bit = std::countr_zero(any);
      body(static_cast<int64_t>(w) * 64 + bit, (negative >> bit & 1) != 0);
    }
  }
}

double share(int64_t kept, int64_t d) {
  check(d >= 0 && kept >= 0 && kept <= d, "{} of {} entries cannot be kept", kept, d);
  return d == 0 ? 0.0 : static_cast<double>(kept) / static_cast<double>(d);
}

}  // namespace

TernaryMasks::TernaryMasks(int64_t entries) : d(entries) {
  check(entries >= 0, "there cannot be {} signs", entries);
  const auto words = static_cast<size_t>(entries / 64 + (entries % 64 != 0 ? 1 : 0));
  positive.resize(words);
  negative.resize(words);
}

int64_t TernaryMasks::kept(int64_t end) const {
  check(end >= 0 && end <= d, "{} of {} entries cannot be counted", end, d);
  int64_t n = 0;
  const auto whole = static_cast<size_t>(end / 64);
  for (size_t i = 0; i < whole; ++i) n += std::popcount(positive[i] | negative[i]);
  if (end % 64 != 0) n += std::popcount((positive[whole] | negative[whole]) & ((uint64_t{1} << end % 64) - 1));
  return n;
}

TernaryMasks ternary_masks(std::span<const int8_t> signs) {
  TernaryMasks out(static_cast<int64_t>(signs.size()));
  for (size_t i = 0; i < signs.size(); ++i) {
    check(signs[i] >= -1 && signs[i] <= 1, "sign {} is {}: it has to be -1, 0 or 1", i, int{signs[i]});
    if (signs[i] != 0) (signs[i] > 0 ? out.positive : out.negative)[i / 64] |= uint64_t{1} << i % 64;
  }
  return out;
}

std::vector<int8_t> ternary_signs(const TernaryMasks& masks) {
  std::vector<int8_t> out(static_cast<size_t>(masks.d));
  each_kept(masks, [&](int64_t i, bool negative) { out[static_cast<size_t>(i)] = negative ? -1 : 1; });
  return out;
}

int64_t ternary_dot(const TernaryMasks& a, const TernaryMasks& b) {
  return compare(a, b).dot;
}

int64_t ternary_hamming(const TernaryMasks& a, const TernaryMasks& b) {
  return compare(a, b).different;
}

double ternary_cosine(const TernaryMasks& a, const TernaryMasks& b) {
  const double both = static_cast<double>(a.kept()) * static_cast<double>(b.kept());
  const auto dot = static_cast<double>(ternary_dot(a, b));
  return both == 0.0 ? 0.0 : dot / std::sqrt(both);
}

int64_t golomb_low_bits(int64_t kept, int64_t d) {
  const double p = share(kept, d);
  if (p == 0.0 || p == 1.0) return 0;
  const double golden = std::log(std::numbers::phi - 1.0);
  return std::max<int64_t>(0, 1 + static_cast<int64_t>(std::floor(std::log2(golden / std::log1p(-p)))));
}

double ternary_entropy_bits(int64_t kept, int64_t d) {
  const double p = share(kept, d);
  const double zeros = p < 1.0 ? (1.0 - p) * std::log2(1.0 - p) : 0.0, others = p > 0.0 ? p * std::log2(p / 2.0) : 0.0;
  return 16.0 - (zeros + others) * static_cast<double>(d);
}

double golomb_expected_bits(int64_t kept, int64_t d) {
  const double p = share(kept, d);
  const auto b = static_cast<double>(golomb_low_bits(kept, d));
  return p == 0.0 ? 0.0 : b + 1.0 / (1.0 - std::pow(1.0 - p, std::exp2(b))) + 1.0;
}

GolombCode golomb_encode(const TernaryMasks& masks, int64_t b, bool signs) {
  check(b >= 0 && b < kWindow, "a gap cannot have {} low bits: 0 to {} are possible", b, kWindow - 1);
  BitWriter out;
  const int64_t kept = masks.kept();
  out.reserve(static_cast<double>(kept) * golomb_expected_bits(kept, masks.d));
  int64_t previous = -1;
  each_kept(masks, [&](int64_t i, bool negative) {
    const auto gap = static_cast<uint64_t>(i - previous - 1);
    previous = i;
    out.ones(static_cast<int64_t>(gap >> b));
    out.put(gap & ((uint64_t{1} << b) - 1), b + 1);  // the zero in front of the low bits
    if (signs) out.put(negative ? 1 : 0, 1);
  });
  return out.finish();
}

GolombReader::GolombReader(std::span<const std::byte> code, int64_t d, int64_t kept, int64_t b, bool signs,
                           std::string where)
    : code_(code),
      d_(d),
      left_(kept),
      b_(b),
      signs_(signs),
      where_(std::move(where)),
      end_(static_cast<int64_t>(code.size()) * 8) {
  check(d >= 0 && kept >= 0 && kept <= d, "{}: {} of {} entries cannot be kept", where_, kept, d);
  check(b >= 0 && b < kWindow, "{}: a gap cannot have {} low bits: 0 to {} are possible", where_, b, kWindow - 1);
}

// The next bits from the most significant place on, at least kWindow of them; zeros behind the end.
uint64_t GolombReader::window() const {
  const auto first = static_cast<size_t>(at_ / 8);
  uint64_t bits = 0;
  for (size_t i = 0; i < 8; ++i)
    bits = bits << 8 | (first + i < code_.size() ? static_cast<uint64_t>(code_[first + i]) : 0);
  return bits << at_ % 8;
}

int64_t GolombReader::quotient() {
  int64_t q = 0;
  for (;;) {
    const int64_t ones = std::min<int64_t>(std::countl_one(window()), kWindow);
    q += ones;
    at_ += ones;
    check(at_ < end_, "{}: the code ends with {} entries to come", where_, left_);
    check(q <= d_ >> b_, "{}: a gap leads beyond the {} entries", where_, d_);
    if (ones < kWindow) break;
  }
  ++at_;  // the zero
  return q;
}

bool GolombReader::next(int64_t& position, bool& negative) {
  if (left_ == 0) {
    check(end_ - at_ < 8 && window() == 0, "{}: {} bits follow the last entry", where_, end_ - at_);
    return false;
  }
  const int64_t high = quotient();
  const uint64_t low = b_ == 0 ? 0 : window() >> (64 - b_);
  at_ += b_;
  const auto step = (static_cast<uint64_t>(high) << b_ | low) + 1;
  check(step <= static_cast<uint64_t>(d_ - 1 - previous_), "{}: a gap leads beyond the {} entries", where_, d_);
  position = previous_ += static_cast<int64_t>(step);
  negative = false;
  if (signs_) {
    negative = (window() >> 63) != 0;
    ++at_;
  }
  check(at_ <= end_, "{}: the code ends with {} entries to come", where_, left_);
  --left_;
  return true;
}

TernaryMasks golomb_decode(std::span<const std::byte> code, int64_t d, int64_t kept, int64_t b, bool signs,
                           const std::string& where) {
  GolombReader reader(code, d, kept, b, signs, where);
  TernaryMasks out(d);
  int64_t position = 0;
  bool negative = false;
  while (reader.next(position, negative))
    (negative ? out.negative : out.positive)[static_cast<size_t>(position / 64)] |= uint64_t{1} << position % 64;
  return out;
}

}  // namespace moiety
