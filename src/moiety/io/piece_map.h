#pragma once
// Hash map from byte strings to non-negative ids. It keeps no copies: the bytes of the keys must outlive it.
#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace moiety {

inline uint64_t hash_bytes(std::string_view s) {
  constexpr uint64_t k = 0x9E3779B97F4A7C15ull;
  uint64_t h = s.size() * k;
  const char* p = s.data();
  size_t n = s.size();
  const auto mix = [&](uint64_t v) {
    h = (h ^ v) * k;
    h ^= h >> 32;
  };
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    mix(v);
  }
  uint64_t v = 0;
  std::memcpy(&v, p, n);
  mix(v);
  return h * k ^ (h >> 29);
}

class PieceMap {
 public:
  void reserve(size_t n) { grow(std::bit_ceil(n * 2 + 16)); }
  size_t size() const { return size_; }

  /// The id of `key`, -1 when it has none.
  int32_t find(std::string_view key) const {
    if (slots_.empty()) return -1;
    const uint64_t h = hash_bytes(key);
    const size_t mask = slots_.size() - 1;
    const auto tag = static_cast<uint32_t>(h >> 32);
    for (size_t i = h & mask;; i = (i + 1) & mask) {
      const Slot& s = slots_[i];
      if (s.id < 0) return -1;
      if (s.tag == tag && s.size == key.size() && std::memcmp(s.data, key.data(), key.size()) == 0) return s.id;
    }
  }

  /// False when the key was there: it then keeps its id, or takes the new one with `replace`.
  bool insert(std::string_view key, int32_t id, bool replace = false) {
    if (slots_.size() < size_ * 2 + 16) grow(std::bit_ceil(size_ * 4 + 16));
    const uint64_t h = hash_bytes(key);
    const size_t mask = slots_.size() - 1;
    const auto tag = static_cast<uint32_t>(h >> 32);
    for (size_t i = h & mask;; i = (i + 1) & mask) {
      Slot& s = slots_[i];
      if (s.id < 0) {
        s = {key.data(), static_cast<uint32_t>(key.size()), tag, id};
        ++size_;
        return true;
      }
      if (s.tag == tag && s.size == key.size() && std::memcmp(s.data, key.data(), key.size()) == 0) {
        if (replace) s.id = id;
        return false;
      }
    }
  }

 private:
  struct Slot {
    const char* data = nullptr;
    uint32_t size = 0;
    uint32_t tag = 0;
    int32_t id = -1;
  };
  void grow(size_t capacity) {
    if (capacity <= slots_.size()) return;
    std::vector<Slot> old(capacity);
    old.swap(slots_);
    size_ = 0;
    for (const Slot& s : old)
      if (s.id >= 0) insert({s.data, s.size}, s.id);
  }
  std::vector<Slot> slots_;
  size_t size_ = 0;
};

/// Hash map from a pair of ids to a merge.
class MergeMap {
 public:
  struct Merge {
    uint32_t rank, id;
  };
  void reserve(size_t n) { slots_.assign(std::bit_ceil(n * 2 + 16), Slot{}); }
  size_t size() const { return size_; }

  const Merge* find(uint32_t left, uint32_t right) const {
    const uint64_t key = uint64_t{left} << 32 | right;
    const size_t mask = slots_.size() - 1;
    for (size_t i = hash(key) & mask;; i = (i + 1) & mask) {
      if (slots_[i].key == key) return &slots_[i].merge;
      if (slots_[i].key == kEmpty) return nullptr;
    }
  }
  /// A later merge of the same pair replaces the earlier. Needs room: call reserve() first.
  void insert(uint32_t left, uint32_t right, Merge merge) {
    const uint64_t key = uint64_t{left} << 32 | right;
    const size_t mask = slots_.size() - 1;
    for (size_t i = hash(key) & mask;; i = (i + 1) & mask) {
      if (slots_[i].key == kEmpty) ++size_;
      if (slots_[i].key == kEmpty || slots_[i].key == key) {
        slots_[i] = {key, merge};
        return;
      }
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge{};
  };
  static uint64_t hash(uint64_t key) {
    key *= 0x9E3779B97F4A7C15ull;
    return key ^ (key >> 32);
  }
  std::vector<Slot> slots_ = std::vector<Slot>(16);
  size_t size_ = 0;
};

}  // namespace moiety
