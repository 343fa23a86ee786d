// Lexer and parser. White space follows Jinja2's own rules with trim_blocks and lstrip_blocks on: a block tag swallows
// the newline after it and the blanks before it on its line; `-` strips all white space, `+` strips none.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <unordered_set>

#include "moiety/io/jinja.h"
#include "moiety/io/unicode.h"

namespace moiety::jinja {
namespace {

constexpr int max_depth = 200;
constexpr int max_blocks = 100;

enum class Token : uint8_t {
  data,
  variable_begin,
  variable_end,
  block_begin,
  block_end,
  name,
  text,
  integer,
  real,
  op,
  end
};

struct Lexeme {
  Token token = Token::end;
  std::string text;  ///< operator, name, or the value of a string
  size_t at = 0;
  int64_t integer = 0;
  double real = 0;
};

class Lexer {
 public:
  explicit Lexer(const std::string& source) {
    source_.reserve(source.size());
    for (size_t i = 0; i < source.size(); ++i) {
      if (source[i] == '\r') {
        source_ += '\n';
        if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
      } else {
        source_ += source[i];
      }
    }
    if (!source_.empty() && source_.back() == '\n') source_.pop_back();
    source_ = unicode::sanitize(source_);
  }

  [[noreturn]] void fail_at(size_t at, const std::string& what) const {
    const auto [line, column] = position(at);
    fail("chat template, line {}, column {}: {}", line, column, what);
  }

  std::pair<int, int> position(size_t at) const {
    const auto head = std::string_view(source_).substr(0, at);
    const size_t line_start = head.rfind('\n') == std::string_view::npos ? 0 : head.rfind('\n') + 1;
    return {static_cast<int>(std::count(head.begin(), head.end(), '\n')) + 1,
            static_cast<int>(text_length(head.substr(line_start))) + 1};
  }

  char at(size_t i) const { return source_[i]; }

  std::vector<Lexeme> run() {
    const std::string_view s = source_;
    bool line_starting = true;
    while (at_ < s.size()) {
      const size_t tag = find_tag(at_);
      if (tag == std::string_view::npos) {
        push_data(s.substr(at_), at_);
        break;
      }
      const char kind = s[tag + 1];
      size_t after = tag + 2;
      char sign = after < s.size() && (s[after] == '-' || s[after] == '+') ? s[after] : 0;
      if (sign) ++after;
      push_data(before_tag(s.substr(at_, tag - at_), sign, kind != '{', line_starting), at_);
      if (kind == '#') {
        const size_t close = s.find("#}", after);
        if (close == std::string_view::npos) fail_at(tag, "this comment is not closed: #} is missing");
        at_ = close + 2;
        // The sign belongs to the comment's end only when it is behind the comment's begin.
        const char end_sign = close > after ? s[close - 1] : 0;
        behind_block(end_sign);
      } else if (kind == '{') {
        at_ = after;
        push(Token::variable_begin, tag);
        inside(true, tag);
      } else {
        size_t name = skip_space(after);
        size_t close = 0;
        if (s.substr(name, 3) == "raw" && raw_close(skip_space(name + 3), close)) {
          at_ = close;
          raw(tag);
        } else {
          at_ = after;
          push(Token::block_begin, tag);
          inside(false, tag);
        }
      }
      line_starting = at_ > 0 && s[at_ - 1] == '\n';
    }
    push(Token::end, s.size());
    return std::move(tokens_);
  }

 private:
  void push(Token token, size_t at, std::string text = {}) {
    Lexeme lexeme;
    lexeme.token = token;
    lexeme.text = std::move(text);
    lexeme.at = at;
    tokens_.push_back(std::move(lexeme));
  }
  void push_data(std::string_view text, size_t at) {
    if (!text.empty()) push(Token::data, at, std::string(text));
  }

  size_t find_tag(size_t from) const {
    for (size_t at = source_.find('{', from); at != std::string::npos && at + 1 < source_.size();
         at = source_.find('{', at + 1)) {
      const char c = source_[at + 1];
      if (c == '{' || c == '%' || c == '#') return at;
    }
    return std::string::npos;
  }

  std::string_view before_tag(std::string_view text, char sign, bool block, bool line_starting) const {
    if (sign == '-') return strip(text, nullptr, false, true);
    if (sign == '+' || !block) return text;
    const size_t newline = text.rfind('\n');
    const size_t start = newline == std::string_view::npos ? 0 : newline + 1;
    if ((start > 0 || line_starting) && strip(text.substr(start), nullptr, true, true).empty())
      return text.substr(0, start);
    return text;
  }

  size_t skip_space(size_t at) const {
    while (at < source_.size()) {
      size_t behind = at;
      if (!is_space(unicode::next_any(source_, behind))) break;
      at = behind;
    }
    return at;
  }

  void behind_block(char sign) {
    if (sign == '-') {
      at_ = skip_space(at_);
    } else if (sign != '+' && at_ < source_.size() && source_[at_] == '\n') {
      ++at_;
    }
  }

  bool raw_close(size_t at, size_t& close) const {
    const std::string_view s = source_;
    if (s.substr(at, 3) == "-%}") {
      close = skip_space(at + 3);
      return true;
    }
    if (s.substr(at, 2) == "%}") {
      close = at + 2;
      return true;
    }
    return false;
  }

  void raw(size_t begin) {
    const std::string_view s = source_;
    for (size_t tag = s.find("{%", at_); tag != std::string_view::npos; tag = s.find("{%", tag + 2)) {
      size_t after = tag + 2;
      const char sign = after < s.size() && (s[after] == '-' || s[after] == '+') ? s[after] : 0;
      if (sign) ++after;
      after = skip_space(after);
      if (s.substr(after, 6) != "endraw") continue;
      after = skip_space(after + 6);
      char end_sign = 0;
      if (after < s.size() && (s[after] == '-' || s[after] == '+')) end_sign = s[after++];
      if (s.substr(after, 2) != "%}") continue;
      const bool line_starting = at_ > 0 && s[at_ - 1] == '\n';
      push_data(before_tag(s.substr(at_, tag - at_), sign, true, line_starting), at_);
      at_ = after + 2;
      behind_block(end_sign);
      return;
    }
    fail_at(begin, "this raw block is not closed: endraw is missing");
  }

  // The inside of {{ }} or {% %}.
  void inside(bool variable, size_t begin) {
    const std::string_view s = source_;
    std::string open;
    while (true) {
      at_ = skip_space(at_);
      if (at_ >= s.size())
        fail_at(begin,
                variable ? "this expression is not closed: }} is missing" : "this tag is not closed: %} is missing");
      if (open.empty()) {
        const std::string_view close = variable ? "}}" : "%}";
        const char sign = s[at_] == '-' || (s[at_] == '+' && !variable) ? s[at_] : 0;
        if (s.substr(at_ + (sign ? 1 : 0), 2) == close) {
          push(variable ? Token::variable_end : Token::block_end, at_);
          at_ += sign ? 3 : 2;
          if (variable) {
            if (sign == '-') at_ = skip_space(at_);
          } else {
            behind_block(sign);
          }
          return;
        }
      }
      const char c = s[at_];
      const auto digit = [](char d) { return d >= '0' && d <= '9'; };
      if (digit(c)) {
        number();
      } else if (c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                 static_cast<unsigned char>(c) >= 0x80) {
        const size_t start = at_;
        while (at_ < s.size() && (s[at_] == '_' || digit(s[at_]) || (s[at_] >= 'a' && s[at_] <= 'z') ||
                                  (s[at_] >= 'A' && s[at_] <= 'Z') || static_cast<unsigned char>(s[at_]) >= 0x80))
          ++at_;
        push(Token::name, start, std::string(s.substr(start, at_ - start)));
      } else if (c == '"' || c == '\'') {
        text(c);
      } else {
        static const std::string_view operators[] = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                                     "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                                     ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};
        const auto* found = std::find_if(std::begin(operators), std::end(operators),
                                         [&](std::string_view o) { return s.substr(at_, o.size()) == o; });
        if (found == std::end(operators)) fail_at(at_, fmt::format("unexpected character '{}'", c));
        if (c == '(' || c == '[' || c == '{') {
          open += c == '(' ? ')' : c == '[' ? ']' : '}';
        } else if (c == ')' || c == ']' || c == '}') {
          if (open.empty()) fail_at(at_, fmt::format("unexpected '{}'", c));
          if (open.back() != c) fail_at(at_, fmt::format("unexpected '{}', expected '{}'", c, open.back()));
          open.pop_back();
        }
        push(Token::op, at_, std::string(*found));
        at_ += found->size();
      }
    }
  }

  size_t digits(size_t at) const {  // behind \d(_?\d)*, or `at` itself
    const auto digit = [&](size_t i) { return i < source_.size() && source_[i] >= '0' && source_[i] <= '9'; };
    if (!digit(at)) return at;
    ++at;
    while (digit(at) || (at < source_.size() && source_[at] == '_' && digit(at + 1))) ++at;
    return at;
  }

  void number() {
    const size_t start = at_;
    const auto clean = [&](size_t from, size_t to) {
      std::string out = source_.substr(from, to - from);
      out.erase(std::remove(out.begin(), out.end(), '_'), out.end());
      return out;
    };
    size_t end = digits(start);
    bool real = false;
    const bool behind_dot = start > 0 && source_[start - 1] == '.';
    if (!behind_dot) {
      if (end < source_.size() && source_[end] == '.' && digits(end + 1) > end + 1) end = digits(end + 1), real = true;
      if (end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
        size_t exponent = end + 1;
        if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) ++exponent;
        if (digits(exponent) > exponent) end = digits(exponent), real = true;
      }
    }
    Lexeme lexeme;
    lexeme.at = start;
    if (real) {
      lexeme.token = Token::real;
      const std::string digits_only = clean(start, end);
      std::from_chars(digits_only.data(), digits_only.data() + digits_only.size(), lexeme.real);
    } else {
      lexeme.token = Token::integer;
      int base = 10;
      size_t from = start;
      if (source_[start] == '0' && start + 1 < source_.size()) {
        const char mark = static_cast<char>(source_[start + 1] | 0x20);
        const int marked = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 0;
        const auto valid = [&](size_t i) {
          if (i >= source_.size()) return false;
          const char c = static_cast<char>(source_[i] | 0x20);
          const int value = source_[i] >= '0' && source_[i] <= '9' ? source_[i] - '0'
                            : c >= 'a' && c <= 'f'                 ? c - 'a' + 10
                                                                   : 99;
          return value < marked;
        };
        if (marked && valid(start + 2)) {
          base = marked;
          from = start + 2;
          end = from;
          while (valid(end) || (end < source_.size() && source_[end] == '_' && valid(end + 1))) ++end;
        }
      }
      const std::string digits_only = clean(from, end);
      const auto result =
          std::from_chars(digits_only.data(), digits_only.data() + digits_only.size(), lexeme.integer, base);
      if (result.ec != std::errc()) fail_at(start, "this integer does not fit 64 bits");
    }
    at_ = end;
    tokens_.push_back(std::move(lexeme));
  }

  void text(char quote) {
    const size_t start = at_++;
    std::string out;
    const auto hex = [&](size_t count) {
      char32_t value = 0;
      for (size_t i = 0; i < count; ++i, ++at_) {
        const char c = at_ < source_.size() ? source_[at_] : 0;
        const char l = static_cast<char>(c | 0x20);
        if (c >= '0' && c <= '9') {
          value = value * 16 + static_cast<char32_t>(c - '0');
        } else if (l >= 'a' && l <= 'f') {
          value = value * 16 + static_cast<char32_t>(l - 'a' + 10);
        } else {
          fail_at(start, "this string has an unfinished \\x, \\u or \\U escape");
        }
      }
      if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF))
        fail_at(start, "this string has an escape that is no character");
      unicode::append(out, value);
    };
    while (true) {
      if (at_ >= source_.size()) fail_at(start, "this string is not closed");
      const char c = source_[at_++];
      if (c == quote) break;
      if (c != '\\') {
        out += c;
        continue;
      }
      if (at_ >= source_.size()) fail_at(start, "this string is not closed");
      const char e = source_[at_++];
      switch (e) {
        case 'n':
          out += '\n';
          break;
        case 't':
          out += '\t';
          break;
        case 'r':
          out += '\r';
          break;
        case 'a':
          out += '\a';
          break;
        case 'b':
          out += '\b';
          break;
        case 'f':
          out += '\f';
          break;
        case 'v':
          out += '\v';
          break;
        case '\\':
        case '\'':
        case '"':
          out += e;
          break;
        case '\n':
          break;
        case 'x':
          hex(2);
          break;
        case 'u':
          hex(4);
          break;
        case 'U':
          hex(8);
          break;
        case 'N':
          fail_at(start, "named characters (\\N{...}) are not supported: write \\u and the number");
        default:
          if (e >= '0' && e <= '7') {
            char32_t value = static_cast<char32_t>(e - '0');
            for (int i = 0; i < 2 && at_ < source_.size() && source_[at_] >= '0' && source_[at_] <= '7'; ++i)
              value = value * 8 + static_cast<char32_t>(source_[at_++] - '0');
            unicode::append(out, value);
          } else {
            out += '\\';
            out += e;
          }
      }
    }
    push(Token::text, start, std::move(out));
  }

  std::string source_;
  size_t at_ = 0;
  std::vector<Lexeme> tokens_;
};

class Parser {
 public:
  explicit Parser(const std::string& source) : lexer_(source), tokens_(lexer_.run()) {}

  Template run() {
    Template out;
    out.body = body({});
    return out;
  }

 private:
  using Names = std::vector<std::string_view>;

  const Lexeme& current() const { return tokens_[at_]; }
  const Lexeme& ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  Lexeme take() {
    Lexeme t = current();
    if (at_ + 1 < tokens_.size()) ++at_;
    return t;
  }
  bool is_op(std::string_view op) const { return current().token == Token::op && current().text == op; }
  bool is_name(std::string_view name) const { return current().token == Token::name && current().text == name; }
  bool skip_op(std::string_view op) { return is_op(op) && (take(), true); }
  bool skip_name(std::string_view name) { return is_name(name) && (take(), true); }
  int line() { return line_of(current().at); }
  int line_of(size_t at) {
    // Asked in rising order almost always: remember the last answer.
    if (at < line_at_) line_at_ = 0, line_ = 1;
    for (; line_at_ < at; ++line_at_) line_ += lexer_.at(line_at_) == '\n';
    return line_;
  }

  std::string describe(const Lexeme& t) const {
    switch (t.token) {
      case Token::data:
        return "text";
      case Token::variable_begin:
        return "{{";
      case Token::variable_end:
        return "}}";
      case Token::block_begin:
        return "{%";
      case Token::block_end:
        return "%}";
      case Token::text:
        return "a string";
      case Token::integer:
      case Token::real:
        return "a number";
      case Token::end:
        return "the end of the template";
      default:
        return "'" + t.text + "'";
    }
  }
  [[noreturn]] void fail_here(const std::string& what) const { lexer_.fail_at(current().at, what); }
  [[noreturn]] void unexpected(std::string_view wanted) const {
    fail_here(fmt::format("expected {}, got {}", wanted, describe(current())));
  }
  void expect_op(std::string_view op) {
    if (!skip_op(op)) unexpected(fmt::format("'{}'", op));
  }
  std::string expect_name() {
    if (current().token != Token::name) unexpected("a name");
    return take().text;
  }
  void expect(Token token, std::string_view what) {
    if (current().token != token) unexpected(what);
    take();
  }

  struct Nest {
    explicit Nest(Parser& p) : parser(p) {
      if (++parser.nesting_ > max_depth) parser.fail_here(fmt::format("expressions nest more than {} deep", max_depth));
    }
    ~Nest() { --parser.nesting_; }
    Parser& parser;
  };

  ExpressionPtr make(Op op, int line) {
    auto e = std::make_unique<Expression>();
    e->op = op;
    e->line = line;
    return e;
  }
  // Counts the depth once the children are in place: a long chain a+b+c+... is a deep tree without deep parsing.
  ExpressionPtr done(ExpressionPtr e) const {
    for (const auto& part : e->parts)
      if (part) e->depth = std::max(e->depth, part->depth + 1);
    if (e->star) e->depth = std::max(e->depth, e->star->depth + 1);
    if (e->star_star) e->depth = std::max(e->depth, e->star_star->depth + 1);
    if (e->depth > max_depth) fail_here(fmt::format("expressions nest more than {} deep", max_depth));
    return e;
  }
  ExpressionPtr binary(Op op, ExpressionPtr a, ExpressionPtr b, int line) {
    auto e = make(op, line);
    e->parts.push_back(std::move(a));
    e->parts.push_back(std::move(b));
    return done(std::move(e));
  }

  // --- Statements ---
  Body body(const Names& ends) {
    Body out;
    while (true) {
      const auto& t = current();
      if (t.token == Token::end) {
        if (!ends.empty())
          fail_here(fmt::format("the template ends, but {} is missing for the tag in line {}", fmt::join(ends, " or "),
                                opened_.empty() ? 1 : opened_.back()));
        return out;
      }
      if (t.token == Token::data) {
        auto s = statement(Do::data);
        s->text = take().text;
        out.push_back(std::move(s));
      } else if (t.token == Token::variable_begin) {
        auto s = statement(Do::print);
        take();
        s->expressions.push_back(tuple(true));
        expect(Token::variable_end, "}}");
        out.push_back(std::move(s));
      } else {
        expect(Token::block_begin, "{%");
        if (current().token == Token::name && std::find(ends.begin(), ends.end(), current().text) != ends.end())
          return out;
        out.push_back(parse_statement());
        expect(Token::block_end, "%}");
      }
    }
  }

  std::unique_ptr<Statement> statement(Do what) {
    auto s = std::make_unique<Statement>();
    s->what = what;
    s->line = line();
    return s;
  }

  // The body of a tag that just began: from its %} to one of `ends`, which stays current.
  Body statements(const Names& ends) {
    skip_op(":");
    expect(Token::block_end, "%}");
    if (++blocks_ > max_blocks) fail_here(fmt::format("tags nest more than {} deep", max_blocks));
    opened_.push_back(line());
    Body out = body(ends);
    opened_.pop_back();
    --blocks_;
    return out;
  }
  Body closed(std::string_view end) {
    Body out = statements({end});
    take();
    return out;
  }

  std::unique_ptr<Statement> parse_statement() {
    if (current().token != Token::name) unexpected("the name of a tag");
    const std::string tag = current().text;
    if (tag == "for") return parse_for();
    if (tag == "if") return parse_if();
    if (tag == "set") return parse_set();
    if (tag == "macro") return parse_macro();
    if (tag == "call") return parse_call_block();
    if (tag == "with") return parse_with();
    if (tag == "filter") {
      auto s = statement(Do::filter);
      take();
      s->expression = filters(nullptr, true);
      s->body = closed("endfilter");
      return s;
    }
    if (tag == "generation") {
      auto s = statement(Do::generation);
      take();
      const int loops = std::exchange(loops_, 0);
      s->body = closed("endgeneration");
      loops_ = loops;
      return s;
    }
    if (tag == "print") {
      auto s = statement(Do::print);
      take();
      while (current().token != Token::block_end) {
        if (!s->expressions.empty()) expect_op(",");
        s->expressions.push_back(expression());
      }
      return s;
    }
    if (tag == "break" || tag == "continue") {
      auto s = statement(tag == "break" ? Do::stop : Do::next);
      if (loops_ == 0) fail_here(fmt::format("'{}' outside of a loop", tag));
      take();
      return s;
    }
    static const std::unordered_set<std::string> refused = {"include", "import", "from",
                                                            "extends", "block",  "autoescape"};
    if (refused.count(tag))
      fail_here(fmt::format(
          "'{}' is not supported: a chat template is one text without other templates, blocks or escaping modes", tag));
    fail_here(fmt::format("unknown tag '{}'", tag));
  }

  std::unique_ptr<Statement> parse_for() {
    auto s = statement(Do::loop);
    take();
    ++loops_;
    s->targets.push_back(target(false, "in"));
    if (!skip_name("in")) unexpected("'in'");
    s->expression = tuple(false, "recursive");
    if (skip_name("if")) s->test = expression();
    s->recursive = skip_name("recursive");
    s->body = statements({"endfor", "else"});
    --loops_;
    if (take().text == "else") s->otherwise = closed("endfor");
    return s;
  }

  std::unique_ptr<Statement> parse_if() {
    auto s = statement(Do::when);
    take();
    while (true) {
      Branch branch;
      branch.test = tuple(false);
      branch.body = statements({"elif", "else", "endif"});
      s->branches.push_back(std::move(branch));
      const std::string end = take().text;
      if (end == "elif") continue;
      if (end == "else") s->branches.push_back({nullptr, closed("endif")});
      return s;
    }
  }

  std::unique_ptr<Statement> parse_set() {
    auto s = statement(Do::set);
    take();
    s->targets.push_back(target(true));
    if (skip_op("=")) {
      s->expression = tuple(true);
      return s;
    }
    s->what = Do::set_block;
    if (is_op("|")) s->expression = filters(nullptr, false);
    s->body = closed("endset");
    return s;
  }

  void signature(Statement& s) {
    expect_op("(");
    while (!is_op(")")) {
      if (!s.parameters.empty()) expect_op(",");
      s.parameters.push_back(expect_name());
      if (skip_op("=")) {
        s.expressions.push_back(expression());
      } else if (!s.expressions.empty()) {
        fail_here("a parameter without a default follows one with a default");
      }
    }
    expect_op(")");
  }

  // caller, varargs and kwargs exist only in macros that name them.
  template <class Parse>
  Body macro_body(Statement& s, const Parse& parse) {
    const size_t first = at_;
    const int loops = std::exchange(loops_, 0);
    Body out = parse();
    loops_ = loops;
    const auto names = [&](std::string_view name) {
      if (std::find(s.parameters.begin(), s.parameters.end(), name) != s.parameters.end()) return false;
      return std::any_of(tokens_.begin() + static_cast<std::ptrdiff_t>(first),
                         tokens_.begin() + static_cast<std::ptrdiff_t>(at_),
                         [&](const Lexeme& t) { return t.token == Token::name && t.text == name; });
    };
    s.uses_caller = names("caller");
    s.uses_varargs = names("varargs");
    s.uses_kwargs = names("kwargs");
    return out;
  }

  std::unique_ptr<Statement> parse_macro() {
    auto s = statement(Do::macro);
    take();
    s->text = expect_name();
    signature(*s);
    s->body = macro_body(*s, [&] { return closed("endmacro"); });
    return s;
  }

  std::unique_ptr<Statement> parse_call_block() {
    auto s = statement(Do::call);
    take();
    if (is_op("(")) signature(*s);
    s->expression = expression();
    if (s->expression->op != Op::call) fail_here("'call' needs a call: {% call name(...) %}");
    s->body = macro_body(*s, [&] { return closed("endcall"); });
    return s;
  }

  std::unique_ptr<Statement> parse_with() {
    auto s = statement(Do::with);
    take();
    while (current().token != Token::block_end) {
      if (!s->targets.empty()) expect_op(",");
      s->targets.push_back(target(false));
      expect_op("=");
      s->expressions.push_back(expression());
    }
    s->body = closed("endwith");
    return s;
  }

  ExpressionPtr target(bool fields, std::string_view end = {}) {
    const int first_line = line();
    std::vector<ExpressionPtr> parts;
    bool is_tuple = false;
    while (true) {
      if (!parts.empty()) expect_op(",");
      if (tuple_end() || (!end.empty() && is_name(end))) break;
      parts.push_back(target_part(fields));
      if (!is_op(",")) break;
      is_tuple = true;
    }
    if (parts.empty()) unexpected("a name to assign to");
    if (!is_tuple) return std::move(parts[0]);
    auto e = make(Op::tuple, first_line);
    e->parts = std::move(parts);
    return done(std::move(e));
  }
  ExpressionPtr target_part(bool fields) {
    Nest nest(*this);
    if (skip_op("(")) {
      auto e = target(false);
      expect_op(")");
      return e;
    }
    if (current().token != Token::name) unexpected("a name to assign to");
    auto e = make(Op::name, line());
    e->name = take().text;
    static const std::unordered_set<std::string> constants = {"true", "false", "none", "True", "False", "None"};
    if (constants.count(e->name) || (e->name == "loop" && loops_ > 0))
      fail_here(fmt::format("'{}' cannot be assigned to", e->name));
    if (fields && skip_op(".")) {
      auto field = make(Op::field, e->line);
      field->name = expect_name();
      field->parts.push_back(std::move(e));
      return done(std::move(field));
    }
    return e;
  }

  // --- Expressions, loosest binding first ---
  bool tuple_end() const {
    return current().token == Token::variable_end || current().token == Token::block_end || is_op(")");
  }

  ExpressionPtr tuple(bool conditional, std::string_view end = {}, bool parentheses = false) {
    const int first_line = line();
    std::vector<ExpressionPtr> parts;
    bool is_tuple = false;
    while (true) {
      if (!parts.empty()) expect_op(",");
      if (tuple_end() || (!end.empty() && is_name(end))) break;
      parts.push_back(conditional ? expression() : parse_or());
      if (!is_op(",")) break;
      is_tuple = true;
    }
    if (!is_tuple) {
      if (!parts.empty()) return std::move(parts[0]);
      if (!parentheses) unexpected("an expression");
    }
    auto e = make(Op::tuple, first_line);
    e->parts = std::move(parts);
    return done(std::move(e));
  }

  ExpressionPtr expression() {
    Nest nest(*this);
    const int first_line = line();
    auto value = parse_or();
    while (skip_name("if")) {
      auto e = make(Op::choose, first_line);
      e->parts.push_back(parse_or());
      e->parts.push_back(std::move(value));
      e->parts.push_back(skip_name("else") ? expression() : nullptr);
      value = done(std::move(e));
    }
    return value;
  }
  ExpressionPtr parse_or() {
    auto left = parse_and();
    while (is_name("or")) {
      const int at = line();
      take();
      left = binary(Op::either, std::move(left), parse_and(), at);
    }
    return left;
  }
  ExpressionPtr parse_and() {
    auto left = parse_not();
    while (is_name("and")) {
      const int at = line();
      take();
      left = binary(Op::both, std::move(left), parse_not(), at);
    }
    return left;
  }
  ExpressionPtr parse_not() {
    if (!is_name("not")) return parse_compare();
    Nest nest(*this);
    auto e = make(Op::invert, line());
    take();
    e->parts.push_back(parse_not());
    return done(std::move(e));
  }
  ExpressionPtr parse_compare() {
    const int first_line = line();
    auto first = parse_sum();
    ExpressionPtr e;
    while (true) {
      std::string op;
      if (current().token == Token::op &&
          (is_op("==") || is_op("!=") || is_op("<") || is_op("<=") || is_op(">") || is_op(">="))) {
        op = take().text;
      } else if (skip_name("in")) {
        op = "in";
      } else if (is_name("not") && ahead().token == Token::name && ahead().text == "in") {
        take();
        take();
        op = "not in";
      } else {
        break;
      }
      if (!e) {
        e = make(Op::compare, first_line);
        e->parts.push_back(std::move(first));
      }
      e->names.push_back(op);
      e->parts.push_back(parse_sum());
    }
    return e ? done(std::move(e)) : std::move(first);
  }
  ExpressionPtr parse_sum() {
    auto left = parse_concat();
    while (is_op("+") || is_op("-")) {
      const int at = line();
      const Op op = take().text == "+" ? Op::add : Op::subtract;
      left = binary(op, std::move(left), parse_concat(), at);
    }
    return left;
  }
  ExpressionPtr parse_concat() {
    const int first_line = line();
    auto first = parse_product();
    if (!is_op("~")) return first;
    auto e = make(Op::concat, first_line);
    e->parts.push_back(std::move(first));
    while (skip_op("~")) e->parts.push_back(parse_product());
    return done(std::move(e));
  }
  ExpressionPtr parse_product() {
    auto left = parse_power();
    while (is_op("*") || is_op("/") || is_op("//") || is_op("%")) {
      const int at = line();
      const std::string op = take().text;
      left = binary(op == "*"    ? Op::multiply
                    : op == "/"  ? Op::divide
                    : op == "//" ? Op::floor_divide
                                 : Op::modulo,
                    std::move(left), parse_power(), at);
    }
    return left;
  }
  ExpressionPtr parse_power() {
    auto left = parse_unary(true);
    while (is_op("**")) {
      const int at = line();
      take();
      left = binary(Op::power, std::move(left), parse_unary(true), at);
    }
    return left;
  }
  ExpressionPtr parse_unary(bool with_filters) {
    Nest nest(*this);
    ExpressionPtr e;
    if (is_op("-") || is_op("+")) {
      e = make(is_op("-") ? Op::negate : Op::plus, line());
      take();
      e->parts.push_back(parse_unary(false));
      e = done(std::move(e));
    } else {
      e = primary();
    }
    e = postfix(std::move(e));
    return with_filters ? filter_expression(std::move(e)) : std::move(e);
  }

  ExpressionPtr constant(Value value) {
    auto e = make(Op::constant, line());
    e->value = std::move(value);
    return e;
  }

  ExpressionPtr primary() {
    const auto& t = current();
    switch (t.token) {
      case Token::name: {
        if (t.text == "true" || t.text == "True" || t.text == "false" || t.text == "False") {
          auto e = constant(Value(t.text == "true" || t.text == "True"));
          take();
          return e;
        }
        if (t.text == "none" || t.text == "None") {
          auto e = constant(Value::none());
          take();
          return e;
        }
        auto e = make(Op::name, line());
        e->name = take().text;
        return e;
      }
      case Token::text: {
        std::string text;
        const int at = line();
        while (current().token == Token::text) text += take().text;
        auto e = constant(Value(std::move(text)));
        e->line = at;
        return e;
      }
      case Token::integer: {
        auto e = constant(Value(t.integer));
        take();
        return e;
      }
      case Token::real: {
        auto e = constant(Value(t.real));
        take();
        return e;
      }
      default:
        break;
    }
    if (skip_op("(")) {
      auto e = tuple(true, {}, true);
      expect_op(")");
      return e;
    }
    if (is_op("[")) {
      auto e = make(Op::list, line());
      take();
      while (!is_op("]")) {
        if (!e->parts.empty()) expect_op(",");
        if (is_op("]")) break;
        e->parts.push_back(expression());
      }
      expect_op("]");
      return done(std::move(e));
    }
    if (is_op("{")) {
      auto e = make(Op::dict, line());
      take();
      while (!is_op("}")) {
        if (!e->parts.empty()) expect_op(",");
        if (is_op("}")) break;
        e->parts.push_back(expression());
        expect_op(":");
        e->parts.push_back(expression());
      }
      expect_op("}");
      return done(std::move(e));
    }
    unexpected("an expression");
  }

  ExpressionPtr postfix(ExpressionPtr e) {
    while (true) {
      const int at = line();
      if (skip_op(".")) {
        if (current().token == Token::integer) {
          auto key = constant(Value(current().integer));
          take();
          e = binary(Op::item, std::move(e), std::move(key), at);
        } else {
          auto a = make(Op::attribute, at);
          a->name = expect_name();
          a->parts.push_back(std::move(e));
          e = done(std::move(a));
        }
      } else if (is_op("[")) {
        e = subscript(std::move(e));
      } else if (is_op("(")) {
        e = call(std::move(e));
      } else {
        return e;
      }
    }
  }

  ExpressionPtr subscript(ExpressionPtr object) {
    const int at = line();
    expect_op("[");
    std::vector<ExpressionPtr> keys;
    bool sliced = false;
    while (!is_op("]")) {
      if (!keys.empty()) expect_op(",");
      ExpressionPtr part;
      if (!is_op(":")) part = expression();
      if (!is_op(":")) {
        keys.push_back(std::move(part));
        continue;
      }
      take();
      auto e = make(Op::slice, at);
      e->parts.push_back(nullptr);
      e->parts.push_back(std::move(part));
      const auto open = [&] { return !is_op(":") && !is_op("]") && !is_op(","); };
      e->parts.push_back(open() ? expression() : nullptr);
      e->parts.push_back(skip_op(":") && open() ? expression() : nullptr);
      keys.push_back(std::move(e));
      sliced = true;
    }
    expect_op("]");
    if (keys.size() == 1 && sliced) {
      keys[0]->parts[0] = std::move(object);
      return done(std::move(keys[0]));
    }
    if (sliced) fail_here("a slice inside of a tuple of keys is not supported");
    if (keys.size() == 1) return binary(Op::item, std::move(object), std::move(keys[0]), at);
    auto key = make(Op::tuple, at);
    key->parts = std::move(keys);
    return binary(Op::item, std::move(object), done(std::move(key)), at);
  }

  // Adds the arguments behind the parts that are there: positional ones, then keyword ones (their names in `names`).
  void call_arguments(Expression& e) {
    expect_op("(");
    bool comma = false;
    const auto ensure = [&](bool ok) {
      if (!ok) fail_here("invalid order of arguments in a call");
    };
    while (!is_op(")")) {
      if (comma) {
        expect_op(",");
        if (is_op(")")) break;
      }
      if (skip_op("*")) {
        ensure(!e.star && !e.star_star);
        e.star = expression();
      } else if (skip_op("**")) {
        ensure(!e.star_star);
        e.star_star = expression();
      } else if (current().token == Token::name && ahead().token == Token::op && ahead().text == "=") {
        ensure(!e.star_star);
        e.names.push_back(take().text);
        if (std::find(e.names.begin(), e.names.end() - 1, e.names.back()) != e.names.end() - 1)
          fail_here(fmt::format("the keyword argument '{}' is given twice", e.names.back()));
        take();
        e.parts.push_back(expression());
      } else {
        ensure(!e.star && !e.star_star && e.names.empty());
        e.parts.push_back(expression());
      }
      comma = true;
    }
    expect_op(")");
  }

  ExpressionPtr call(ExpressionPtr callee) {
    Nest nest(*this);
    auto e = make(Op::call, line());
    e->parts.push_back(std::move(callee));
    call_arguments(*e);
    return done(std::move(e));
  }

  std::string dotted() {
    std::string name = expect_name();
    while (skip_op(".")) {
      name += '.';
      name += expect_name();
    }
    return name;
  }

  ExpressionPtr filters(ExpressionPtr e, bool begun) {
    while (begun || is_op("|")) {
      if (!begun) take();
      begun = false;
      auto f = make(Op::filter, line());
      f->name = dotted();
      f->parts.push_back(std::move(e));
      if (is_op("(")) call_arguments(*f);
      e = done(std::move(f));
    }
    return e;
  }

  ExpressionPtr filter_expression(ExpressionPtr e) {
    while (true) {
      if (is_op("|")) {
        e = filters(std::move(e), false);
      } else if (is_name("is")) {
        e = parse_test(std::move(e));
      } else if (is_op("(")) {
        e = call(std::move(e));
      } else {
        return e;
      }
    }
  }

  ExpressionPtr parse_test(ExpressionPtr e) {
    auto t = make(Op::test, line());
    take();
    const bool negated = skip_name("not");
    t->name = dotted();
    t->parts.push_back(std::move(e));
    const auto& c = current();
    if (is_op("(")) {
      call_arguments(*t);
    } else if ((c.token == Token::name && c.text != "else" && c.text != "or" && c.text != "and") ||
               c.token == Token::text || c.token == Token::integer || c.token == Token::real || is_op("[") ||
               is_op("{")) {
      if (is_name("is")) fail_here("tests cannot be chained with 'is'");
      t->parts.push_back(postfix(primary()));
    }
    ExpressionPtr out = done(std::move(t));
    if (!negated) return out;
    auto n = make(Op::invert, out->line);
    n->parts.push_back(std::move(out));
    return done(std::move(n));
  }

  Lexer lexer_;
  std::vector<Lexeme> tokens_;
  size_t at_ = 0;
  size_t line_at_ = 0;
  int line_ = 1;
  int nesting_ = 0, blocks_ = 0, loops_ = 0;
  std::vector<int> opened_;
};

}  // namespace

Template parse(const std::string& source) {
  return Parser(source).run();
}

}  // namespace moiety::jinja
