// Pre-tokenizers of tokenizer.json: each splits every chunk that is not yet a token.
#include <algorithm>
#include <array>

#include "moiety/io/tokenizer_parts.h"
#include "moiety/io/unicode.h"

namespace moiety::tokenizer {
namespace {

enum class Behavior { Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous };

Behavior behavior_of(const Field& field) {
  const std::string s = field.string();
  if (s == "Removed") return Behavior::Removed;
  if (s == "Isolated") return Behavior::Isolated;
  if (s == "MergedWithPrevious") return Behavior::MergedWithPrevious;
  if (s == "MergedWithNext") return Behavior::MergedWithNext;
  if (s == "Contiguous") return Behavior::Contiguous;
  field.expected("Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

/// A stretch of a chunk: a delimiter, or what lies between.
struct Span {
  size_t begin, end;
  bool match;
};

class Splitter {
 public:
  Splitter(Behavior behavior, std::vector<Chunk>& out) : behavior_(behavior), out_(out) {}

  /// Splits `chunk` where `find(text, emit)` reports matches in order: emit(begin, end).
  template <class Find>
  void split(Chunk&& chunk, bool invert, Find&& find) {
    const std::string& text = chunk.text;
    if (text.empty()) return;
    spans_.clear();
    size_t previous = 0;
    find(std::string_view(text), [&](size_t begin, size_t end) {
      if (previous != begin) spans_.push_back({previous, begin, invert});
      spans_.push_back({begin, end, !invert});
      previous = end;
    });
    if (previous != text.size()) spans_.push_back({previous, text.size(), invert});
    if (spans_.size() == 1 && !(spans_[0].match && behavior_ == Behavior::Removed)) {
      chunk.first = chunk.zero > 0;
      out_.push_back(std::move(chunk));
      return;
    }
    bool before = false;  // the last span was a match
    switch (behavior_) {
      case Behavior::Removed:
        for (const auto& s : spans_)
          if (!s.match) cut(chunk, s.begin, s.end);
        break;
      case Behavior::Isolated:
        for (const auto& s : spans_) cut(chunk, s.begin, s.end);
        break;
      case Behavior::Contiguous:
      case Behavior::MergedWithPrevious:
        merged_.clear();
        for (const auto& s : spans_) {
          const bool join = behavior_ == Behavior::Contiguous ? s.match == before : s.match && !before;
          if (join && !merged_.empty())
            merged_.back().end = s.end;
          else
            merged_.push_back(s);
          before = s.match;
        }
        for (const auto& s : merged_) cut(chunk, s.begin, s.end);
        break;
      case Behavior::MergedWithNext:
        merged_.clear();
        for (auto s = spans_.rbegin(); s != spans_.rend(); ++s) {
          if (s->match && !before && !merged_.empty())
            merged_.back().begin = s->begin;
          else
            merged_.push_back(*s);
          before = s->match;
        }
        for (auto s = merged_.rbegin(); s != merged_.rend(); ++s) cut(chunk, s->begin, s->end);
        break;
    }
  }

  void cut(const Chunk& chunk, size_t begin, size_t end) {
    if (begin >= end) return;
    Chunk& c = out_.emplace_back();
    c.text.assign(chunk.text, begin, end - begin);
    c.zero = begin < chunk.zero ? std::min(chunk.zero, end) - begin : 0;
    c.first = begin < chunk.zero;
  }

 private:
  Behavior behavior_;
  std::vector<Chunk>& out_;
  std::vector<Span> spans_, merged_;
};

/// Runs `split(splitter, chunk)` over all chunks that are not tokens.
template <class F>
void split_all(std::vector<Chunk>& chunks, Behavior behavior, F&& split) {
  std::vector<Chunk> out;
  out.reserve(chunks.size());
  Splitter splitter(behavior, out);
  for (Chunk& chunk : chunks) {
    if (chunk.token >= 0)
      out.push_back(std::move(chunk));
    else
      split(splitter, std::move(chunk));
  }
  chunks.swap(out);
}

/// Splits at single characters.
template <class Is>
void split_at(std::vector<Chunk>& chunks, Behavior behavior, Is&& is) {
  split_all(chunks, behavior, [&](Splitter& splitter, Chunk&& chunk) {
    splitter.split(std::move(chunk), false, [&](std::string_view text, auto&& emit) {
      for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        if (is(unicode::next(text, at))) emit(begin, at);
      }
    });
  });
}

void split_regex(std::vector<Chunk>& chunks, Behavior behavior, bool invert, const Regex& regex) {
  split_all(chunks, behavior, [&](Splitter& splitter, Chunk&& chunk) {
    splitter.split(std::move(chunk), invert, [&](std::string_view text, auto&& emit) {
      Regex::Matches matches(regex, text);
      for (size_t begin, end; matches.next(begin, end);) emit(begin, end);
    });
  });
}

class Sequence : public PreTokenizer {
 public:
  std::vector<std::unique_ptr<PreTokenizer>> parts;
  void apply(std::vector<Chunk>& chunks) const override {
    for (const auto& p : parts) p->apply(chunks);
  }
};

void prepend(Chunk& chunk, std::string_view text) {
  if (chunk.text.empty()) return;
  chunk.text = std::string(text) + chunk.text;
  if (chunk.zero > 0) chunk.zero += text.size();
}

class ByteLevel : public PreTokenizer {
 public:
  explicit ByteLevel(const Field& field)
      : prefix_(field.boolean("add_prefix_space", true)), use_regex_(field.boolean("use_regex", true)) {}
  void apply(std::vector<Chunk>& chunks) const override {
    static const Regex kGpt2("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
                             "ByteLevel");
    for (Chunk& chunk : chunks)
      if (prefix_ && chunk.token < 0 && !chunk.text.starts_with(' ')) prepend(chunk, " ");
    if (use_regex_) split_regex(chunks, Behavior::Isolated, false, kGpt2);
    for (Chunk& chunk : chunks) {
      if (chunk.token >= 0) continue;
      std::string out;
      to_byte_level(chunk.text, out);
      if (chunk.zero > 0) {
        std::string head;
        to_byte_level(std::string_view(chunk.text).substr(0, chunk.zero), head);
        chunk.zero = head.size();
      }
      chunk.text = std::move(out);
    }
  }

 private:
  bool prefix_, use_regex_;
};

class Split : public PreTokenizer {
 public:
  explicit Split(const Field& field)
      : behavior_(behavior_of(field.at("behavior"))), invert_(field.boolean("invert", false)) {
    const Field pattern = field.at("pattern");
    if (pattern.has("String")) {
      literal_ = pattern.string("String");
      if (literal_.empty()) regex_.emplace("", pattern.where());
    } else {
      check(pattern.has("Regex"), "{}: expected {{\"String\": ..}} or {{\"Regex\": ..}}.", pattern.where());
      regex_.emplace(pattern.string("Regex"), pattern.where());
    }
  }
  void apply(std::vector<Chunk>& chunks) const override {
    if (regex_) return split_regex(chunks, behavior_, invert_, *regex_);
    split_all(chunks, behavior_, [&](Splitter& splitter, Chunk&& chunk) {
      splitter.split(std::move(chunk), invert_, [&](std::string_view text, auto&& emit) {
        for (size_t at = 0; (at = text.find(literal_, at)) != std::string_view::npos; at += literal_.size())
          emit(at, at + literal_.size());
      });
    });
  }

 private:
  Behavior behavior_;
  bool invert_;
  std::string literal_;
  std::optional<Regex> regex_;
};

class Whitespace : public PreTokenizer {
 public:
  void apply(std::vector<Chunk>& chunks) const override {
    split_all(chunks, Behavior::Removed, [&](Splitter& splitter, Chunk&& chunk) {
      // Runs of word characters and runs of other characters stay, white space goes.
      const std::string_view text = chunk.text;
      const auto kind = [](char32_t c) { return unicode::is_word(c) ? 1 : unicode::is_white_space(c) ? 0 : 2; };
      int last = 0;
      size_t begin = 0;
      for (size_t at = 0; at < text.size();) {
        const size_t here = at;
        const int k = kind(unicode::next(text, at));
        if (k != last) {
          if (last != 0) splitter.cut(chunk, begin, here);
          begin = here;
          last = k;
        }
      }
      if (last != 0) splitter.cut(chunk, begin, text.size());
    });
  }
};

class WhitespaceSplit : public PreTokenizer {
 public:
  void apply(std::vector<Chunk>& chunks) const override {
    split_at(chunks, Behavior::Removed, unicode::is_white_space);
  }
};

class BertPreTokenizer : public PreTokenizer {
 public:
  void apply(std::vector<Chunk>& chunks) const override {
    split_at(chunks, Behavior::Removed, unicode::is_white_space);
    split_at(chunks, Behavior::Isolated, unicode::is_punctuation);
  }
};

class Metaspace : public PreTokenizer {
 public:
  explicit Metaspace(const Field& field)
      : character_(field.character("replacement")), split_(field.boolean("split", true)) {
    unicode::append(replacement_, character_);
    const Field scheme(field.has("prepend_scheme") ? field.at("prepend_scheme") : Field(kAlways, field.where()));
    const std::string s = scheme.string();
    if (s != "always" && s != "first" && s != "never") scheme.expected("always, first or never");
    always_ = s == "always";
    first_ = s == "first";
    if (!field.boolean("add_prefix_space", true)) {
      check(!field.has("prepend_scheme") || s == "never", "{}: add_prefix_space is false but prepend_scheme is {}.",
            field.where(), s);
      check(field.has("prepend_scheme"), "{}: add_prefix_space is false but prepend_scheme is not \"never\".",
            field.where());
      always_ = first_ = false;
    }
  }
  void apply(std::vector<Chunk>& chunks) const override {
    split_all(chunks, Behavior::MergedWithNext, [&](Splitter& splitter, Chunk&& chunk) {
      if (chunk.text.find(' ') != std::string::npos) {
        std::string out;
        size_t zero = 0;
        for (size_t i = 0; i < chunk.text.size(); ++i) {
          if (chunk.text[i] == ' ')
            out += replacement_;
          else
            out += chunk.text[i];
          if (i < chunk.zero) zero = out.size();
        }
        chunk.text = std::move(out);
        chunk.zero = zero;
      }
      if ((always_ || (first_ && chunk.first)) && !chunk.text.starts_with(replacement_)) prepend(chunk, replacement_);
      splitter.split(std::move(chunk), false, [&](std::string_view text, auto&& emit) {
        if (!split_) return;
        for (size_t at = 0; (at = text.find(replacement_, at)) != std::string_view::npos; at += replacement_.size())
          emit(at, at + replacement_.size());
      });
    });
  }

 private:
  static inline const nlohmann::json kAlways = "always";
  char32_t character_;
  std::string replacement_;
  bool split_, always_ = false, first_ = false;
};

class Digits : public PreTokenizer {
 public:
  explicit Digits(const Field& field) : each_(field.boolean("individual_digits", false)) {}
  void apply(std::vector<Chunk>& chunks) const override {
    split_at(chunks, each_ ? Behavior::Isolated : Behavior::Contiguous, unicode::is_numeric);
  }

 private:
  bool each_;
};

class Punctuation : public PreTokenizer {
 public:
  explicit Punctuation(const Field& field)
      : behavior_(field.has("behavior") ? behavior_of(field.at("behavior")) : Behavior::Isolated) {}
  void apply(std::vector<Chunk>& chunks) const override { split_at(chunks, behavior_, unicode::is_punctuation); }

 private:
  Behavior behavior_;
};

class CharDelimiterSplit : public PreTokenizer {
 public:
  explicit CharDelimiterSplit(const Field& field) : delimiter_(field.character("delimiter")) {}
  void apply(std::vector<Chunk>& chunks) const override {
    split_at(chunks, Behavior::Removed, [&](char32_t c) { return c == delimiter_; });
  }

 private:
  char32_t delimiter_;
};

class FixedLength : public PreTokenizer {
 public:
  explicit FixedLength(const Field& field) : length_(field.integer("length", 5)) {
    check(length_ > 0, "{}: length is {}; it must be positive.", field.where(), length_);
  }
  void apply(std::vector<Chunk>& chunks) const override {
    split_all(chunks, Behavior::Isolated, [&](Splitter& splitter, Chunk&& chunk) {
      size_t begin = 0;
      int64_t n = 0;
      for (size_t at = 0; at < chunk.text.size();) {
        unicode::next(chunk.text, at);
        if (++n == length_ || at == chunk.text.size()) {
          splitter.cut(chunk, begin, at);
          begin = at;
          n = 0;
        }
      }
    });
  }

 private:
  int64_t length_;
};

class UnicodeScripts : public PreTokenizer {
 public:
  void apply(std::vector<Chunk>& chunks) const override {
    split_all(chunks, Behavior::Isolated, [&](Splitter& splitter, Chunk&& chunk) {
      // Text before the first character that has a script belongs to no piece and is dropped, as in the original.
      int last = -1;
      size_t begin = std::string::npos;
      for (size_t at = 0; at < chunk.text.size();) {
        const size_t here = at;
        const int s = unicode::script(unicode::next(chunk.text, at));
        if (s == 0) continue;
        if (s != last) {
          if (begin != std::string::npos) splitter.cut(chunk, begin, here);
          begin = here;
        }
        last = s;
      }
      if (begin != std::string::npos) splitter.cut(chunk, begin, chunk.text.size());
    });
  }
};

}  // namespace

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Field& field, int depth) {
  check(depth < kMaxDepth, "{}: sequences are nested more than {} deep.", field.where(), kMaxDepth);
  if (field.json().is_null()) return nullptr;
  const std::string type = field.string("type");
  if (type == "Sequence") {
    auto sequence = std::make_unique<Sequence>();
    const Field list = field.at("pretokenizers");
    for (size_t i = 0; i < list.array().size(); ++i)
      if (auto part = make_pre_tokenizer(list.at(i), depth + 1)) sequence->parts.push_back(std::move(part));
    return sequence;
  }
  if (type == "ByteLevel") return std::make_unique<ByteLevel>(field);
  if (type == "Split") return std::make_unique<Split>(field);
  if (type == "Whitespace") return std::make_unique<Whitespace>();
  if (type == "WhitespaceSplit") return std::make_unique<WhitespaceSplit>();
  if (type == "BertPreTokenizer") return std::make_unique<BertPreTokenizer>();
  if (type == "Metaspace") return std::make_unique<Metaspace>(field);
  if (type == "Digits") return std::make_unique<Digits>(field);
  if (type == "Punctuation") return std::make_unique<Punctuation>(field);
  if (type == "CharDelimiterSplit") return std::make_unique<CharDelimiterSplit>(field);
  if (type == "FixedLength") return std::make_unique<FixedLength>(field);
  if (type == "UnicodeScripts") return std::make_unique<UnicodeScripts>();
  fail(
      "{}: no pre-tokenizer is called \"{}\"; there are Sequence, ByteLevel, Split, Whitespace, WhitespaceSplit, "
      "BertPreTokenizer, Metaspace, Digits, Punctuation, CharDelimiterSplit, FixedLength, UnicodeScripts.",
      field.where(), type);
}

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const nlohmann::json& json) {
  return make_pre_tokenizer(Field(json, "built-in pre-tokenizer"));
}

}  // namespace moiety::tokenizer
