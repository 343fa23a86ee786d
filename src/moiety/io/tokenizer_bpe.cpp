// Byte-pair encoding: by rank of merge (tokenizers) and by score of the merged piece (SentencePiece).
#include <algorithm>
#include <array>
#include <utility>

#include "moiety/io/tokenizer_parts.h"
#include "moiety/io/unicode.h"

namespace moiety::tokenizer {
namespace {

constexpr size_t kCacheSlots = 1 << 14;
constexpr size_t kCachedBytes = 128;
constexpr std::string_view kMetaspace = "\xE2\x96\x81";  // U+2581

/// Ids of <0x00> ... <0xFF>, -1 where the vocabulary has none.
std::array<int32_t, 256> byte_pieces(const Vocabulary& vocabulary) {
  std::array<int32_t, 256> out{};
  for (int b = 0; b < 256; ++b) out[static_cast<size_t>(b)] = vocabulary.ids.find(fmt::format("<0x{:02X}>", b));
  return out;
}

/// Text of tokenizers without a pre-tokenizer is one long word. It may be cut before a U+2581 wherever no piece of the
/// vocabulary reaches across, which changes nothing but makes the words short enough to be cached.
class Cutter {
 public:
  explicit Cutter(const Vocabulary& vocabulary) {
    if (vocabulary.ids.find(kMetaspace) < 0) return;
    on_ = true;
    for (const auto piece : vocabulary.pieces)
      for (size_t at = 1; at < piece.size() && (at = piece.find(kMetaspace, at)) != std::string_view::npos; ++at) {
        // Pieces are bytes of unknown origin here: the byte before is enough of a key.
        crossing_[static_cast<unsigned char>(piece[at - 1])] = true;
      }
  }
  void off() { on_ = false; }

  template <class F>
  void words(std::string_view text, F&& f) const {
    size_t begin = 0;
    if (on_)
      for (size_t at = 1; (at = text.find(kMetaspace, at)) != std::string_view::npos; ++at)
        if (at > begin && !crossing_[static_cast<unsigned char>(text[at - 1])]) {
          f(text.substr(begin, at - begin));
          begin = at;
        }
    if (begin < text.size()) f(text.substr(begin));
  }

 private:
  bool on_ = false;
  std::array<bool, 256> crossing_{};
};

/// Looks the word up in the cache, or computes it with `f(ids)` and keeps it.
template <class F>
void cached(std::string_view word, Scratch& scratch, std::vector<int64_t>& out, F&& f) {
  if (word.size() > kCachedBytes) {
    f(out);
    return;
  }
  if (scratch.cache.empty()) scratch.cache.resize(kCacheSlots);
  auto& slot = scratch.cache[hash_bytes(word) >> 20 & (kCacheSlots - 1)];
  if (slot.word == word) {
    out.insert(out.end(), slot.ids.begin(), slot.ids.end());
    return;
  }
  const size_t before = out.size();
  f(out);
  slot.word = word;
  slot.ids.assign(out.begin() + static_cast<std::ptrdiff_t>(before), out.end());
}

void link(std::vector<Scratch::Symbol>& symbols) {
  const auto n = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < n; ++i) {
    symbols[static_cast<size_t>(i)].prev = i - 1;
    symbols[static_cast<size_t>(i)].next = i + 1 < n ? i + 1 : -1;
  }
}

/// Takes the symbol behind `left` into it.
void absorb(std::vector<Scratch::Symbol>& symbols, int32_t left, int32_t id) {
  auto& a = symbols[static_cast<size_t>(left)];
  auto& b = symbols[static_cast<size_t>(a.next)];
  a.id = id;
  a.size += b.size;
  b.size = 0;
  a.next = b.next;
  if (a.next >= 0) symbols[static_cast<size_t>(a.next)].prev = left;
}

class Bpe : public Model {
 public:
  Bpe(const Vocabulary& vocabulary, const Merges& merges, BpeOptions options, const std::string& where)
      : vocabulary_(vocabulary), options_(std::move(options)), bytes_(byte_pieces(vocabulary)), cutter_(vocabulary) {
    check(vocabulary.pieces.size() <= INT32_MAX && merges.size() <= INT32_MAX, "{}: too many pieces or merges.", where);
    if (!options_.unk.empty()) unk_ = vocabulary.ids.find(options_.unk);
    if (!options_.prefix.empty() || !options_.suffix.empty() || options_.ignore_merges) cutter_.off();
    merges_.reserve(merges.size());
    std::string joined;
    for (size_t i = 0; i < merges.size(); ++i) {
      const auto [a, b] = merges[i];
      const int32_t left = vocabulary.ids.find(a), right = vocabulary.ids.find(b);
      check(left >= 0 && right >= 0, "{}: merge {} joins \"{}\" and \"{}\", but \"{}\" is not in the vocabulary.",
            where, i, a, b, left < 0 ? a : b);
      check(b.size() >= options_.prefix.size(),
            "{}: merge {} has \"{}\" on the right, which is shorter than continuing_subword_prefix \"{}\".", where, i,
            b, options_.prefix);
      joined.assign(a).append(b.substr(options_.prefix.size()));
      const int32_t id = vocabulary.ids.find(joined);
      check(id >= 0, "{}: merge {} gives \"{}\", which is not in the vocabulary.", where, i, joined);
      merges_.insert(static_cast<uint32_t>(left), static_cast<uint32_t>(right),
                     {static_cast<uint32_t>(i), static_cast<uint32_t>(id)});
    }
    where_ = where;
  }

  void tokenize(std::string_view word, Scratch& scratch, std::vector<int64_t>& out) const override {
    cutter_.words(word, [&](std::string_view w) {
      cached(w, scratch, out, [&](std::vector<int64_t>& ids) { encode(w, scratch, ids); });
    });
  }

 private:
  void encode(std::string_view word, Scratch& scratch, std::vector<int64_t>& out) const {
    if (options_.ignore_merges)
      if (const int32_t id = vocabulary_.ids.find(word); id >= 0) {
        out.push_back(id);
        return;
      }
    check(word.size() < INT32_MAX, "{}: a word of {} bytes is too long.", where_, word.size());
    split(word, scratch);
    link(scratch.symbols);
    if (scratch.symbols.size() <= 24)
      merge_few(scratch.symbols);
    else
      merge_many(scratch);
    for (const auto& s : scratch.symbols)
      if (s.size > 0) out.push_back(s.id);
  }

  /// Characters to first symbols.
  void split(std::string_view word, Scratch& scratch) const {
    auto& symbols = scratch.symbols;
    symbols.clear();
    const auto add = [&](int32_t id) { symbols.push_back({id, 0, 0, 0, 1}); };
    const bool plain = options_.prefix.empty() && options_.suffix.empty();
    bool unknown = false;  // an unknown character waits: those behind it may join
    for (size_t at = 0; at < word.size();) {
      const size_t begin = at;
      at += unicode::char_length(static_cast<unsigned char>(word[at]));
      std::string_view text = word.substr(begin, at - begin);
      if (!plain) {
        scratch.buffer.clear();
        if (begin > 0) scratch.buffer += options_.prefix;
        scratch.buffer += text;
        if (at >= word.size()) scratch.buffer += options_.suffix;
        text = scratch.buffer;
      }
      if (const int32_t id = vocabulary_.ids.find(text); id >= 0) {
        if (unknown) add(unk_);
        unknown = false;
        add(id);
        continue;
      }
      if (options_.byte_fallback &&
          std::all_of(text.begin(), text.end(), [&](char c) { return bytes_[static_cast<unsigned char>(c)] >= 0; })) {
        for (const char c : text) add(bytes_[static_cast<unsigned char>(c)]);
        continue;
      }
      if (options_.unk.empty()) continue;
      check(unk_ >= 0, "{}: the unknown token \"{}\" is not in the vocabulary.", where_, options_.unk);
      if (unknown && !options_.fuse_unk) add(unk_);
      unknown = true;
    }
    if (unknown) add(unk_);
  }

  /// Short words: look for the best pair again and again.
  void merge_few(std::vector<Scratch::Symbol>& symbols) const {
    size_t n = symbols.size();
    std::array<const MergeMap::Merge*, 24> pairs;
    const auto pair_at = [&](size_t i) {
      return i + 1 < n ? merges_.find(static_cast<uint32_t>(symbols[i].id), static_cast<uint32_t>(symbols[i + 1].id))
                       : nullptr;
    };
    for (size_t i = 0; i < n; ++i) pairs[i] = pair_at(i);
    for (;;) {
      size_t best = n;
      for (size_t i = 0; i + 1 < n; ++i)
        if (pairs[i] && (best == n || pairs[i]->rank < pairs[best]->rank)) best = i;
      if (best == n) break;
      symbols[best].id = static_cast<int32_t>(pairs[best]->id);
      for (size_t i = best + 1; i + 1 < n; ++i) {
        symbols[i] = symbols[i + 1];
        pairs[i] = pairs[i + 1];
      }
      --n;
      pairs[best] = pair_at(best);
      if (best > 0) pairs[best - 1] = pair_at(best - 1);
    }
    symbols.resize(n);
  }

  /// Long words: a heap of candidates, each checked when it comes up.
  void merge_many(Scratch& scratch) const {
    auto& symbols = scratch.symbols;
    auto& heap = scratch.heap;
    heap.clear();
    const auto later = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
      return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
    };
    const auto candidate = [&](int32_t left) -> const MergeMap::Merge* {
      const auto& a = symbols[static_cast<size_t>(left)];
      if (a.next < 0) return nullptr;
      return merges_.find(static_cast<uint32_t>(a.id), static_cast<uint32_t>(symbols[static_cast<size_t>(a.next)].id));
    };
    const auto push = [&](int32_t left) {
      if (const auto* m = candidate(left)) {
        heap.push_back({m->rank, static_cast<uint32_t>(left), m->id});
        std::push_heap(heap.begin(), heap.end(), later);
      }
    };
    for (int32_t i = 0; i < static_cast<int32_t>(symbols.size()); ++i)
      if (const auto* m = candidate(i)) heap.push_back({m->rank, static_cast<uint32_t>(i), m->id});
    std::make_heap(heap.begin(), heap.end(), later);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), later);
      const auto top = heap.back();
      heap.pop_back();
      const auto left = static_cast<int32_t>(top.position);
      if (symbols[top.position].size == 0) continue;
      const auto* m = candidate(left);
      if (!m || m->id != top.id) continue;
      absorb(symbols, left, static_cast<int32_t>(top.id));
      if (symbols[top.position].prev >= 0) push(symbols[top.position].prev);
      push(left);
    }
  }

  const Vocabulary& vocabulary_;
  BpeOptions options_;
  std::array<int32_t, 256> bytes_;
  Cutter cutter_;
  int32_t unk_ = -1;
  MergeMap merges_;
  std::string where_;
};

class ScoredBpe : public Model {
 public:
  ScoredBpe(const Vocabulary& vocabulary, std::vector<float> scores, int64_t unk, const std::string& where)
      : vocabulary_(vocabulary),
        scores_(std::move(scores)),
        unk_(unk),
        bytes_(byte_pieces(vocabulary)),
        cutter_(vocabulary) {
    check(scores_.size() == vocabulary.pieces.size(), "{}: {} scores for {} tokens; one for each is needed.", where,
          scores_.size(), vocabulary.pieces.size());
    where_ = where;
  }

  void tokenize(std::string_view word, Scratch& scratch, std::vector<int64_t>& out) const override {
    cutter_.words(word, [&](std::string_view w) {
      cached(w, scratch, out, [&](std::vector<int64_t>& ids) { encode(w, scratch, ids); });
    });
  }

 private:
  void encode(std::string_view word, Scratch& scratch, std::vector<int64_t>& out) const {
    check(word.size() < INT32_MAX, "{}: a word of {} bytes is too long.", where_, word.size());
    auto& symbols = scratch.symbols;
    auto& heap = scratch.scored;
    symbols.clear();
    heap.clear();
    for (size_t at = 0; at < word.size();) {
      const size_t n = unicode::char_length(static_cast<unsigned char>(word[at]));
      symbols.push_back({-1, 0, 0, static_cast<uint32_t>(at), static_cast<uint32_t>(n)});
      at += n;
    }
    link(symbols);
    const auto later = [](const Scratch::Scored& a, const Scratch::Scored& b) {
      return a.score != b.score ? a.score < b.score : a.position > b.position;
    };
    const auto push = [&](int32_t left, bool sift) {
      const auto& a = symbols[static_cast<size_t>(left)];
      if (a.next < 0) return;
      const uint32_t size = a.size + symbols[static_cast<size_t>(a.next)].size;
      const int32_t id = vocabulary_.ids.find(word.substr(a.begin, size));
      if (id < 0) return;
      heap.push_back({scores_[static_cast<size_t>(id)], static_cast<uint32_t>(left), size});
      if (sift) std::push_heap(heap.begin(), heap.end(), later);
    };
    for (int32_t i = 0; i < static_cast<int32_t>(symbols.size()); ++i) push(i, false);
    std::make_heap(heap.begin(), heap.end(), later);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), later);
      const auto top = heap.back();
      heap.pop_back();
      const auto left = static_cast<int32_t>(top.position);
      const auto& a = symbols[top.position];
      if (a.size == 0 || a.next < 0 || a.size + symbols[static_cast<size_t>(a.next)].size != top.size) continue;
      absorb(symbols, left, -1);
      if (a.prev >= 0) push(a.prev, true);
      push(left, true);
    }
    bool unknown = false;  // neighbours outside the vocabulary share one unknown token
    for (const auto& s : symbols) {
      if (s.size == 0) continue;
      const bool before = std::exchange(unknown, false);
      const std::string_view text = word.substr(s.begin, s.size);
      if (const int32_t id = vocabulary_.ids.find(text); id >= 0) {
        out.push_back(id);
      } else if (std::all_of(text.begin(), text.end(),
                             [&](char c) { return bytes_[static_cast<unsigned char>(c)] >= 0; })) {
        for (const char c : text) out.push_back(bytes_[static_cast<unsigned char>(c)]);
      } else {
        if (unk_ >= 0 && !before) out.push_back(unk_);
        unknown = true;
      }
    }
  }

  const Vocabulary& vocabulary_;
  std::vector<float> scores_;
  int64_t unk_;
  std::array<int32_t, 256> bytes_;
  Cutter cutter_;
  std::string where_;
};

}  // namespace

std::unique_ptr<Model> make_bpe(const Vocabulary& vocabulary, const Merges& merges, BpeOptions options,
                                const std::string& where) {
  return std::make_unique<Bpe>(vocabulary, merges, std::move(options), where);
}

std::unique_ptr<Model> make_scored_bpe(const Vocabulary& vocabulary, std::vector<float> scores, int64_t unk,
                                       const std::string& where) {
  return std::make_unique<ScoredBpe>(vocabulary, std::move(scores), unk, where);
}

}  // namespace moiety::tokenizer
