// Unigram, WordPiece and WordLevel models, and the vocabulary and trie that the models share.
#include <algorithm>
#include <array>
#include <limits>

#include "moiety/io/tokenizer_parts.h"
#include "moiety/io/unicode.h"

namespace moiety::tokenizer {

void Vocabulary::assign(const std::vector<std::pair<std::string_view, int64_t>>& entries, const std::string& where) {
  size_t bytes = 0;
  int64_t top = -1;
  const int64_t limit = 4 * static_cast<int64_t>(entries.size()) + (1 << 18);
  for (const auto& [text, id] : entries) {
    check(id >= 0 && id < limit, "{}: \"{}\" has the id {}; a vocabulary of {} pieces may have ids from 0 to {}.",
          where, text, id, entries.size(), limit - 1);
    bytes += text.size();
    top = std::max(top, id);
  }
  std::shared_ptr<char[]> arena(new char[bytes + 1]);
  pieces.assign(static_cast<size_t>(top + 1), {});
  ids.reserve(entries.size());
  char* to = arena.get();
  for (const auto& [text, id] : entries) {
    std::copy(text.begin(), text.end(), to);
    const std::string_view copy(to, text.size());
    to += text.size();
    pieces[static_cast<size_t>(id)] = copy;
    ids.insert(copy, static_cast<int32_t>(id), true);
  }
  owners.push_back(std::move(arena));
}

void Trie::build(std::vector<std::pair<std::string_view, int32_t>> entries) {
  nodes_.clear();
  root_.clear();
  if (entries.empty()) return;
  // Later entries first among equals, so that the first met is the last given.
  std::reverse(entries.begin(), entries.end());
  std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  struct Work {
    uint32_t begin, end, node, depth;
  };
  std::vector<Work> queue{{0, static_cast<uint32_t>(entries.size()), 0, 0}};
  nodes_.emplace_back();
  for (size_t head = 0; head < queue.size(); ++head) {
    auto [begin, end, node, depth] = queue[head];
    if (entries[begin].first.size() == depth) {
      if (depth > 0) nodes_[node].value = entries[begin].second;
      while (begin < end && entries[begin].first.size() == depth) ++begin;
    }
    nodes_[node].first = static_cast<uint32_t>(nodes_.size());
    while (begin < end) {
      const char label = entries[begin].first[depth];
      uint32_t stop = begin;
      while (stop < end && entries[stop].first[depth] == label) ++stop;
      queue.push_back({begin, stop, static_cast<uint32_t>(nodes_.size()), depth + 1});
      nodes_.emplace_back().label = static_cast<unsigned char>(label);
      ++nodes_[node].count;
      begin = stop;
    }
    // The queue is the trie's breadth: what is done is dropped now and then.
    if (head > 1 << 16) {
      queue.erase(queue.begin(), queue.begin() + static_cast<std::ptrdiff_t>(head + 1));
      head = static_cast<size_t>(-1);
    }
  }
  root_.assign(256, 0);
  for (uint32_t i = 0; i < nodes_[0].count; ++i) root_[nodes_[nodes_[0].first + i].label] = nodes_[0].first + i;
}

uint32_t Trie::child(uint32_t at, unsigned char byte) const {
  if (at == 0) return root_.empty() ? 0 : root_[byte];
  const Node& node = nodes_[at];
  uint32_t low = node.first, high = node.first + node.count;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (nodes_[middle].label < byte)
      low = middle + 1;
    else
      high = middle;
  }
  return low < node.first + node.count && nodes_[low].label == byte ? low : 0;
}

namespace {

class Unigram : public Model {
 public:
  Unigram(const Vocabulary& vocabulary, std::vector<double> scores, std::optional<int64_t> unk, bool byte_fallback,
          const std::string& where)
      : vocabulary_(vocabulary), scores_(std::move(scores)), unk_(unk), byte_fallback_(byte_fallback), where_(where) {
    check(scores_.size() == vocabulary.pieces.size(), "{}: {} scores for {} pieces; one for each is needed.", where,
          scores_.size(), vocabulary.pieces.size());
    check(!unk || vocabulary.has(*unk), "{}: unk_id is {}, which is not in the vocabulary of {} pieces.", where,
          unk.value_or(-1), vocabulary.pieces.size());
    std::vector<std::pair<std::string_view, int32_t>> entries;
    entries.reserve(scores_.size());
    double least = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < scores_.size(); ++i) {
      if (!vocabulary.pieces[i].empty()) entries.emplace_back(vocabulary.pieces[i], static_cast<int32_t>(i));
      least = std::min(least, scores_[i]);
    }
    unknown_score_ = least - 10.0;
    trie_.build(std::move(entries));
    for (int b = 0; b < 256; ++b) bytes_[static_cast<size_t>(b)] = vocabulary.ids.find(fmt::format("<0x{:02X}>", b));
  }

  void tokenize(std::string_view text, Scratch& scratch, std::vector<int64_t>& out) const override {
    struct Best {
      double score = 0;
      int32_t id = 0;
      uint32_t from = kNone;
    };
    check(text.size() < kNone, "{}: a text of {} bytes is too long.", where_, text.size());
    std::vector<Best> best(text.size() + 1);
    for (size_t at = 0; at < text.size();) {
      const double here = best[at].score;
      const size_t one = unicode::char_length(static_cast<unsigned char>(text[at]));
      bool single = false;
      uint32_t node = 0;
      const auto offer = [&](size_t end, double score, int32_t id) {
        Best& b = best[end];
        if (b.from != kNone && !(score > b.score)) return;
        b = {score, id, static_cast<uint32_t>(at)};
      };
      for (size_t end = at; end < text.size();) {
        node = trie_.child(node, static_cast<unsigned char>(text[end]));
        if (node == 0) break;
        ++end;
        const int32_t id = trie_.value(node);
        if (id < 0) continue;
        offer(end, scores_[static_cast<size_t>(id)] + here, id);
        single |= end - at == one;
      }
      if (!single) {
        check(unk_.has_value(), "{}: the text has a character outside the vocabulary, and the model has no unk_id.",
              where_);
        offer(at + one, unknown_score_ + here, static_cast<int32_t>(*unk_));
      }
      at += one;
    }
    // Backwards; neighbours that are unknown join.
    std::vector<std::pair<uint32_t, uint32_t>> parts;
    bool joining = false;
    for (size_t end = text.size(); end > 0;) {
      const Best& b = best[end];
      const bool unknown = unk_ && b.id == *unk_;
      if (unknown && joining)
        parts.back().first = b.from;
      else
        parts.emplace_back(b.from, static_cast<uint32_t>(end));
      joining = unknown;
      end = b.from;
    }
    for (auto p = parts.rbegin(); p != parts.rend(); ++p) {
      const std::string_view piece = text.substr(p->first, p->second - p->first);
      if (const int32_t id = vocabulary_.ids.find(piece); id >= 0) {
        out.push_back(id);
      } else if (byte_fallback_ && std::all_of(piece.begin(), piece.end(),
                                               [&](char c) { return bytes_[static_cast<unsigned char>(c)] >= 0; })) {
        for (const char c : piece) out.push_back(bytes_[static_cast<unsigned char>(c)]);
      } else {
        check(unk_.has_value(), "{}: the text has a character outside the vocabulary, and the model has no unk_id.",
              where_);
        out.push_back(*unk_);
      }
    }
  }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  const Vocabulary& vocabulary_;
  std::vector<double> scores_;
  std::optional<int64_t> unk_;
  bool byte_fallback_;
  std::string where_;
  double unknown_score_ = 0;
  Trie trie_;
  std::array<int32_t, 256> bytes_{};
};

class WordPiece : public Model {
 public:
  WordPiece(const Vocabulary& vocabulary, const std::string& unk, const std::string& prefix, size_t longest_word,
            const std::string& where)
      : vocabulary_(vocabulary), unk_text_(unk), prefix_(prefix), longest_word_(longest_word), where_(where) {
    unk_ = vocabulary.ids.find(unk);
    for (const auto piece : vocabulary.pieces) longest_piece_ = std::max(longest_piece_, piece.size());
  }

  void tokenize(std::string_view word, Scratch& scratch, std::vector<int64_t>& out) const override {
    size_t characters = 0;
    for (const char c : word) characters += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    const size_t before = out.size();
    bool known = characters <= longest_word_;
    for (size_t begin = 0; known && begin < word.size();) {
      size_t end = std::min(word.size(), begin + longest_piece_);
      while (end < word.size() && (static_cast<unsigned char>(word[end]) & 0xC0) == 0x80) --end;
      int32_t id = -1;
      while (end > begin) {
        if (begin > 0) {
          scratch.buffer.assign(prefix_).append(word, begin, end - begin);
          id = vocabulary_.ids.find(scratch.buffer);
        } else {
          id = vocabulary_.ids.find(word.substr(0, end));
        }
        if (id >= 0) break;
        do --end;
        while ((static_cast<unsigned char>(word[end]) & 0xC0) == 0x80);
      }
      if (id < 0)
        known = false;
      else
        out.push_back(id);
      begin = end;
    }
    if (known) return;
    check(unk_ >= 0, "{}: the unknown token \"{}\" is not in the vocabulary.", where_, unk_text_);
    out.resize(before);
    out.push_back(unk_);
  }

 private:
  const Vocabulary& vocabulary_;
  std::string unk_text_, prefix_;
  size_t longest_word_, longest_piece_ = 0;
  int32_t unk_;
  std::string where_;
};

class WordLevel : public Model {
 public:
  WordLevel(const Vocabulary& vocabulary, const std::string& unk, const std::string& where)
      : vocabulary_(vocabulary), unk_text_(unk), unk_(vocabulary.ids.find(unk)), where_(where) {}
  void tokenize(std::string_view word, Scratch&, std::vector<int64_t>& out) const override {
    int32_t id = vocabulary_.ids.find(word);
    if (id < 0) id = unk_;
    check(id >= 0, "{}: \"{}\" is not in the vocabulary, and neither is the unknown token \"{}\".", where_, word,
          unk_text_);
    out.push_back(id);
  }

 private:
  const Vocabulary& vocabulary_;
  std::string unk_text_;
  int32_t unk_;
  std::string where_;
};

}  // namespace

std::unique_ptr<Model> make_unigram(const Vocabulary& vocabulary, std::vector<double> scores,
                                    std::optional<int64_t> unk, bool byte_fallback, const std::string& where) {
  return std::make_unique<Unigram>(vocabulary, std::move(scores), unk, byte_fallback, where);
}
std::unique_ptr<Model> make_wordpiece(const Vocabulary& vocabulary, const std::string& unk, const std::string& prefix,
                                      size_t longest_word, const std::string& where) {
  return std::make_unique<WordPiece>(vocabulary, unk, prefix, longest_word, where);
}
std::unique_ptr<Model> make_wordlevel(const Vocabulary& vocabulary, const std::string& unk, const std::string& where) {
  return std::make_unique<WordLevel>(vocabulary, unk, where);
}

}  // namespace moiety::tokenizer
