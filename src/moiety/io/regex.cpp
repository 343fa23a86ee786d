#include "moiety/io/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/io/unicode.h"

namespace moiety {
namespace {

constexpr std::string_view kSpace =
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
constexpr std::string_view kHex = "0-9A-Fa-f";
constexpr size_t kMaxPattern = 1 << 16;
constexpr int kMaxNesting = 50;

std::string range_text(char32_t first, char32_t last) {
  return fmt::format("\\x{{{:x}}}-\\x{{{:x}}}", static_cast<uint32_t>(first), static_cast<uint32_t>(last));
}

/// Class items for young code points whose category starts with one of `categories`.
std::string young(std::initializer_list<std::string_view> categories) {
  std::string out;
  for (const auto& r : unicode::new_code_points()) {
    const std::string_view category = r.category;
    for (auto c : categories)
      if (category.substr(0, c.size()) == c) {
        out += range_text(r.first, r.last);
        break;
      }
  }
  return out;
}

std::string word_items() {
  return "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}" + young({"L", "M", "Nd", "Pc"});
}

struct LongName {
  std::string_view name, items;
};
constexpr LongName kLongNames[] = {
    {"letter", "L"},
    {"uppercaseletter", "Lu"},
    {"lowercaseletter", "Ll"},
    {"titlecaseletter", "Lt"},
    {"modifierletter", "Lm"},
    {"otherletter", "Lo"},
    {"mark", "M"},
    {"nonspacingmark", "Mn"},
    {"spacingmark", "Mc"},
    {"enclosingmark", "Me"},
    {"number", "N"},
    {"decimalnumber", "Nd"},
    {"letternumber", "Nl"},
    {"othernumber", "No"},
    {"punctuation", "P"},
    {"connectorpunctuation", "Pc"},
    {"dashpunctuation", "Pd"},
    {"openpunctuation", "Ps"},
    {"closepunctuation", "Pe"},
    {"initialpunctuation", "Pi"},
    {"finalpunctuation", "Pf"},
    {"otherpunctuation", "Po"},
    {"symbol", "S"},
    {"mathsymbol", "Sm"},
    {"currencysymbol", "Sc"},
    {"modifiersymbol", "Sk"},
    {"othersymbol", "So"},
    {"separator", "Z"},
    {"spaceseparator", "Zs"},
    {"lineseparator", "Zl"},
    {"paragraphseparator", "Zp"},
    {"other", "C"},
    {"control", "Cc"},
    {"format", "Cf"},
    {"privateuse", "Co"},
    {"unassigned", "Cn"},
    {"surrogate", "Cs"},
    {"digit", "Nd"},
    {"cntrl", "Cc"},
};

bool compiles(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP,
                                   &error, &offset, nullptr);
  pcre2_code_free(code);
  return code != nullptr;
}

/// Class items of \p{name}.
std::string property_items(std::string_view name) {
  std::string key;
  for (char c : name)
    if (c != ' ' && c != '_' && c != '-') key += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
  if (key == "space" || key == "whitespace") return std::string(kSpace);
  if (key == "word") return word_items();
  if (key == "alpha" || key == "alphabetic") return "\\p{Alphabetic}" + young({"L"});
  if (key == "alnum") return "\\p{Alphabetic}\\p{Nd}" + young({"L", "Nd"});
  if (key == "upper" || key == "uppercase") return "\\p{Uppercase}" + young({"Lu"});
  if (key == "lower" || key == "lowercase") return "\\p{Lowercase}" + young({"Ll"});
  if (key == "punct") return "\\p{P}$+<=>\\^`|~" + young({"P"});
  if (key == "xdigit") return std::string(kHex);
  if (key == "any") return "\\x{0}-\\x{10ffff}";
  if (key == "l&" || key == "lc" || key == "casedletter") return "\\p{Lu}\\p{Ll}\\p{Lt}" + young({"Lu", "Ll", "Lt"});
  std::string category;
  for (const auto& n : kLongNames)
    if (n.name == key) category = n.items;
  if (category.empty() && key.size() <= 2 && !key.empty() &&
      std::string_view("lmnpszc").find(key[0]) != std::string_view::npos) {
    category = key;
    category[0] = static_cast<char>(category[0] - 32);
  }
  if (!category.empty()) return fmt::format("\\p{{{}}}", category) + young({category});
  // A bare script name means the script's extensions too in newer PCRE2, the script alone in Oniguruma.
  std::string items = fmt::format("\\p{{sc:{}}}", name);
  if (!compiles(items)) items = fmt::format("\\p{{{}}}", name);
  if (key == "han")
    for (const auto& r : unicode::new_han()) items += range_text(r.first, r.last);
  return items;
}

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where) : p_(pattern), where_(where) {}

  std::string run() {
    check(p_.size() <= kMaxPattern, "{}: the regular expression has {} bytes; at most {} are read.", where_, p_.size(),
          kMaxPattern);
    std::vector<size_t> groups;
    while (i_ < p_.size()) {
      const char c = p_[i_];
      if (c == '\\') {
        atom();
        out_ += escape();
      } else if (c == '[') {
        atom();
        ++i_;
        out_ += char_class(0);
      } else if (c == '(') {
        groups.push_back(out_.size());
        open_group();
      } else if (c == ')') {
        if (!groups.empty()) {
          atom_ = groups.back();
          groups.pop_back();
        }
        out_ += c;
        ++i_;
      } else if (c == '{') {
        interval();
      } else if (c == '*' || c == '+' || c == '?' || c == '|' || c == '^' || c == '$') {
        out_ += c;
        ++i_;
      } else {
        atom();
        copy_char();
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void bad(std::string_view what) const {
    fail("{}: the regular expression {} is malformed at byte {}: {}.", where_, quote(p_), i_, what);
  }
  static std::string quote(std::string_view s) { return '"' + std::string(s.substr(0, 200)) + '"'; }

  void atom() { atom_ = out_.size(); }

  void copy_char() {
    const size_t n = std::min(unicode::char_length(static_cast<unsigned char>(p_[i_])), p_.size() - i_);
    out_.append(p_, i_, n);
    i_ += n;
  }

  void open_group() {
    out_ += '(';
    ++i_;
    if (i_ >= p_.size() || p_[i_] != '?') return;
    out_ += '?';
    ++i_;
    // Option letters: dot-matches-newline is m here, s in PCRE2.
    size_t j = i_;
    while (j < p_.size() && std::string_view("imx-").find(p_[j]) != std::string_view::npos) ++j;
    if (j > i_ && j < p_.size() && (p_[j] == ':' || p_[j] == ')')) {
      for (; i_ < j; ++i_) out_ += p_[i_] == 'm' ? 's' : p_[i_];
      return;
    }
    while (i_ < p_.size() && std::string_view("=!<>:#").find(p_[i_]) != std::string_view::npos) out_ += p_[i_++];
  }

  void interval() {
    size_t j = i_ + 1;
    std::string low, high;
    bool comma = false;
    while (j < p_.size() && p_[j] >= '0' && p_[j] <= '9') low += p_[j++];
    if (j < p_.size() && p_[j] == ',') {
      comma = true;
      ++j;
      while (j < p_.size() && p_[j] >= '0' && p_[j] <= '9') high += p_[j++];
    }
    if (j >= p_.size() || p_[j] != '}' || (low.empty() && high.empty())) {
      atom();
      out_ += "\\{";
      ++i_;
      return;
    }
    out_ += '{' + (low.empty() ? "0" : low) + (comma ? "," + high : "") + '}';
    i_ = j + 1;
    // A plus behind an interval repeats the whole, it is not possessive.
    if (i_ < p_.size() && p_[i_] == '+') {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  /// \p{..}, \P{..}, \p{^..}: items and whether negated. i_ stands at the p.
  std::string property(bool& negated) {
    negated = p_[i_] == 'P';
    ++i_;
    if (i_ >= p_.size() || p_[i_] != '{') bad("\\p needs a property name in braces");
    const size_t close = p_.find('}', i_);
    if (close == std::string_view::npos) bad("no } after \\p{");
    std::string_view name = p_.substr(i_ + 1, close - i_ - 1);
    i_ = close + 1;
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.remove_prefix(1);
    }
    for (char c : name)
      if (!(c >= 'a' && c <= 'z') && !(c >= 'A' && c <= 'Z') && !(c >= '0' && c <= '9') &&
          std::string_view(" _-&").find(c) == std::string_view::npos)
        bad("a property name holds letters, digits, spaces and _ - &");
    return property_items(name);
  }

  /// An escape that is a set of characters. i_ stands at the letter. False: not such an escape, nothing consumed.
  bool set_escape(std::string& items, bool& negated) {
    const char c = p_[i_];
    if (c == 'p' || c == 'P') {
      items = property(negated);
      return true;
    }
    switch (c) {
      case 's':
      case 'S':
        items = kSpace;
        break;
      case 'w':
      case 'W':
        items = word_items();
        break;
      case 'd':
      case 'D':
        items = property_items("Nd");
        break;
      case 'h':
      case 'H':
        items = kHex;
        break;
      default:
        return false;
    }
    negated = c < 'a';
    ++i_;
    return true;
  }

  /// \xHH, \x{H..}, \uHHHH as \x{..}; "" when it is none of them.
  std::string code_escape() {
    const char c = p_[i_];
    if (c != 'x' && c != 'u') return "";
    const auto hex = [](char d) { return (d >= '0' && d <= '9') || (d >= 'a' && d <= 'f') || (d >= 'A' && d <= 'F'); };
    size_t j = i_ + 1;
    std::string digits;
    if (c == 'x' && j < p_.size() && p_[j] == '{') {
      ++j;
      while (j < p_.size() && hex(p_[j])) digits += p_[j++];
      if (j >= p_.size() || p_[j] != '}') bad("no } after \\x{");
      ++j;
    } else {
      const size_t most = c == 'x' ? 2 : 4;
      while (j < p_.size() && digits.size() < most && hex(p_[j])) digits += p_[j++];
    }
    if (digits.empty()) bad("no hexadecimal digits");
    i_ = j;
    return "\\x{" + digits + "}";
  }

  std::string escape() {
    ++i_;
    if (i_ >= p_.size()) bad("it ends in a backslash");
    std::string items;
    bool negated = false;
    if (set_escape(items, negated)) return (negated ? "[^" : "[") + items + "]";
    if (auto code = code_escape(); !code.empty()) return code;
    const char c = p_[i_];
    if (c == 'b' || c == 'B') {
      ++i_;
      const std::string w = "[" + word_items() + "]";
      return c == 'b' ? "(?:(?<=" + w + ")(?!" + w + ")|(?<!" + w + ")(?=" + w + "))"
                      : "(?:(?<=" + w + ")(?=" + w + ")|(?<!" + w + ")(?!" + w + "))";
    }
    const size_t n = std::min(unicode::char_length(static_cast<unsigned char>(c)), p_.size() - i_);
    std::string out = n == 1 ? "\\" : "";
    out.append(p_, i_, n);
    i_ += n;
    return out;
  }

  /// A character class as an expression for one character; i_ stands behind its [.
  std::string char_class(int depth) {
    if (depth > kMaxNesting) bad("classes are nested too deeply");
    bool negated = false;
    if (i_ < p_.size() && p_[i_] == '^') {
      negated = true;
      ++i_;
    }
    std::vector<std::string> parts;         // joined by &&
    std::string items;                      // of the current part
    std::vector<std::string> alternatives;  // sets that items cannot hold
    bool single = false;                    // the last item is one character: a range may follow
    bool first = true;
    const auto end_part = [&] {
      std::string u = items.empty() ? "" : "[" + items + "]";
      for (const auto& a : alternatives) u += (u.empty() ? "" : "|") + a;
      if (u.empty()) u = "(?!)";
      if (!alternatives.empty()) u = "(?:" + u + ")";
      parts.push_back(std::move(u));
      items.clear();
      alternatives.clear();
      single = false;
    };
    for (;; first = false) {
      if (i_ >= p_.size()) bad("a class has no ]");
      const char c = p_[i_];
      if (c == ']' && !first) {
        ++i_;
        break;
      }
      if (c == '&' && i_ + 1 < p_.size() && p_[i_ + 1] == '&') {
        i_ += 2;
        end_part();
        continue;
      }
      if (c == '[') {
        if (i_ + 1 < p_.size() && p_[i_ + 1] == ':') {
          const size_t close = p_.find(":]", i_);
          if (close == std::string_view::npos) bad("no :] after [:");
          std::string_view name = p_.substr(i_ + 2, close - i_ - 2);
          const bool not_it = !name.empty() && name[0] == '^';
          if (not_it) name.remove_prefix(1);
          i_ = close + 2;
          for (char d : name)
            if (d < 'a' || d > 'z') bad("the name in [: :] is not a word");
          static constexpr std::string_view kOwn[] = {"alpha", "digit", "alnum", "upper",  "lower",
                                                      "punct", "space", "word",  "xdigit", "cntrl"};
          const bool own = std::find(std::begin(kOwn), std::end(kOwn), name) != std::end(kOwn);
          const std::string set = own ? property_items(name) : fmt::format("[:{}:]", name);
          if (not_it)
            alternatives.push_back("[^" + set + "]");
          else
            items += set;
        } else {
          ++i_;
          alternatives.push_back(char_class(depth + 1));
        }
        single = false;
        continue;
      }
      if (c == '-' && single && i_ + 1 < p_.size() && p_[i_ + 1] != ']' && p_[i_ + 1] != '[' && !set_follows(i_ + 1)) {
        items += '-';
        ++i_;
        items += literal();
        single = false;
        continue;
      }
      if (c == '\\' && i_ + 1 < p_.size()) {
        std::string set;
        bool not_it = false;
        ++i_;
        if (set_escape(set, not_it)) {
          if (not_it)
            alternatives.push_back("[^" + set + "]");
          else
            items += set;
          single = false;
          continue;
        }
        --i_;
      }
      items += literal();
      single = true;
    }
    end_part();
    if (parts.size() == 1 && !negated) return parts[0];
    if (parts.size() == 1 && parts[0].size() > 2 && parts[0][0] == '[' && parts[0][1] != '^') {
      return "[^" + parts[0].substr(1);
    }
    std::string all;
    for (size_t k = 1; k < parts.size(); ++k) all += "(?=" + parts[k] + ")";
    all += parts[0];
    return negated ? "(?:(?!" + all + ")(?s:.))" : "(?:" + all + ")";
  }

  bool set_follows(size_t at) const {
    return p_[at] == '\\' && at + 1 < p_.size() &&
           std::string_view("pPsSwWdDhH").find(p_[at + 1]) != std::string_view::npos;
  }

  /// One character of a class, escaped for PCRE2.
  std::string literal() {
    if (p_[i_] == '\\') {
      ++i_;
      if (i_ >= p_.size()) bad("it ends in a backslash");
      if (auto code = code_escape(); !code.empty()) return code;
      if (p_[i_] == 'b') {
        ++i_;
        return "\\x{8}";
      }
      if (std::string_view("nrtfvae").find(p_[i_]) != std::string_view::npos) {
        const char c = p_[i_++];
        return c == 'v' ? "\\x{b}" : std::string("\\") + c;
      }
    }
    size_t at = i_;
    const auto lead = static_cast<unsigned char>(p_[i_]);
    const size_t n = unicode::char_length(lead);
    if (i_ + n > p_.size()) bad("a character is cut off");
    const char32_t c = unicode::next(p_, at);
    i_ = at;
    return fmt::format("\\x{{{:x}}}", static_cast<uint32_t>(c));
  }

  std::string_view p_;
  const std::string& where_;
  std::string out_;
  size_t i_ = 0;
  size_t atom_ = 0;
};

/// What one thread needs to run matches.
struct Runner {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 * 1024, 16 * 1024 * 1024, nullptr);
  Runner() {
    pcre2_jit_stack_assign(context, nullptr, stack);
    pcre2_set_heap_limit(context, 256 * 1024);
  }
  ~Runner() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
};

}  // namespace

struct Regex::Code {
  pcre2_code* code = nullptr;
  ~Code() { pcre2_code_free(code); }
};

std::string Regex::translate(std::string_view pattern, const std::string& where) {
  return Translator(pattern, where).run();
}

Regex::Regex(std::string_view pattern, const std::string& where) : where_(where) {
  for (size_t at = 0; at < pattern.size();) {
    const int n = unicode::well_formed(pattern, at);
    check(n > 0, "{}: the regular expression is not valid UTF-8 at byte {}.", where, at);
    at += static_cast<size_t>(n);
  }
  const std::string translated = translate(pattern, where);
  auto code = std::make_shared<Code>();
  int error = 0;
  PCRE2_SIZE offset = 0;
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), 100);
  code->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset, context.get());
  if (!code->code) {
    unsigned char message[256];
    pcre2_get_error_message(error, message, sizeof message);
    fail("{}: the regular expression \"{}\" does not compile: {}.", where, pattern.substr(0, 200),
         reinterpret_cast<const char*>(message));
  }
  // Without JIT (other processors) the interpreter gives the same matches.
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);
  code_ = std::move(code);
}

bool Regex::search(std::string_view text, size_t from, size_t& begin, size_t& end) const {
  thread_local Runner runner;
  check(runner.data && runner.context, "{}: no memory for a match.", where_);
  pcre2_set_match_limit(runner.context,
                        static_cast<uint32_t>(std::min<size_t>(10'000'000 + 16 * text.size(), UINT32_MAX)));
  const int rc = pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                             PCRE2_NO_UTF_CHECK, runner.data, runner.context);
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  if (rc < 0) {
    unsigned char message[256];
    pcre2_get_error_message(rc, message, sizeof message);
    fail("{}: matching the regular expression at byte {} of a text of {} bytes failed: {}.", where_, from, text.size(),
         reinterpret_cast<const char*>(message));
  }
  const PCRE2_SIZE* ovector = pcre2_get_ovector_pointer(runner.data);
  begin = ovector[0];
  end = ovector[1];
  // \K in a lookahead can turn a match around.
  check(begin <= end && begin >= from, "{}: the regular expression matches backwards.", where_);
  return true;
}

bool Regex::Matches::next(size_t& begin, size_t& end) {
  while (from_ <= text_.size()) {
    if (!regex_.search(text_, from_, begin, end)) {
      from_ = text_.size() + 1;
      return false;
    }
    if (begin == end && end == last_end_) {
      from_ += from_ < text_.size() ? unicode::char_length(static_cast<unsigned char>(text_[from_])) : 1;
      continue;
    }
    from_ = last_end_ = end;
    return true;
  }
  return false;
}

}  // namespace moiety
