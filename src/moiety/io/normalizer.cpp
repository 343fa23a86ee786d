// Normalizers of tokenizer.json. Each keeps Chunk::zero right: how many leading bytes stem from the first original
// character.
#include <algorithm>
#include <array>

#include "moiety/io/tokenizer_parts.h"
#include "moiety/io/unicode.h"

namespace moiety::tokenizer {
namespace {

/// Replaces every character by what `f(character, out)` appends; its bytes stem from where the character's did.
template <class F>
void map_characters(Chunk& chunk, F&& f) {
  std::string out;
  out.reserve(chunk.text.size());
  size_t zero = 0;
  for (size_t at = 0; at < chunk.text.size();) {
    const bool from_first = at < chunk.zero;
    const char32_t c = unicode::next(chunk.text, at);
    f(c, out);
    if (from_first) zero = out.size();
  }
  chunk.text = std::move(out);
  chunk.zero = zero;
}

class Sequence : public Normalizer {
 public:
  std::vector<std::unique_ptr<Normalizer>> parts;
  void apply(Chunk& chunk) const override {
    for (const auto& p : parts) p->apply(chunk);
  }
};

class UnicodeForm : public Normalizer {
 public:
  explicit UnicodeForm(unicode::Form form) : form_(form) {}
  void apply(Chunk& chunk) const override {
    if (std::all_of(chunk.text.begin(), chunk.text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; }))
      return;
    std::string out = unicode::normalize(chunk.text, form_);
    if (chunk.zero > 0) {
      size_t end = std::min(chunk.zero, chunk.text.size());
      chunk.zero = std::min(out.size(), unicode::normalize(std::string_view(chunk.text).substr(0, end), form_).size());
    }
    chunk.text = std::move(out);
  }

 private:
  unicode::Form form_;
};

class Lowercase : public Normalizer {
 public:
  void apply(Chunk& chunk) const override {
    map_characters(chunk, [](char32_t c, std::string& out) { unicode::append_lower(out, c); });
  }
};

class StripAccents : public Normalizer {
 public:
  void apply(Chunk& chunk) const override {
    map_characters(chunk, [](char32_t c, std::string& out) {
      if (!unicode::is_combining_mark(c)) unicode::append(out, c);
    });
  }
};

class Strip : public Normalizer {
 public:
  Strip(bool left, bool right) : left_(left), right_(right) {}
  void apply(Chunk& chunk) const override {
    std::string& text = chunk.text;
    size_t begin = 0, end = text.size();
    if (left_)
      for (size_t at = 0; at < end; begin = at)
        if (!unicode::is_white_space(unicode::next(text, at))) break;
    if (right_)
      while (end > begin) {
        const char32_t c = unicode::previous(text, end);
        if (!unicode::is_white_space(c)) break;
        do --end;
        while ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80);
      }
    text.erase(end);
    text.erase(0, begin);
    chunk.zero = std::min(chunk.zero > begin ? chunk.zero - begin : 0, text.size());
  }

 private:
  bool left_, right_;
};

/// What both forms of Replace share: walks over (text between, match) and appends.
class Replace : public Normalizer {
 public:
  Replace(const Field& field) : content_(field.string("content")) {
    const Field pattern = field.at("pattern");
    if (pattern.has("String")) literal_ = pattern.string("String");
    if (literal_.empty()) {
      check(pattern.has("String") || pattern.has("Regex"), "{}: expected {{\"String\": ..}} or {{\"Regex\": ..}}.",
            pattern.where());
      regex_.emplace(pattern.has("Regex") ? pattern.string("Regex") : "", pattern.where());
    }
  }
  void apply(Chunk& chunk) const override {
    const std::string& text = chunk.text;
    if (text.empty()) return;
    std::string out;
    size_t copied = 0, zero = 0;
    const auto take = [&](size_t begin, size_t end) {
      if (out.empty()) out.reserve(text.size() + 16);
      out.append(text, copied, begin - copied);
      if (copied < chunk.zero) zero = out.size() - (begin > chunk.zero ? begin - chunk.zero : 0);
      out += content_;
      // The new text stems from the last character replaced.
      if (end == 0 || end - 1 < chunk.zero) zero = out.size();
      copied = end;
    };
    bool any = false;
    if (!literal_.empty()) {
      for (size_t at = 0; (at = text.find(literal_, at)) != std::string::npos; at += literal_.size()) {
        take(at, at + literal_.size());
        any = true;
      }
    } else {
      size_t begin, end;
      for (Regex::Matches m(*regex_, text); m.next(begin, end); any = true) take(begin, end);
    }
    if (!any) return;
    out.append(text, copied, text.size() - copied);
    if (copied < chunk.zero) zero = out.size() - (text.size() - chunk.zero);
    chunk.text = std::move(out);
    chunk.zero = std::min(zero, chunk.text.size());
  }

 private:
  std::string content_, literal_;
  std::optional<Regex> regex_;
};

class Prepend : public Normalizer {
 public:
  explicit Prepend(std::string text) : text_(std::move(text)) {}
  void apply(Chunk& chunk) const override {
    if (chunk.text.empty()) return;
    chunk.text = text_ + chunk.text;
    if (chunk.zero > 0) chunk.zero += text_.size();
  }

 private:
  std::string text_;
};

class Bert : public Normalizer {
 public:
  explicit Bert(const Field& field)
      : clean_(field.boolean("clean_text", true)),
        chinese_(field.boolean("handle_chinese_chars", true)),
        lower_(field.boolean("lowercase", true)),
        accents_(field.boolean("strip_accents", lower_)) {}
  void apply(Chunk& chunk) const override {
    if (clean_ || chinese_)
      map_characters(chunk, [&](char32_t c, std::string& out) {
        if (clean_) {
          if (unicode::is_control(c)) return;
          if (unicode::is_white_space(c)) c = ' ';
        }
        const bool apart = chinese_ && c >= 0x3400 && unicode::is_chinese(c);
        if (apart) out += ' ';
        unicode::append(out, c);
        if (apart) out += ' ';
      });
    if (accents_) {
      UnicodeForm(unicode::Form::NFD).apply(chunk);
      map_characters(chunk, [](char32_t c, std::string& out) {
        if (!unicode::is_nonspacing_mark(c)) unicode::append(out, c);
      });
    }
    if (lower_) Lowercase().apply(chunk);
  }

 private:
  bool clean_, chinese_, lower_, accents_;
};

class Nmt : public Normalizer {
 public:
  void apply(Chunk& chunk) const override {
    map_characters(chunk, [](char32_t c, std::string& out) {
      if ((c >= 1 && c <= 8) || c == 0xB || (c >= 0xE && c <= 0x1F) || c == 0x7F || c == 0x8F || c == 0x9F) return;
      const bool space = c == 9 || c == 0xA || c == 0xC || c == 0xD || c == 0x1680 || (c >= 0x200B && c <= 0x200F) ||
                         c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xFEFF || c == 0xFFFD;
      unicode::append(out, space ? U' ' : c);
    });
  }
};

/// SentencePiece's compiled character map: a double-array trie (darts-clone) from text to an offset into NUL-ended
/// strings.
class Precompiled : public Normalizer {
 public:
  Precompiled(std::string bytes, const std::string& where) {
    check(bytes.size() >= 4, "{}: the character map has {} bytes; it starts with the 4-byte size of its trie.", where,
          bytes.size());
    uint32_t size = 0;
    for (int i = 3; i >= 0; --i) size = size << 8 | static_cast<unsigned char>(bytes[static_cast<size_t>(i)]);
    check(size % 4 == 0 && size > 0 && size <= bytes.size() - 4,
          "{}: the character map says its trie has {} bytes; it has {} bytes in all.", where, size, bytes.size());
    trie_.resize(size / 4);
    for (size_t i = 0; i < trie_.size(); ++i)
      for (size_t b = 4; b-- > 0;) trie_[i] = trie_[i] << 8 | static_cast<unsigned char>(bytes[4 + i * 4 + b]);
    strings_ = bytes.substr(4 + size);
    for (size_t at = 0; at < strings_.size();) {
      const int n = unicode::well_formed(strings_, at);
      check(n > 0, "{}: the character map's strings are not valid UTF-8 at byte {}.", where, at);
      at += static_cast<size_t>(n);
    }
  }

  void apply(Chunk& chunk) const override {
    const std::string_view text = chunk.text;
    std::string out;
    out.reserve(text.size());
    size_t zero = 0;
    for (size_t at = 0; at < text.size();) {
      size_t end = at + 1;
      // Two ASCII characters never share a cluster, but for CR LF.
      if (static_cast<unsigned char>(text[at]) >= 0x80 || text[at] == '\r' ||
          (end < text.size() && static_cast<unsigned char>(text[end]) >= 0x80))
        end = unicode::grapheme_end(text, at);
      const auto cluster = text.substr(at, end - at);
      const auto whole = cluster.size() < 6 ? lookup(cluster) : std::nullopt;
      if (whole) {
        out += *whole;
        if (at < chunk.zero) zero = out.size();
      } else {
        for (size_t i = at; i < end;) {
          const size_t begin = i;
          unicode::next(text, i);
          const auto part = text.substr(begin, i - begin);
          out += lookup(part).value_or(part);
          if (begin < chunk.zero) zero = out.size();
        }
      }
      at = end;
    }
    // Where characters at the start vanish, the tokenizers package lets what follows stem from the first of them.
    if (zero == 0 && chunk.zero > 0 && !out.empty()) zero = unicode::char_length(static_cast<unsigned char>(out[0]));
    chunk.text = std::move(out);
    chunk.zero = zero;
  }

 private:
  /// The replacement of the shortest key that `key` starts with.
  std::optional<std::string_view> lookup(std::string_view key) const {
    const auto offset = [](uint32_t unit) { return size_t{unit >> 10} << ((unit & (1u << 9)) >> 6); };
    size_t node = offset(trie_[0]);
    for (const char k : key) {
      const auto byte = static_cast<unsigned char>(k);
      if (byte == 0) break;
      node ^= byte;
      if (node >= trie_.size()) return std::nullopt;
      const uint32_t unit = trie_[node];
      if ((unit & (1u << 31 | 0xFFu)) != byte) return std::nullopt;
      node ^= offset(unit);
      if (unit >> 8 & 1) {
        if (node >= trie_.size()) return std::nullopt;
        const size_t at = trie_[node] & 0x7FFFFFFFu;
        if (at > strings_.size() || (at < strings_.size() && (static_cast<unsigned char>(strings_[at]) & 0xC0) == 0x80))
          return std::nullopt;
        const std::string_view rest = std::string_view(strings_).substr(at);
        return rest.substr(0, std::min(rest.find('\0'), rest.size()));
      }
    }
    return std::nullopt;
  }

  std::vector<uint32_t> trie_;
  std::string strings_;
};

class ByteLevel : public Normalizer {
 public:
  void apply(Chunk& chunk) const override {
    std::string out;
    size_t zero = 0;
    for (size_t i = 0; i < chunk.text.size(); ++i) {
      out += byte_char(static_cast<unsigned char>(chunk.text[i]));
      if (i < chunk.zero) zero = out.size();
    }
    chunk.text = std::move(out);
    chunk.zero = zero;
  }
};

std::string from_base64(const std::string& text, const std::string& where) {
  std::string out;
  uint32_t bits = 0;
  int count = 0;
  size_t i = 0;
  for (; i < text.size() && text[i] != '='; ++i) {
    static constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const size_t digit = kAlphabet.find(text[i]);
    check(digit != std::string_view::npos, "{}: not base64 at character {}.", where, i);
    bits = bits << 6 | static_cast<uint32_t>(digit);
    if (++count == 4) {
      out += {static_cast<char>(bits >> 16), static_cast<char>(bits >> 8), static_cast<char>(bits)};
      bits = 0, count = 0;
    }
  }
  check(count != 1, "{}: the base64 text is cut off.", where);
  if (count == 2) out += static_cast<char>(bits >> 4);
  if (count == 3) out += {static_cast<char>(bits >> 10), static_cast<char>(bits >> 2)};
  return out;
}

}  // namespace

std::unique_ptr<Normalizer> make_precompiled(std::string bytes, const std::string& where) {
  return std::make_unique<Precompiled>(std::move(bytes), where);
}

std::unique_ptr<Normalizer> make_normalizer(const Field& field, int depth) {
  check(depth < kMaxDepth, "{}: sequences are nested more than {} deep.", field.where(), kMaxDepth);
  if (field.json().is_null()) return nullptr;
  const std::string type = field.string("type");
  if (type == "Sequence") {
    auto sequence = std::make_unique<Sequence>();
    const Field list = field.at("normalizers");
    for (size_t i = 0; i < list.array().size(); ++i)
      if (auto part = make_normalizer(list.at(i), depth + 1)) sequence->parts.push_back(std::move(part));
    return sequence;
  }
  using unicode::Form;
  if (type == "NFC") return std::make_unique<UnicodeForm>(Form::NFC);
  if (type == "NFD") return std::make_unique<UnicodeForm>(Form::NFD);
  if (type == "NFKC") return std::make_unique<UnicodeForm>(Form::NFKC);
  if (type == "NFKD") return std::make_unique<UnicodeForm>(Form::NFKD);
  if (type == "Lowercase") return std::make_unique<Lowercase>();
  if (type == "StripAccents") return std::make_unique<StripAccents>();
  if (type == "Strip")
    return std::make_unique<Strip>(field.boolean("strip_left", true), field.boolean("strip_right", true));
  if (type == "Replace") return std::make_unique<Replace>(field);
  if (type == "Prepend") return std::make_unique<Prepend>(field.string("prepend"));
  if (type == "BertNormalizer") return std::make_unique<Bert>(field);
  if (type == "Nmt") return std::make_unique<Nmt>();
  if (type == "ByteLevel") return std::make_unique<ByteLevel>();
  if (type == "Precompiled") {
    const Field map = field.at("precompiled_charsmap");
    if (map.json().is_null() || map.string().empty()) return nullptr;
    return make_precompiled(from_base64(map.string(), map.where()), map.where());
  }
  fail(
      "{}: no normalizer is called \"{}\"; there are Sequence, NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip, "
      "Replace, "
      "Prepend, BertNormalizer, Nmt, ByteLevel, Precompiled.",
      field.where(), type);
}

std::unique_ptr<Normalizer> make_normalizer(const nlohmann::json& json) {
  return make_normalizer(Field(json, "built-in normalizer"));
}

}  // namespace moiety::tokenizer
