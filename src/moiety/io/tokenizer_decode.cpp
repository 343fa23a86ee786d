// Decoders of tokenizer.json as streams: text comes out as soon as no later token can change it, so that decoding token
// by token and decoding everything are the same code.
#include <algorithm>
#include <array>

#include "moiety/io/tokenizer_parts.h"
#include "moiety/io/unicode.h"

namespace moiety::tokenizer {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct ByteAlphabet {
  std::array<std::string, 256> text;
  std::array<int, 0x144> byte;
  ByteAlphabet() {
    byte.fill(-1);
    char32_t other = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      const char32_t c = printable ? static_cast<char32_t>(b) : other++;
      unicode::append(text[static_cast<size_t>(b)], c);
      byte[c] = b;
    }
  }
};
const ByteAlphabet& alphabet() {
  static const ByteAlphabet a;
  return a;
}

/// A stage that needs whole tokens: joins what a fusing stage before it hands on in parts.
class WholeTokens : public Stage {
 public:
  explicit WholeTokens(bool parts) : parts_(parts) {}
  void push(std::string_view token, bool joined) final {
    if (!parts_) {
      whole(token);
      return;
    }
    if (!joined) flush();
    pending_ += token;
    has_ = true;
  }
  void finish() override {
    flush();
    end();
    next->finish();
  }

 protected:
  virtual void whole(std::string_view token) = 0;
  virtual void end() {}

 private:
  void flush() {
    if (has_) whole(pending_);
    pending_.clear();
    has_ = false;
  }
  bool parts_, has_ = false;
  std::string pending_;
};

/// Bytes to text: whole characters go on, an unfinished one waits.
class Lossy {
 public:
  std::string feed(std::string_view bytes) {
    carry_ += bytes;
    std::string out;
    size_t at = 0;
    while (at < carry_.size()) {
      const int n = unicode::well_formed(carry_, at);
      if (n == 0) break;
      if (n > 0)
        out.append(carry_, at, static_cast<size_t>(n));
      else
        out += kReplacement;
      at += static_cast<size_t>(n > 0 ? n : -n);
    }
    carry_.erase(0, at);
    return out;
  }
  std::string rest() { return std::exchange(carry_, "").empty() ? "" : std::string(kReplacement); }

 private:
  std::string carry_;
};

class ByteLevelStage : public WholeTokens {
 public:
  using WholeTokens::WholeTokens;

 protected:
  void whole(std::string_view token) override {
    bytes_.clear();
    for (size_t at = 0; at < token.size();) {
      const int b = byte_of_char(unicode::next(token, at));
      if (b < 0) {
        bytes_ = token;
        break;
      }
      bytes_ += static_cast<char>(b);
    }
    give(text_.feed(bytes_));
  }
  void end() override {
    if (auto rest = text_.rest(); !rest.empty()) give(rest);
  }

 private:
  void give(const std::string& text) {
    if (text.empty()) return;
    next->push(text, started_);
    started_ = true;
  }
  std::string bytes_;
  Lossy text_;
  bool started_ = false;
};

class FuseStage : public Stage {
 public:
  void push(std::string_view token, bool) override {
    next->push(token, started_);
    started_ = true;
  }

 private:
  bool started_ = false;
};

class MetaspaceStage : public WholeTokens {
 public:
  MetaspaceStage(bool parts, char32_t replacement, bool drop_first)
      : WholeTokens(parts), replacement_(replacement), drop_(drop_first) {}

 protected:
  void whole(std::string_view token) override {
    std::string out;
    for (size_t at = 0; at < token.size();) {
      const size_t begin = at;
      if (unicode::next(token, at) != replacement_)
        out.append(token, begin, at - begin);
      else if (!drop_)
        out += ' ';
    }
    drop_ = false;
    next->push(out, false);
  }

 private:
  char32_t replacement_;
  bool drop_;
};

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  if (from.empty()) return;
  size_t at = text.find(from);
  if (at == std::string::npos) return;
  std::string out;
  size_t copied = 0;
  for (; at != std::string::npos; at = text.find(from, copied)) {
    out.append(text, copied, at - copied).append(to);
    copied = at + from.size();
  }
  out.append(text, copied);
  text = std::move(out);
}

void clean_up(std::string& text) {
  static constexpr std::pair<std::string_view, std::string_view> kRules[] = {
      {" .", "."},   {" ?", "?"},           {" !", "!"},   {" ,", ","},     {" ' ", "'"},   {" n't", "n't"},
      {" 'm", "'m"}, {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
  for (const auto& [from, to] : kRules) replace_all(text, from, to);
}

class WordPieceStage : public WholeTokens {
 public:
  WordPieceStage(bool parts, const std::string& prefix, bool cleanup)
      : WholeTokens(parts), prefix_(prefix), cleanup_(cleanup) {}

 protected:
  void whole(std::string_view token) override {
    std::string out;
    if (first_)
      out = token;
    else if (token.starts_with(prefix_))
      out = token.substr(prefix_.size());
    else
      out.append(" ").append(token);
    first_ = false;
    if (cleanup_) clean_up(out);
    next->push(out, false);
  }

 private:
  const std::string& prefix_;
  bool cleanup_, first_ = true;
};

class ReplaceStage : public WholeTokens {
 public:
  ReplaceStage(bool parts, const std::string& literal, const std::optional<Regex>& regex, const std::string& content)
      : WholeTokens(parts), literal_(literal), regex_(regex), content_(content) {}

 protected:
  void whole(std::string_view token) override {
    std::string out;
    if (!regex_) {
      out = token;
      replace_all(out, literal_, content_);
    } else if (!token.empty()) {
      size_t copied = 0, begin, end;
      for (Regex::Matches m(*regex_, token); m.next(begin, end); copied = end)
        out.append(token, copied, begin - copied).append(content_);
      out.append(token, copied);
    }
    next->push(out, false);
  }

 private:
  const std::string& literal_;
  const std::optional<Regex>& regex_;
  const std::string& content_;
};

/// <0xE2> and such. A run of bytes that is not valid UTF-8 as a whole becomes one U+FFFD a byte, so it waits for its
/// end.
class ByteFallbackStage : public WholeTokens {
 public:
  using WholeTokens::WholeTokens;

 protected:
  void whole(std::string_view token) override {
    if (const int b = byte(token); b >= 0) {
      bytes_ += static_cast<char>(b);
      return;
    }
    end();
    next->push(token, false);
  }
  void end() override {
    if (bytes_.empty()) return;
    bool valid = true;
    for (size_t at = 0; valid && at < bytes_.size();) {
      const int n = unicode::well_formed(bytes_, at);
      valid = n > 0;
      at += static_cast<size_t>(std::max(n, 1));
    }
    if (valid)
      next->push(bytes_, false);
    else
      for (size_t i = 0; i < bytes_.size(); ++i) next->push(kReplacement, false);
    bytes_.clear();
  }

 private:
  static int byte(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    const auto digit = [](char c) {
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                    : -1;
    };
    const int high = token[3] == '+' ? 0 : digit(token[3]), low = digit(token[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
  }
  std::string bytes_;
};

/// Cuts up to `start` of a character from the front of each token and up to `stop` from its end.
class StripStage : public Stage {
 public:
  StripStage(char32_t content, size_t start, size_t stop) : content_(content), start_(start), stop_(stop) {}
  void push(std::string_view token, bool joined) override {
    if (!joined) {
      drop_held();
      left_ = start_;
      joined_ = false;
    }
    size_t at = 0;
    while (left_ > 0 && at < token.size()) {
      size_t after = at;
      if (unicode::next(token, after) != content_) {
        left_ = 0;
        break;
      }
      at = after;
      --left_;
    }
    std::string text = std::move(held_) + std::string(token.substr(at));
    held_.clear();
    // What may be the token's end waits.
    size_t keep = text.size();
    for (size_t n = 0; n < stop_ && keep > 0 && unicode::previous(text, keep) == content_; ++n) {
      do --keep;
      while ((static_cast<unsigned char>(text[keep]) & 0xC0) == 0x80);
    }
    held_ = text.substr(keep);
    text.erase(keep);
    next->push(text, joined_);
    joined_ = true;
  }
  void finish() override {
    drop_held();
    next->finish();
  }

 private:
  void drop_held() { held_.clear(); }
  char32_t content_;
  size_t start_, stop_, left_ = 0;
  bool joined_ = false;
  std::string held_;
};

class BpeStage : public WholeTokens {
 public:
  BpeStage(bool parts, const std::string& suffix) : WholeTokens(parts), suffix_(suffix) {}

 protected:
  void whole(std::string_view token) override {
    give(" ");
    last_ = token;
    has_ = true;
  }
  void end() override { give(""); }

 private:
  void give(std::string_view replacement) {
    if (!has_) return;
    if (suffix_.empty()) {
      // An empty suffix stands between all characters, as in Rust's replace.
      std::string out(replacement);
      for (size_t at = 0; at < last_.size();) {
        const size_t begin = at;
        unicode::next(last_, at);
        out.append(last_, begin, at - begin).append(replacement);
      }
      last_ = std::move(out);
    } else {
      replace_all(last_, suffix_, replacement);
    }
    next->push(last_, false);
    has_ = false;
  }
  const std::string& suffix_;
  std::string last_;
  bool has_ = false;
};

class CtcStage : public WholeTokens {
 public:
  CtcStage(bool parts, const std::string& pad, const std::string& delimiter, bool cleanup)
      : WholeTokens(parts), pad_(pad), delimiter_(delimiter), cleanup_(cleanup) {}

 protected:
  void whole(std::string_view token) override {
    if (last_ && *last_ == token) return;
    last_ = token;
    std::string out(token);
    replace_all(out, pad_, "");
    if (cleanup_) {
      clean_up(out);
      replace_all(out, delimiter_, " ");
    }
    if (!out.empty()) next->push(out, false);
  }

 private:
  const std::string &pad_, &delimiter_;
  bool cleanup_;
  std::optional<std::string> last_;
};

/// One decoder of a file. `fuses`: what it hands on comes in parts.
template <class Make>
class Single : public Decoder {
 public:
  explicit Single(Make make) : make_(std::move(make)) {}
  void stages(std::vector<std::unique_ptr<Stage>>& out) const override {
    bool parts = false;
    for (const auto& s : out)
      parts |= dynamic_cast<const FuseStage*>(s.get()) || dynamic_cast<const ByteLevelStage*>(s.get());
    out.push_back(make_(parts));
  }

 private:
  Make make_;
};
template <class Make>
std::unique_ptr<Decoder> single(Make make) {
  return std::make_unique<Single<Make>>(std::move(make));
}

class SequenceDecoder : public Decoder {
 public:
  std::vector<std::unique_ptr<Decoder>> decoders;
  void stages(std::vector<std::unique_ptr<Stage>>& out) const override {
    for (const auto& d : decoders) d->stages(out);
  }
};

class ReplaceDecoder : public Decoder {
 public:
  explicit ReplaceDecoder(const Field& field) : content_(field.string("content")) {
    const Field pattern = field.at("pattern");
    if (pattern.has("String")) literal_ = pattern.string("String");
    if (literal_.empty()) {
      check(pattern.has("String") || pattern.has("Regex"), "{}: expected {{\"String\": ..}} or {{\"Regex\": ..}}.",
            pattern.where());
      regex_.emplace(pattern.has("Regex") ? pattern.string("Regex") : "", pattern.where());
    }
  }
  void stages(std::vector<std::unique_ptr<Stage>>& out) const override {
    single([this](bool parts) {
      return std::make_unique<ReplaceStage>(parts, literal_, regex_, content_);
    })->stages(out);
  }

 private:
  std::string content_, literal_;
  std::optional<Regex> regex_;
};

}  // namespace

const std::string& byte_char(unsigned char byte) {
  return alphabet().text[byte];
}
int byte_of_char(char32_t c) {
  return c < alphabet().byte.size() ? alphabet().byte[c] : -1;
}
void to_byte_level(std::string_view text, std::string& out) {
  const auto& table = alphabet().text;
  out.reserve(out.size() + text.size() + text.size() / 4);
  for (const char c : text) out += table[static_cast<unsigned char>(c)];
}

std::unique_ptr<Decoder> make_decoder(const Field& field, int depth) {
  check(depth < kMaxDepth, "{}: sequences are nested more than {} deep.", field.where(), kMaxDepth);
  if (field.json().is_null()) return nullptr;
  const std::string type = field.string("type");
  if (type == "Sequence") {
    auto sequence = std::make_unique<SequenceDecoder>();
    const Field list = field.at("decoders");
    for (size_t i = 0; i < list.array().size(); ++i)
      if (auto part = make_decoder(list.at(i), depth + 1)) sequence->decoders.push_back(std::move(part));
    return sequence;
  }
  if (type == "ByteLevel") return single([](bool parts) { return std::make_unique<ByteLevelStage>(parts); });
  if (type == "Fuse") return single([](bool) { return std::make_unique<FuseStage>(); });
  if (type == "ByteFallback") return single([](bool parts) { return std::make_unique<ByteFallbackStage>(parts); });
  if (type == "Replace") return std::make_unique<ReplaceDecoder>(field);
  if (type == "Metaspace") {
    const std::string scheme = field.string("prepend_scheme", "always");
    const bool drop = scheme != "never" && field.boolean("add_prefix_space", true);
    return single([c = field.character("replacement"), drop](bool parts) {
      return std::make_unique<MetaspaceStage>(parts, c, drop);
    });
  }
  if (type == "WordPiece")
    return single([prefix = field.string("prefix", "##"), cleanup = field.boolean("cleanup", true)](bool parts) {
      return std::make_unique<WordPieceStage>(parts, prefix, cleanup);
    });
  if (type == "Strip") {
    const int64_t start = field.integer("start", 0), stop = field.integer("stop", 0);
    check(start >= 0 && stop >= 0, "{}: start and stop are {} and {}; they must not be negative.", field.where(), start,
          stop);
    return single([c = field.character("content"), start, stop](bool) {
      return std::make_unique<StripStage>(c, static_cast<size_t>(start), static_cast<size_t>(stop));
    });
  }
  if (type == "BPEDecoder")
    return single(
        [suffix = field.string("suffix", "</w>")](bool parts) { return std::make_unique<BpeStage>(parts, suffix); });
  if (type == "CTC")
    return single([pad = field.string("pad_token", "<pad>"), delimiter = field.string("word_delimiter_token", "|"),
                   cleanup = field.boolean("cleanup", true)](bool parts) {
      return std::make_unique<CtcStage>(parts, pad, delimiter, cleanup);
    });
  fail(
      "{}: no decoder is called \"{}\"; there are Sequence, ByteLevel, Fuse, ByteFallback, Replace, Metaspace, "
      "WordPiece, Strip, "
      "BPEDecoder, CTC.",
      field.where(), type);
}

std::unique_ptr<Decoder> make_decoder(const nlohmann::json& json) {
  return make_decoder(Field(json, "built-in decoder"));
}

}  // namespace moiety::tokenizer
