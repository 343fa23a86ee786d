// Methods of str, list, tuple, dict; filters, tests and global functions, with Jinja's and Python's names and defaults.
#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <ctime>
#include <functional>
#include <limits>
#include <set>

#include "moiety/io/jinja.h"
#include "moiety/io/unicode.h"

namespace moiety::jinja {
namespace {

// Arguments by name: positional ones first, as Python binds them.
class Bound {
 public:
  Bound(const std::string& what, const Arguments& arguments, std::initializer_list<const char*> names,
        size_t required = 0)
      : what_(what), names_(names), values_(names.size()) {
    check(arguments.positional.size() <= names.size(), "{}() takes at most {} arguments ({} given)", what, names.size(),
          arguments.positional.size());
    for (size_t i = 0; i < arguments.positional.size(); ++i) values_[i] = arguments.positional[i];
    for (const auto& [name, value] : arguments.keyword) {
      const auto found = std::find(names_.begin(), names_.end(), name);
      check(found != names_.end(), "{}() got an unexpected keyword argument '{}'", what, name);
      auto& slot = values_[static_cast<size_t>(found - names_.begin())];
      check(!slot, "{}() got multiple values for argument '{}'", what, name);
      slot = value;
    }
    for (size_t i = 0; i < required; ++i)
      check(values_[i].has_value(), "{}() missing required argument '{}'", what, names_[i]);
  }
  bool has(size_t i) const { return values_[i].has_value(); }
  const Value& operator[](size_t i) const { return *values_[i]; }
  Value get(size_t i, Value otherwise) const { return values_[i] ? *values_[i] : std::move(otherwise); }
  bool truth(size_t i, bool otherwise = false) const { return values_[i] ? values_[i]->truth() : otherwise; }
  int64_t integer(size_t i, int64_t otherwise) const {
    if (!values_[i]) return otherwise;
    if (values_[i]->is_undefined()) fail("{}", values_[i]->missing());
    check(values_[i]->is_integral(), "{}(): '{}' must be an integer, not {}", what_, names_[i], type_name(*values_[i]));
    return values_[i]->integer();
  }
  const std::string& text(size_t i) const {
    if (values_[i]->is_undefined()) fail("{}", values_[i]->missing());
    check(values_[i]->is_text(), "{}(): '{}' must be str, not {}", what_, names_[i], type_name(*values_[i]));
    return values_[i]->text();
  }

 private:
  std::string what_;
  std::vector<const char*> names_;
  std::vector<std::optional<Value>> values_;
};

// --- Methods of strings
// ----------------------------------------------------------------------------------------------------

utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}
bool is_alpha(char32_t c) {
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_LU || k == UTF8PROC_CATEGORY_LL || k == UTF8PROC_CATEGORY_LT ||
         k == UTF8PROC_CATEGORY_LM || k == UTF8PROC_CATEGORY_LO;
}
bool is_decimal(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_ND;
}
bool is_digit(char32_t c) {
  return is_decimal(c) || c == 0xB2 || c == 0xB3 || c == 0xB9 ||
         (c >= 0x2070 && c <= 0x2079 && c != 0x2071 && c != 0x2072 && c != 0x2073) || (c >= 0x2080 && c <= 0x2089) ||
         (c >= 0x2460 && c <= 0x2468);
}
bool is_numeric(char32_t c) {
  return is_digit(c) || category(c) == UTF8PROC_CATEGORY_NL || category(c) == UTF8PROC_CATEGORY_NO;
}
bool is_upper_case(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_LU || (c >= 0x2160 && c <= 0x216F) || (c >= 0x24B6 && c <= 0x24CF);
}
bool is_lower_case(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_LL || c == 0xAA || c == 0xBA || (c >= 0x2170 && c <= 0x217F) ||
         (c >= 0x24D0 && c <= 0x24E9) || (c >= 0x2B0 && c <= 0x2B8) || (c >= 0x1D2C && c <= 0x1D6A);
}
bool is_title_case(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_LT;
}
bool is_cased(char32_t c) {
  return is_upper_case(c) || is_lower_case(c) || is_title_case(c);
}

bool all_of(std::string_view text, bool (*test)(char32_t)) {
  if (text.empty()) return false;
  for (size_t at = 0; at < text.size();)
    if (!test(unicode::next_any(text, at))) return false;
  return true;
}
bool all_cased(std::string_view text, bool upper_case) {
  bool any = false;
  for (size_t at = 0; at < text.size();) {
    const char32_t c = unicode::next_any(text, at);
    if (upper_case ? is_lower_case(c) || is_title_case(c) : is_upper_case(c) || is_title_case(c)) return false;
    any |= upper_case ? is_upper_case(c) : is_lower_case(c);
  }
  return any;
}

std::string capitalize(std::string_view text) {
  const auto points = unicode::decode(text);
  std::string out;
  for (size_t i = 0; i < points.size(); ++i) {
    if (i == 0) {
      append_title(out, points[i]);
    } else {
      append_lower(out, points, i);
    }
  }
  return out;
}

std::string title(std::string_view text) {
  const auto points = unicode::decode(text);
  std::string out;
  bool inside = false;
  for (size_t i = 0; i < points.size(); ++i) {
    if (inside) {
      append_lower(out, points, i);
    } else {
      append_title(out, points[i]);
    }
    inside = is_cased(points[i]) || (inside && !is_alpha(points[i]) && category(points[i]) == UTF8PROC_CATEGORY_LM);
  }
  return out;
}

std::string swapcase(std::string_view text) {
  const auto points = unicode::decode(text);
  std::string out;
  for (size_t i = 0; i < points.size(); ++i) {
    if (is_upper_case(points[i])) {
      append_lower(out, points, i);
    } else if (is_lower_case(points[i])) {
      append_upper(out, points[i]);
    } else {
      unicode::append(out, points[i]);
    }
  }
  return out;
}

std::string replace(Run& run, const std::string& text, const std::string& from, const std::string& to, int64_t count) {
  std::string out;
  const auto guard = [&] {
    check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the template makes a string of more than {} bytes",
          run.max_bytes());
  };
  run.step(text.size() / 16);
  if (from.empty()) {
    size_t at = 0;
    while (count != 0) {
      out += to;
      --count;
      if (at >= text.size()) return out;
      const size_t before = at;
      unicode::next_any(text, at);
      out.append(text, before, at - before);
      guard();
    }
    return out + text.substr(at);
  }
  size_t at = 0;
  while (count != 0) {
    const size_t found = text.find(from, at);
    if (found == std::string::npos) break;
    out.append(text, at, found - at);
    out += to;
    at = found + from.size();
    --count;
    guard();
  }
  return out.append(text, at, std::string::npos);
}

std::vector<std::string> split(Run& run, const std::string& text, const std::string* separator, int64_t most,
                               bool from_right) {
  run.step(text.size() / 16);
  std::vector<std::string> out;
  if (separator) {
    check(!separator->empty(), "empty separator");
    if (!from_right) {
      size_t at = 0;
      while (most != 0) {
        const size_t found = text.find(*separator, at);
        if (found == std::string::npos) break;
        out.push_back(text.substr(at, found - at));
        at = found + separator->size();
        --most;
      }
      out.push_back(text.substr(at));
      return out;
    }
    size_t end = text.size();
    while (most != 0 && end >= separator->size()) {
      const size_t found = text.rfind(*separator, end - separator->size());
      if (found == std::string::npos) break;
      out.push_back(text.substr(found + separator->size(), end - found - separator->size()));
      end = found;
      --most;
    }
    out.push_back(text.substr(0, end));
    std::reverse(out.begin(), out.end());
    return out;
  }
  std::string_view rest = text;
  if (!from_right) {
    while (true) {
      rest = strip(rest, nullptr, true, false);
      if (rest.empty()) return out;
      if (most == 0) {
        out.emplace_back(rest);
        return out;
      }
      size_t end = 0;
      while (end < rest.size()) {
        size_t at = end;
        if (is_space(unicode::next_any(rest, at))) break;
        end = at;
      }
      out.emplace_back(rest.substr(0, end));
      rest = rest.substr(end);
      --most;
    }
  }
  while (true) {
    rest = strip(rest, nullptr, false, true);
    if (rest.empty()) break;
    if (most == 0) {
      out.emplace_back(rest);
      break;
    }
    size_t begin = rest.size();
    while (begin > 0) {
      size_t at = begin - 1;
      while (at > 0 && (static_cast<unsigned char>(rest[at]) & 0xC0) == 0x80) --at;
      size_t behind = at;
      if (is_space(unicode::next_any(rest, behind))) break;
      begin = at;
    }
    out.emplace_back(rest.substr(begin));
    rest = rest.substr(0, begin);
    --most;
  }
  std::reverse(out.begin(), out.end());
  return out;
}

std::vector<std::string> splitlines(const std::string& text, bool keep) {
  std::vector<std::string> out;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t before = at;
    const char32_t c = unicode::next_any(text, at);
    const bool end = (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
    if (!end) continue;
    if (c == '\r' && at < text.size() && text[at] == '\n') ++at;
    out.push_back(text.substr(begin, (keep ? at : before) - begin));
    begin = at;
  }
  if (begin < text.size()) out.push_back(text.substr(begin));
  return out;
}

Value texts(Run& run, std::vector<std::string> parts, bool markup) {
  std::vector<Value> out;
  out.reserve(parts.size());
  for (auto& p : parts) out.push_back(run.text(std::move(p), markup));
  return run.list(std::move(out));
}

// The part of `text` that start and end (code points) name, and how many bytes lie before it.
std::string_view part(const Bound& b, size_t start, const std::string& text, size_t& offset, bool& possible) {
  const auto size = static_cast<int64_t>(text_length(text));
  const auto index = [&](size_t i, int64_t otherwise) {
    if (!b.has(i) || b[i].is_none()) return otherwise;
    int64_t v = b.integer(i, 0);
    if (v < 0) v = std::max<int64_t>(v + size, 0);
    return v;
  };
  const int64_t from = index(start, 0), to = std::min(index(start + 1, size), size);
  possible = from <= to && from <= size;
  const auto byte = [&](int64_t point) {
    size_t at = 0;
    for (; point > 0 && at < text.size(); --point) unicode::next_any(text, at);
    return at;
  };
  offset = byte(std::min(from, size));
  const size_t end = std::max(byte(to), offset);
  return std::string_view(text).substr(offset, end - offset);
}

std::string justify(Run& run, const std::string& text, int64_t width, const std::string& fill, int side) {
  check(text_length(fill) == 1, "The fill character must be exactly one character long");
  check(width <= run.max_bytes() / 4, "the template makes a string of more than {} bytes", run.max_bytes());
  const int64_t gap = width - static_cast<int64_t>(text_length(text));
  if (gap <= 0) return text;
  // Python puts the odd blank of center() to the left when the width is odd.
  const int64_t left = side == 0 ? gap / 2 + (gap & width & 1) : side > 0 ? gap : 0;
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += text;
  for (int64_t i = left; i < gap; ++i) out += fill;
  return out;
}

using TextMethod = Value (*)(Run&, const Value&, const Arguments&);

Value plain(Run& run, const Value& self, const Arguments& a, const char* name,
            std::string (*function)(std::string_view)) {
  Bound(name, a, {});
  return run.text(function(self.text()), self.markup());
}
Value question(const Value& self, const Arguments& a, const char* name, bool (*test)(char32_t)) {
  Bound(name, a, {});
  return Value(all_of(self.text(), test));
}
Value stripped(Run& run, const Value& self, const Arguments& a, const char* name, bool left, bool right) {
  const Bound b(name, a, {"chars"});
  const std::string* chars = b.has(0) && !b[0].is_none() ? &b.text(0) : nullptr;
  run.step(chars ? self.text().size() / 16 * (1 + chars->size() / 64) : 0);
  return run.text(std::string(strip(self.text(), chars, left, right)), self.markup());
}
Value splitting(Run& run, const Value& self, const Arguments& a, const char* name, bool from_right) {
  const Bound b(name, a, {"sep", "maxsplit"});
  const std::string* separator = b.has(0) && !b[0].is_none() ? &b.text(0) : nullptr;
  return texts(run, split(run, self.text(), separator, b.integer(1, -1), from_right), self.markup());
}
Value affix(const Value& self, const Arguments& a, const char* name, bool start) {
  const Bound b(name, a, {"prefix", "start", "end"}, 1);
  size_t offset = 0;
  bool possible = true;
  const auto text = part(b, 1, self.text(), offset, possible);
  const auto test = [&](const Value& v) {
    if (v.is_undefined() || !v.is_text())
      fail("{} first arg must be str or a tuple of str, not {}", name, type_name(v));
    return possible && (start ? text.starts_with(v.text()) : text.ends_with(v.text()));
  };
  if (b[0].is(Kind::list) && b[0].list().shape == Shape::tuple)
    return Value(std::any_of(b[0].list().items.begin(), b[0].list().items.end(), test));
  return Value(test(b[0]));
}
Value finding(Run& run, const Value& self, const Arguments& a, const char* name, bool from_right, bool must) {
  const Bound b(name, a, {"sub", "start", "end"}, 1);
  const std::string& sub = b.text(0);
  run.step(self.text().size() / 16);
  size_t offset = 0;
  bool possible = true;
  const auto text = part(b, 1, self.text(), offset, possible);
  const size_t found = !possible ? std::string_view::npos : from_right ? text.rfind(sub) : text.find(sub);
  if (found == std::string_view::npos) {
    check(!must, "substring not found");
    return Value(int64_t{-1});
  }
  return Value(static_cast<int64_t>(text_length(std::string_view(self.text()).substr(0, offset + found))));
}
Value partition(Run& run, const Value& self, const Arguments& a, const char* name, bool from_right) {
  const Bound b(name, a, {"sep"}, 1);
  const auto &text = self.text(), &separator = b.text(0);
  check(!separator.empty(), "empty separator");
  const size_t found = from_right ? text.rfind(separator) : text.find(separator);
  std::vector<std::string> parts;
  if (found == std::string::npos) {
    parts = from_right ? std::vector<std::string>{"", "", text} : std::vector<std::string>{text, "", ""};
  } else {
    parts = {text.substr(0, found), separator, text.substr(found + separator.size())};
  }
  std::vector<Value> out;
  for (auto& p : parts) out.push_back(run.text(std::move(p), self.markup()));
  return run.list(std::move(out), Shape::tuple);
}

std::string escaped_unless_markup(const Value& self, const Value& value, const std::string& text) {
  return self.markup() && !value.markup() ? escape_html(text) : text;
}

const std::unordered_map<std::string_view, TextMethod>& text_methods() {
  static const std::unordered_map<std::string_view, TextMethod> table = {
      {"upper", [](Run& r, const Value& s, const Arguments& a) { return plain(r, s, a, "upper", upper); }},
      {"lower", [](Run& r, const Value& s, const Arguments& a) { return plain(r, s, a, "lower", lower); }},
      {"title", [](Run& r, const Value& s, const Arguments& a) { return plain(r, s, a, "title", title); }},
      {"capitalize", [](Run& r, const Value& s, const Arguments& a) { return plain(r, s, a, "capitalize", capitalize); }},
      {"swapcase", [](Run& r, const Value& s, const Arguments& a) { return plain(r, s, a, "swapcase", swapcase); }},
      {"strip", [](Run& r, const Value& s, const Arguments& a) { return stripped(r, s, a, "strip", true, true); }},
      {"lstrip", [](Run& r, const Value& s, const Arguments& a) { return stripped(r, s, a, "lstrip", true, false); }},
      {"rstrip", [](Run& r, const Value& s, const Arguments& a) { return stripped(r, s, a, "rstrip", false, true); }},
      {"split", [](Run& r, const Value& s, const Arguments& a) { return splitting(r, s, a, "split", false); }},
      {"rsplit", [](Run& r, const Value& s, const Arguments& a) { return splitting(r, s, a, "rsplit", true); }},
      {"startswith", [](Run&, const Value& s, const Arguments& a) { return affix(s, a, "startswith", true); }},
      {"endswith", [](Run&, const Value& s, const Arguments& a) { return affix(s, a, "endswith", false); }},
      {"find", [](Run& r, const Value& s, const Arguments& a) { return finding(r, s, a, "find", false, false); }},
      {"rfind", [](Run& r, const Value& s, const Arguments& a) { return finding(r, s, a, "rfind", true, false); }},
      {"index", [](Run& r, const Value& s, const Arguments& a) { return finding(r, s, a, "index", false, true); }},
      {"rindex", [](Run& r, const Value& s, const Arguments& a) { return finding(r, s, a, "rindex", true, true); }},
      {"partition", [](Run& r, const Value& s, const Arguments& a) { return partition(r, s, a, "partition", false); }},
      {"rpartition", [](Run& r, const Value& s, const Arguments& a) { return partition(r, s, a, "rpartition", true); }},
      {"isalpha", [](Run&, const Value& s, const Arguments& a) { return question(s, a, "isalpha", is_alpha); }},
      {"isdigit", [](Run&, const Value& s, const Arguments& a) { return question(s, a, "isdigit", is_digit); }},
      {"isdecimal", [](Run&, const Value& s, const Arguments& a) { return question(s, a, "isdecimal", is_decimal); }},
      {"isnumeric", [](Run&, const Value& s, const Arguments& a) { return question(s, a, "isnumeric", is_numeric); }},
      {"isalnum", [](Run&, const Value& s, const Arguments& a) { return question(s, a, "isalnum", [](char32_t c) { return is_alpha(c) || is_numeric(c); }); }},
      {"isspace", [](Run&, const Value& s, const Arguments& a) { return question(s, a, "isspace", is_space); }},
      {"isprintable", [](Run&, const Value& s, const Arguments& a) { Bound("isprintable", a, {}); return Value(s.text().empty() || all_of(s.text(), printable)); }},
      {"isascii", [](Run&, const Value& s, const Arguments& a) { Bound("isascii", a, {}); return Value(text_length(s.text()) == s.text().size() && std::all_of(s.text().begin(), s.text().end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; })); }},
      {"isupper", [](Run&, const Value& s, const Arguments& a) { Bound("isupper", a, {}); return Value(all_cased(s.text(), true)); }},
      {"islower", [](Run&, const Value& s, const Arguments& a) { Bound("islower", a, {}); return Value(all_cased(s.text(), false)); }},
      {"replace",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("replace", a, {"old", "new", "count"}, 2);
         return r.text(replace(r, s.text(), escaped_unless_markup(s, b[0], b.text(0)), escaped_unless_markup(s, b[1], b.text(1)), b.integer(2, -1)), s.markup());
       }},
      {"count",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("count", a, {"sub", "start", "end"}, 1);
         const std::string& sub = b.text(0);
         r.step(s.text().size() / 16);
         size_t offset = 0;
         bool possible = true;
         const auto text = part(b, 1, s.text(), offset, possible);
         if (!possible) return Value(int64_t{0});
         if (sub.empty()) return Value(static_cast<int64_t>(text_length(text)) + 1);
         int64_t count = 0;
         for (size_t at = text.find(sub); at != std::string_view::npos; at = text.find(sub, at + sub.size())) ++count;
         return Value(count);
       }},
      {"join",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("join", a, {"iterable"}, 1);
         std::string out;
         bool first = true;
         for (const auto& i : iterate(r, b[0])) {
           if (!i.is_text()) fail("sequence item: expected str instance, {} found", type_name(i));
           if (!first) out += s.text();
           first = false;
           out += escaped_unless_markup(s, i, i.text());
           check(static_cast<int64_t>(out.size()) <= r.max_bytes(), "the template makes a string of more than {} bytes", r.max_bytes());
         }
         return r.text(std::move(out), s.markup());
       }},
      {"splitlines",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("splitlines", a, {"keepends"});
         return texts(r, splitlines(s.text(), b.truth(0)), s.markup());
       }},
      {"removeprefix",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("removeprefix", a, {"prefix"}, 1);
         return s.text().starts_with(b.text(0)) ? r.text(s.text().substr(b.text(0).size()), s.markup()) : s;
       }},
      {"removesuffix",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("removesuffix", a, {"suffix"}, 1);
         return s.text().ends_with(b.text(0)) ? r.text(s.text().substr(0, s.text().size() - b.text(0).size()), s.markup()) : s;
       }},
      {"center", [](Run& r, const Value& s, const Arguments& a) { const Bound b("center", a, {"width", "fillchar"}, 1); return r.text(justify(r, s.text(), b.integer(0, 0), b.has(1) ? b.text(1) : " ", 0), s.markup()); }},
      {"ljust", [](Run& r, const Value& s, const Arguments& a) { const Bound b("ljust", a, {"width", "fillchar"}, 1); return r.text(justify(r, s.text(), b.integer(0, 0), b.has(1) ? b.text(1) : " ", -1), s.markup()); }},
      {"rjust", [](Run& r, const Value& s, const Arguments& a) { const Bound b("rjust", a, {"width", "fillchar"}, 1); return r.text(justify(r, s.text(), b.integer(0, 0), b.has(1) ? b.text(1) : " ", 1), s.markup()); }},
      {"zfill",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("zfill", a, {"width"}, 1);
         const auto& text = s.text();
         const size_t sign = !text.empty() && (text[0] == '-' || text[0] == '+');
         return r.text(text.substr(0, sign) + justify(r, text.substr(sign), b.integer(0, 0) - static_cast<int64_t>(sign), "0", 1), s.markup());
       }},
      {"expandtabs",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("expandtabs", a, {"tabsize"});
         const int64_t size = b.integer(0, 8);
         check(size < 1000, "a tab size of {} is too large", size);
         std::string out;
         int64_t column = 0;
         for (size_t at = 0; at < s.text().size();) {
           const size_t before = at;
           const char32_t c = unicode::next_any(s.text(), at);
           if (c == '\t') {
             if (size > 0) {
               const int64_t gap = size - column % size;
               out.append(static_cast<size_t>(gap), ' ');
               column += gap;
             }
             check(static_cast<int64_t>(out.size()) <= r.max_bytes(), "the template makes a string of more than {} bytes", r.max_bytes());
             continue;
           }
           out.append(s.text(), before, at - before);
           column = c == '\n' || c == '\r' ? 0 : column + 1;
         }
         return r.text(std::move(out), s.markup());
       }},
      {"format",
       [](Run& r, const Value& s, const Arguments& a) { return r.text(brace_format(r, s.text(), a), s.markup()); }},
      {"format_map",
       [](Run& r, const Value& s, const Arguments& a) {
         const Bound b("format_map", a, {"mapping"}, 1);
         check(b[0].is(Kind::dict), "format_map() takes a mapping, not {}", type_name(b[0]));
         Arguments named;
         for (const auto& [key, value] : b[0].dict().items)
           if (key.is_text()) named.keyword.emplace_back(key.text(), value);
         return r.text(brace_format(r, s.text(), named), s.markup());
       }},
  };
  return table;
}

const std::set<std::string_view> list_methods = {"index", "count", "copy"}, tuple_methods = {"index", "count"};
const std::set<std::string_view> list_unsafe = {"append", "clear", "pop",    "reverse",
                                                "insert", "sort",  "extend", "remove"};
const std::set<std::string_view> dict_methods = {"get", "items", "keys", "values", "copy"};
const std::set<std::string_view> dict_unsafe = {"clear", "pop", "popitem", "setdefault", "update"};
const std::set<std::string_view> loop_methods = {"cycle", "changed"};
const std::set<std::string_view> number_methods = {"is_integer", "bit_length"};

Value pairs(Run& run, const Dict& dict, Shape shape) {
  std::vector<Value> out;
  for (const auto& [key, value] : dict.items) {
    if (shape == Shape::keys) out.push_back(key);
    if (shape == Shape::values) out.push_back(value);
    if (shape == Shape::items) out.push_back(Value::list({key, value}, Shape::tuple));
  }
  return run.list(std::move(out), shape);
}

Value dict_method(Run& run, const std::string& name, const Value& self, const Arguments& a) {
  const Dict& dict = self.dict();
  if (name == "get") {
    const Bound b("get", a, {"key", "default"}, 1);
    check(a.keyword.empty(), "dict.get() takes no keyword arguments");
    check_hashable(b[0]);
    const Value* found = dict.find(b[0]);
    return found ? *found : b.get(1, Value::none());
  }
  Bound(name, a, {});
  if (name == "copy") return self;
  return pairs(run, dict, name == "keys" ? Shape::keys : name == "values" ? Shape::values : Shape::items);
}

Value list_method(Run& run, const std::string& name, const Value& self, const Arguments& a) {
  const auto& items = self.list().items;
  if (name == "copy") return self;
  const Bound b(name, a, {"value", "start", "stop"}, 1);
  run.step(items.size());
  if (name == "count")
    return Value(static_cast<int64_t>(
        std::count_if(items.begin(), items.end(), [&](const Value& i) { return equal(i, b[0]); })));
  const auto size = static_cast<int64_t>(items.size());
  const auto clip = [&](int64_t i) { return std::clamp<int64_t>(i < 0 ? i + size : i, 0, size); };
  for (int64_t i = clip(b.integer(1, 0)); i < clip(b.integer(2, size)); ++i)
    if (equal(items[static_cast<size_t>(i)], b[0])) return Value(i);
  fail("{} is not in {}", to_repr(run, b[0]), type_name(self));
}

// --- Globals
// ---------------------------------------------------------------------------------------------------------------

Value make_dict(Run& run, const Arguments& a) {
  auto dict = std::make_shared<Dict>();
  check(a.positional.size() <= 1, "dict expected at most 1 argument, got {}", a.positional.size());
  for (const auto& from : a.positional) {
    if (from.is(Kind::dict)) {
      for (const auto& [key, value] : from.dict().items) dict->set(key, value);
      continue;
    }
    for (const auto& pair : iterate(run, from)) {
      const auto two = iterate(run, pair);
      check(two.size() == 2, "dictionary update sequence element has length {}; 2 is required", two.size());
      check_hashable(two[0]);
      dict->set(two[0], two[1]);
    }
  }
  for (const auto& [key, value] : a.keyword) dict->set(Value(key), value);
  run.step(dict->items.size());
  return Value(std::shared_ptr<const Dict>(std::move(dict)));
}

Value range(Run& run, const Arguments& a) {
  const Bound b("range", a, {"start", "stop", "step"}, 1);
  int64_t start = 0, stop = b.integer(0, 0);
  if (b.has(1)) start = stop, stop = b.integer(1, 0);
  const int64_t step = b.integer(2, 1);
  check(step != 0, "range() arg 3 must not be zero");
  auto list = std::make_shared<List>();
  list->shape = Shape::range;
  list->start = start, list->stop = stop, list->step = step;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    check(list->items.size() < 100000, "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).");
    list->items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  run.step(list->items.size());
  return Value(std::shared_ptr<const List>(std::move(list)));
}

Value make_namespace(Run& run, const Arguments& a) {
  const Value dict = make_dict(run, a);
  Space* space = run.new_space();
  for (const auto& [key, value] : dict.dict().items) {
    check(!key.is_text() || !key.text().starts_with("_"),
          "a namespace cannot hold a name that begins with an underscore: {}", to_text(run, key));
    space->attributes.set(key, value);
  }
  return Value::space(space);
}

Value strftime_now(Run& run, const Arguments& a) {
  const Bound b("strftime_now", a, {"format"}, 1);
  const std::string& format = b.text(0);
  check(format.size() <= 1000, "strftime_now(): the format has more than 1000 characters");
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  // A mark at the end tells an empty result from a buffer that is too small.
  std::vector<char> buffer(format.size() * 64 + 256);
  const size_t size = std::strftime(buffer.data(), buffer.size(), (format + "|").c_str(), &local);
  check(size > 0, "strftime_now(): the date is too long");
  return run.text(unicode::sanitize(std::string_view(buffer.data(), size - 1)));
}

const std::set<std::string> globals = {"range",           "dict",        "namespace", "cycler", "joiner",
                                       "raise_exception", "strftime_now"};

// --- Filters
// ---------------------------------------------------------------------------------------------------------------

// str() of a value, undefined as "", with its Markup.
Value soft(Run& run, const Value& v) {
  return v.is_text() ? v : Value(to_text(run, v));
}

std::vector<Value> attribute_path(const Value& path) {
  std::vector<Value> parts;
  if (path.is_none()) return parts;
  if (!path.is_text()) return {path};
  const std::string& text = path.text();
  for (size_t at = 0;;) {
    const size_t dot = std::min(text.find('.', at), text.size());
    const std::string name = text.substr(at, dot - at);
    const bool digits = !name.empty() && name.size() < 18 && name.find_first_not_of("0123456789") == std::string::npos;
    parts.push_back(digits ? Value(static_cast<int64_t>(std::stoll(name))) : Value(name));
    if (dot == text.size()) return parts;
    at = dot + 1;
  }
}

Value follow(Run& run, Value value, const std::vector<Value>& path, const Value* otherwise = nullptr) {
  for (const auto& part : path) {
    value = item(run, value, part);
    if (otherwise && value.is_undefined()) value = *otherwise;
  }
  return value;
}

Value fold_case(Run& run, const Value& v) {
  return v.is_text() ? run.text(lower(v.text())) : v;
}

std::vector<Value> sorted(Run& run, std::vector<Value> items, const std::vector<std::vector<Value>>& keys,
                          bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = reverse ? order.size() - 1 - i : i;
  const auto less = [&](size_t a, size_t b) {
    for (size_t k = 0; k < keys[a].size(); ++k)
      if (keys[a].size() == 1 || !equal(keys[a][k], keys[b][k])) return compare(run, keys[a][k], keys[b][k], "<") == -1;
    return false;
  };
  std::stable_sort(order.begin(), order.end(), less);
  if (reverse) std::reverse(order.begin(), order.end());
  std::vector<Value> out;
  out.reserve(order.size());
  for (const size_t i : order) out.push_back(std::move(items[i]));
  return out;
}

Value extreme(Run& run, const Value& v, const Arguments& a, bool largest) {
  const Bound b(largest ? "max" : "min", a, {"case_sensitive", "attribute"});
  const auto path = b.has(1) ? attribute_path(b[1]) : std::vector<Value>();
  Value best, best_key;
  bool first = true;
  for (const auto& i : iterate(run, v)) {
    Value key = follow(run, i, path);
    if (!b.truth(0)) key = fold_case(run, key);
    const bool better =
        first || (largest ? compare(run, key, best_key, ">") == 1 : compare(run, key, best_key, "<") == -1);
    if (better) best = i, best_key = key;
    first = false;
  }
  return first ? Value::undefined("No aggregated item, sequence was empty.") : best;
}

Value selecting(Run& run, const Value& v, const Arguments& a, bool keep, bool by_attribute) {
  std::vector<Value> out;
  if (!v.truth()) return run.list({}, Shape::iterator);
  Arguments rest = a;
  std::vector<Value> path;
  if (by_attribute) {
    check(!rest.positional.empty(), "Missing parameter for attribute name");
    path = attribute_path(rest.positional[0]);
    rest.positional.erase(rest.positional.begin());
  }
  std::string name;
  if (!rest.positional.empty()) {
    check(rest.positional[0].is_text(), "the name of a test must be a string");
    name = rest.positional[0].text();
    rest.positional.erase(rest.positional.begin());
  }
  for (const auto& i : iterate(run, v)) {
    const Value value = follow(run, i, path);
    if ((name.empty() ? value.truth() : run.test(name, value, rest)) == keep) out.push_back(i);
  }
  return run.list(std::move(out), Shape::iterator);
}

Value mapping(Run& run, const Value& v, const Arguments& a) {
  if (!v.truth()) return run.list({}, Shape::iterator);
  std::vector<Value> out;
  const auto keyword = [&](std::string_view name) -> const Value* {
    for (const auto& [key, value] : a.keyword)
      if (key == name) return &value;
    return nullptr;
  };
  if (a.positional.empty() && keyword("attribute")) {
    for (const auto& [key, value] : a.keyword)
      check(key == "attribute" || key == "default", "Unexpected keyword argument '{}'", key);
    const auto path = attribute_path(*keyword("attribute"));
    const Value* otherwise = keyword("default");
    if (otherwise && otherwise->is_none()) otherwise = nullptr;
    for (const auto& i : iterate(run, v)) out.push_back(follow(run, i, path, otherwise));
  } else {
    check(!a.positional.empty() && a.positional[0].is_text(), "map requires a filter argument");
    Arguments rest = a;
    rest.positional.erase(rest.positional.begin());
    for (const auto& i : iterate(run, v)) out.push_back(run.filter(a.positional[0].text(), i, rest));
  }
  return run.list(std::move(out), Shape::iterator);
}

std::optional<int64_t> parse_integer(const std::string& text, int base) {
  std::string digits(strip(text, nullptr, true, true));
  bool negative = false;
  if (!digits.empty() && (digits[0] == '-' || digits[0] == '+')) negative = digits[0] == '-', digits.erase(0, 1);
  if (digits.size() > 2 && digits[0] == '0') {
    const char mark = static_cast<char>(digits[1] | 0x20);
    const int marked = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 0;
    if (marked && (base == marked || base == 0)) digits.erase(0, 2), base = marked;
  }
  if (base == 0) base = 10;
  std::string clean;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (digits[i] == '_') {
      if (i == 0 || i + 1 == digits.size() || digits[i - 1] == '_') return std::nullopt;
    } else {
      clean += digits[i];
    }
  }
  uint64_t value = 0;
  const auto result = std::from_chars(clean.data(), clean.data() + clean.size(), value, base);
  if (clean.empty() || result.ptr != clean.data() + clean.size()) return std::nullopt;
  check(result.ec == std::errc() && value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
        "an integer exceeds 64 bits");
  return negative ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
}

std::optional<double> parse_real(const std::string& text) {
  std::string digits(strip(text, nullptr, true, true));
  std::string clean;
  for (size_t i = 0; i < digits.size(); ++i) {
    const auto digit = [&](size_t k) { return k < digits.size() && digits[k] >= '0' && digits[k] <= '9'; };
    if (digits[i] == '_') {
      if (i == 0 || !digit(i - 1) || !digit(i + 1)) return std::nullopt;
    } else {
      clean += digits[i];
    }
  }
  std::string_view rest = clean;
  bool negative = false;
  if (!rest.empty() && (rest[0] == '+' || rest[0] == '-')) negative = rest[0] == '-', rest.remove_prefix(1);
  if (rest.empty() || rest[0] == '+' || rest[0] == '-') return std::nullopt;
  if (rest.size() > 3 && (rest[3] == '(' || rest[0] == 'n')) return std::nullopt;
  double value = 0;
  const auto result = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  if (result.ptr != rest.data() + rest.size()) return std::nullopt;
  if (result.ec == std::errc::result_out_of_range)
    value = std::strtod(std::string(rest).c_str(), nullptr);
  else if (result.ec != std::errc())
    return std::nullopt;
  return negative ? -value : value;
}

Value to_integer(Run& run, const Value& v, const Arguments& a) {
  const Bound b("int", a, {"default", "base"});
  const Value otherwise = b.get(0, Value(int64_t{0}));
  const auto truncate = [&](double d) -> Value {
    if (!std::isfinite(d)) return otherwise;
    check(std::fabs(d) < 9.2e18, "an integer exceeds 64 bits");
    return Value(static_cast<int64_t>(d));
  };
  if (v.is_undefined()) fail("{}", v.missing());
  if (v.is_integral()) return Value(v.integer());
  if (v.is(Kind::real)) return truncate(v.real());
  if (!v.is_text()) return otherwise;
  const int64_t base = b.integer(1, 10);
  check(base == 0 || (base >= 2 && base <= 36), "int() base must be >= 2 and <= 36, or 0");
  if (const auto i = parse_integer(v.text(), static_cast<int>(base))) return Value(*i);
  const auto d = parse_real(v.text());
  return d ? truncate(*d) : otherwise;
}

Value rounding(const Value& v, const Arguments& a) {
  const Bound b("round", a, {"precision", "method"});
  const int64_t precision = b.integer(0, 0);
  const std::string method = b.has(1) ? b.text(1) : "common";
  if (v.is_undefined()) fail("{}", v.missing());
  check(v.is_number(), "type {} doesn't define __round__ method", type_name(v));
  check(std::abs(precision) <= 300, "round() to {} digits is not supported", precision);
  check(method == "common" || method == "ceil" || method == "floor", "method must be common, ceil or floor");
  if (method == "common") {
    if (v.is_integral()) {
      if (precision >= 0) return Value(v.integer());
      const double scale = std::pow(10.0, static_cast<double>(-precision));
      return Value(static_cast<int64_t>(std::nearbyint(static_cast<double>(v.integer()) / scale) * scale));
    }
    if (!std::isfinite(v.real())) return v;
    // Correctly rounded through the decimal digits, half to even, as Python rounds.
    if (precision >= 0) return Value(std::strtod(fmt::format("{:.{}f}", v.real(), precision).c_str(), nullptr));
    const double scale = std::pow(10.0, static_cast<double>(-precision));
    return Value(std::nearbyint(v.real() / scale) * scale);
  }
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double moved = method == "ceil" ? std::ceil(v.real() * scale) : std::floor(v.real() * scale);
  // Python's ceil and floor give an int; dividing it gives a float.
  return Value(moved / scale);
}

Value indenting(Run& run, const Value& v, const Arguments& a) {
  const Bound b("indent", a, {"width", "first", "blank"});
  if (v.is_undefined()) fail("{}", v.missing());
  check(v.is_text(), "indent takes a string, not {}", type_name(v));
  std::string pad = "    ";
  if (b.has(0)) {
    if (b[0].is_text()) {
      pad = b[0].text();
    } else {
      const int64_t width = b.integer(0, 4);
      check(width <= 10000, "indent by {} columns is refused: more than 10000", width);
      pad = std::string(static_cast<size_t>(std::max<int64_t>(width, 0)), ' ');
    }
  }
  const auto lines = splitlines(v.text() + "\n", false);
  std::string out;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i) out += '\n';
    if (i ? (b.truth(2) || !lines[i].empty()) : b.truth(1)) out += pad;
    out += lines[i];
    check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the template makes a string of more than {} bytes",
          run.max_bytes());
  }
  return run.text(std::move(out), v.markup());
}

Value truncating(Run& run, const Value& v, const Arguments& a) {
  const Bound b("truncate", a, {"length", "killwords", "end", "leeway"});
  const int64_t limit = b.integer(0, 255);
  const std::string end = b.has(2) ? b.text(2) : "...";
  const int64_t leeway = b.has(3) && !b[3].is_none() ? b.integer(3, 5) : 5;
  const auto end_length = static_cast<int64_t>(text_length(end));
  check(limit >= end_length, "expected length >= {}, got {}", end_length, limit);
  check(leeway >= 0, "expected leeway >= 0, got {}", leeway);
  const auto size = length(run, v);
  if (size <= limit || size - limit <= leeway) return v;
  check(v.is_text(), "truncate takes a string, not {}", type_name(v));
  Value head = slice(run, v, Value::none(), Value(limit - end_length), Value::none());
  std::string text = head.text();
  if (!b.truth(1)) {
    const size_t space = text.rfind(' ');
    if (space != std::string::npos) text.resize(space);
  }
  return run.text(text + end, v.markup());
}

std::string filter_title(const std::string& text) {
  std::string out;
  const auto points = unicode::decode(text);
  const auto breaks = [](char32_t c) {
    return c == '-' || c == '(' || c == '{' || c == '[' || c == '<' || is_space(c);
  };
  bool start = true;
  for (size_t i = 0; i < points.size(); ++i) {
    if (breaks(points[i])) {
      unicode::append(out, points[i]);
      start = true;
    } else if (start) {
      append_upper(out, points[i]);
      start = false;
    } else {
      append_lower(out, points, i);
    }
  }
  return out;
}

std::string url_quote(std::string_view text, bool query) {
  std::string out;
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if ((u < 0x80 && std::isalnum(u)) || c == '_' || c == '.' || c == '-' || c == '~' || (c == '/' && !query)) {
      out += c;
    } else if (c == ' ' && query) {
      out += '+';
    } else {
      out += fmt::format("%{:02X}", u);
    }
  }
  return out;
}

std::string strip_tags(const std::string& text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    if (text.compare(at, 4, "<!--") == 0) {
      const size_t end = text.find("-->", at);
      if (end != std::string::npos) {
        at = end + 3;
        continue;
      }
    }
    if (text[at] == '<') {
      const size_t end = text.find('>', at);
      if (end != std::string::npos) {
        at = end + 1;
        continue;
      }
    }
    out += text[at++];
  }
  return out;
}

Value group_by(Run& run, const Value& v, const Arguments& a) {
  const Bound b("groupby", a, {"attribute", "default", "case_sensitive"}, 1);
  const auto path = attribute_path(b[0]);
  const Value otherwise = b.get(1, Value::none());
  const Value* missing = otherwise.is_none() ? nullptr : &otherwise;
  const bool sensitive = b.truth(2);
  auto items = iterate(run, v);
  std::vector<std::vector<Value>> keys;
  for (const auto& i : items) {
    Value key = follow(run, i, path, missing);
    keys.push_back({sensitive ? key : fold_case(run, key)});
  }
  items = sorted(run, std::move(items), keys, false);
  std::vector<Value> out, group;
  Value group_key;
  const auto flush = [&] {
    if (group.empty()) return;
    auto pair = std::make_shared<List>();
    pair->shape = Shape::tuple;
    pair->group = true;
    pair->items = {sensitive ? group_key : follow(run, group[0], path, missing), run.list(std::move(group))};
    pair->nesting = 1 + std::max(nesting(pair->items[0]), nesting(pair->items[1]));
    out.emplace_back(std::shared_ptr<const List>(std::move(pair)));
    group.clear();
  };
  for (const auto& i : items) {
    Value key = follow(run, i, path, missing);
    if (!sensitive) key = fold_case(run, key);
    if (!group.empty() && !equal(key, group_key)) flush();
    group_key = key;
    group.push_back(i);
  }
  flush();
  return run.list(std::move(out));
}

Value json_filter(Run& run, const Value& v, const Arguments& a) {
  const Bound b("tojson", a, {"ensure_ascii", "indent", "separators", "sort_keys"});
  std::optional<std::string> indent;
  if (b.has(1) && !b[1].is_none()) {
    if (b[1].is_text()) {
      indent = b[1].text();
    } else {
      const int64_t width = b.integer(1, 0);
      check(width <= 1000, "an indent of {} is refused: more than 1000", width);
      indent = std::string(static_cast<size_t>(std::max<int64_t>(width, 0)), ' ');
    }
  }
  std::string comma = indent ? "," : ", ", colon = ": ";
  if (b.has(2) && !b[2].is_none()) {
    const auto two = iterate(run, b[2]);
    check(two.size() == 2 && two[0].is_text() && two[1].is_text(), "tojson(): 'separators' must be two strings");
    comma = two[0].text(), colon = two[1].text();
  }
  return run.text(to_json(run, v, b.truth(0), indent, comma, colon, b.truth(3)));
}

Value joining(Run& run, const Value& v, const Arguments& a) {
  const Bound b("join", a, {"d", "attribute"});
  const std::string separator = b.has(0) ? to_text(run, b[0]) : "";
  const auto path = b.has(1) ? attribute_path(b[1]) : std::vector<Value>();
  std::string out;
  bool first = true;
  for (const auto& i : iterate(run, v)) {
    if (!first) out += separator;
    first = false;
    out += to_text(run, follow(run, i, path));
    check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the template makes a string of more than {} bytes",
          run.max_bytes());
  }
  return run.text(std::move(out));
}

Value batches(Run& run, const Value& v, const Arguments& a) {
  const Bound b("batch", a, {"linecount", "fill_with"}, 1);
  const int64_t size = b.integer(0, 1);
  std::vector<Value> out, row;
  for (const auto& i : iterate(run, v)) {
    if (static_cast<int64_t>(row.size()) == size) {
      out.push_back(run.list(std::move(row)));
      row.clear();
    }
    row.push_back(i);
  }
  if (!row.empty()) {
    const Value fill = b.get(1, Value::none());
    check(fill.is_none() || size <= 100000, "batch(): a row of {} is too long", size);
    while (!fill.is_none() && static_cast<int64_t>(row.size()) < size) row.push_back(fill);
    out.push_back(run.list(std::move(row)));
  }
  return run.list(std::move(out), Shape::iterator);
}

Value slices(Run& run, const Value& v, const Arguments& a) {
  const Bound b("slice", a, {"slices", "fill_with"}, 1);
  const auto items = iterate(run, v);
  const int64_t count = b.integer(0, 1);
  check(count != 0, "integer division or modulo by zero");
  check(count <= 100000, "slice(): {} slices are too many", count);
  const Value fill = b.get(1, Value::none());
  const auto size = static_cast<int64_t>(items.size());
  std::vector<Value> out;
  int64_t offset = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = offset + i * (size / count);
    if (i < size % count) ++offset;
    const int64_t end = offset + (i + 1) * (size / count);
    std::vector<Value> row(items.begin() + start, items.begin() + end);
    if (!fill.is_none() && i >= size % count) row.push_back(fill);
    out.push_back(run.list(std::move(row)));
  }
  return run.list(std::move(out), Shape::iterator);
}

Value reversing(Run& run, const Value& v, const Arguments& a) {
  Bound("reverse", a, {});
  if (v.is_text()) return slice(run, v, Value::none(), Value::none(), Value(int64_t{-1}));
  auto items = iterate(run, v);
  std::reverse(items.begin(), items.end());
  return run.list(std::move(items), Shape::iterator);
}

Value dict_sorting(Run& run, const Value& v, const Arguments& a) {
  const Bound b("dictsort", a, {"case_sensitive", "by", "reverse"});
  const std::string by = b.has(1) ? b.text(1) : "key";
  check(by == "key" || by == "value", "You can only sort by either \"key\" or \"value\"");
  if (v.is_undefined()) fail("{}", v.missing());
  check(v.is(Kind::dict), "'{}' object has no attribute 'items'", type_name(v));
  std::vector<Value> items;
  std::vector<std::vector<Value>> keys;
  for (const auto& [key, value] : v.dict().items) {
    items.push_back(Value::list({key, value}, Shape::tuple));
    const Value& k = by == "key" ? key : value;
    keys.push_back({b.truth(0) ? k : fold_case(run, k)});
  }
  return run.list(sorted(run, std::move(items), keys, b.truth(2)));
}

Value sorting(Run& run, const Value& v, const Arguments& a) {
  const Bound b("sort", a, {"reverse", "case_sensitive", "attribute"});
  std::vector<std::vector<Value>> paths;
  if (b.has(2) && b[2].is_text()) {
    for (const auto& p : split(run, b[2].text(), std::make_unique<std::string>(",").get(), -1, false))
      paths.push_back(attribute_path(Value(p)));
  } else {
    paths.push_back(attribute_path(b.get(2, Value::none())));
  }
  auto items = iterate(run, v);
  std::vector<std::vector<Value>> keys;
  for (const auto& i : items) {
    auto& row = keys.emplace_back();
    for (const auto& p : paths) {
      Value key = follow(run, i, p);
      row.push_back(b.truth(1) ? key : fold_case(run, key));
    }
  }
  return run.list(sorted(run, std::move(items), keys, b.truth(0)));
}

Value unique(Run& run, const Value& v, const Arguments& a) {
  const Bound b("unique", a, {"case_sensitive", "attribute"});
  const auto path = b.has(1) ? attribute_path(b[1]) : std::vector<Value>();
  Dict seen;
  std::vector<Value> out;
  for (const auto& i : iterate(run, v)) {
    Value key = follow(run, i, path);
    if (!b.truth(0)) key = fold_case(run, key);
    check_hashable(key);
    if (seen.find(key)) continue;
    seen.set(key, Value(true));
    out.push_back(i);
  }
  return run.list(std::move(out), Shape::iterator);
}

Value summing(Run& run, const Value& v, const Arguments& a) {
  const Bound b("sum", a, {"attribute", "start"});
  const auto path = b.has(0) ? attribute_path(b[0]) : std::vector<Value>();
  Value total = b.get(1, Value(int64_t{0}));
  check(!total.is_text(), "sum() can't sum strings [use ''.join(seq) instead]");
  for (const auto& i : iterate(run, v)) total = arithmetic(run, Op::add, total, follow(run, i, path));
  return total;
}

Value file_size(const Value& v, const Arguments& a) {
  const Bound b("filesizeformat", a, {"binary"});
  const bool binary = b.truth(0);
  double bytes = 0;
  if (v.is_number()) {
    bytes = v.real();
  } else {
    const auto parsed = v.is_text() ? parse_real(v.text()) : std::nullopt;
    check(parsed.has_value(), "could not convert {} to a number", type_name(v));
    bytes = *parsed;
  }
  const double base = binary ? 1024 : 1000;
  if (bytes == 1) return Value("1 Byte");
  if (bytes < base) return Value(fmt::format("{} Bytes", static_cast<int64_t>(bytes)));
  const char* prefixes[] = {"k", "M", "G", "T", "P", "E", "Z", "Y"};
  double unit = base;
  for (size_t i = 0;; ++i) {
    unit *= base;
    if (bytes < unit || i == 7)
      return Value(
          fmt::format("{:.1f} {}{}B", base * bytes / unit, binary && i == 0 ? "K" : prefixes[i], binary ? "i" : ""));
  }
}

Value url_encode(Run& run, const Value& v) {
  if (v.is_text() || !iterable(v)) return run.text(url_quote(to_text(run, v), false));
  std::string out;
  const auto add = [&](const Value& key, const Value& value) {
    if (!out.empty()) out += '&';
    out += url_quote(to_text(run, key), true) + "=" + url_quote(to_text(run, value), true);
  };
  if (v.is(Kind::dict)) {
    for (const auto& [key, value] : v.dict().items) add(key, value);
  } else {
    for (const auto& pair : iterate(run, v)) {
      const auto two = iterate(run, pair);
      check(two.size() == 2, "urlencode needs pairs");
      add(two[0], two[1]);
    }
  }
  return run.text(std::move(out));
}

Value xml_attributes(Run& run, const Value& v, const Arguments& a) {
  const Bound b("xmlattr", a, {"autospace"});
  check(v.is(Kind::dict), "'{}' object has no attribute 'items'", type_name(v));
  std::string out;
  for (const auto& [key, value] : v.dict().items) {
    if (value.is_none() || value.is_undefined()) continue;
    const std::string name = to_text(run, key);
    check(name.find_first_of(" \t\n\r\f\v/>=") == std::string::npos, "Invalid character in attribute name: {}", name);
    if (!out.empty()) out += ' ';
    out += escape_html(name) + "=\"" + (value.markup() ? value.text() : escape_html(to_text(run, value))) + "\"";
  }
  if (b.truth(0, true) && !out.empty()) out.insert(out.begin(), ' ');
  return run.text(std::move(out));
}

using Filter = Value (*)(Run&, const Value&, const Arguments&);

const std::unordered_map<std::string, Filter>& filters() {
  static const Filter count = [](Run& r, const Value& v, const Arguments& a) {
    Bound("length", a, {});
    return Value(length(r, v));
  };
  static const Filter fallback = [](Run&, const Value& v, const Arguments& a) {
    const Bound b("default", a, {"default_value", "boolean"});
    return v.is_undefined() || (b.truth(1) && !v.truth()) ? b.get(0, Value("")) : v;
  };
  static const Filter escape = [](Run& r, const Value& v, const Arguments& a) {
    Bound("escape", a, {});
    return v.markup() ? v : r.text(escape_html(to_text(r, v)), true);
  };
  static const std::unordered_map<std::string, Filter> table = {
      {"trim",
       [](Run& r, const Value& v, const Arguments& a) {
         const Bound b("trim", a, {"chars"});
         const std::string* chars = b.has(0) && !b[0].is_none() ? &b.text(0) : nullptr;
         const Value s = soft(r, v);
         r.step(chars ? s.text().size() / 16 * (1 + chars->size() / 64) : 0);
         return r.text(std::string(strip(s.text(), chars, true, true)), s.markup());
       }},
      {"upper", [](Run& r, const Value& v, const Arguments& a) { return plain(r, soft(r, v), a, "upper", upper); }},
      {"lower", [](Run& r, const Value& v, const Arguments& a) { return plain(r, soft(r, v), a, "lower", lower); }},
      {"capitalize",
       [](Run& r, const Value& v, const Arguments& a) { return plain(r, soft(r, v), a, "capitalize", capitalize); }},
      {"title",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("title", a, {});
         return r.text(filter_title(to_text(r, v)));
       }},
      {"length", count},
      {"count", count},
      {"default", fallback},
      {"d", fallback},
      {"escape", escape},
      {"e", escape},
      {"forceescape",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("forceescape", a, {});
         return r.text(escape_html(to_text(r, v)), true);
       }},
      {"safe",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("safe", a, {});
         return r.text(to_text(r, v), true);
       }},
      {"string",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("string", a, {});
         return v.is_text() ? v : r.text(to_text(r, v));
       }},
      {"join", joining},
      {"first",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("first", a, {});
         if (v.is(Kind::list) && v.list().shape == Shape::iterator)
           return v.list().used < v.list().items.size() ? v.list().items[v.list().used++]
                                                        : Value::undefined("No first item, sequence was empty.");
         const auto items = iterate(r, v);
         return items.empty() ? Value::undefined("No first item, sequence was empty.") : items.front();
       }},
      {"last",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("last", a, {});
         if (v.is(Kind::list) && v.list().shape == Shape::iterator) fail("'{}' object is not reversible", type_name(v));
         const auto items = iterate(r, v);
         return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
       }},
      {"list",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("list", a, {});
         return r.list(iterate(r, v));
       }},
      {"int", to_integer},
      {"float",
       [](Run&, const Value& v, const Arguments& a) {
         const Bound b("float", a, {"default"});
         if (v.is_undefined()) fail("{}", v.missing());
         if (v.is_number()) return Value(v.real());
         const auto d = v.is_text() ? parse_real(v.text()) : std::nullopt;
         return d ? Value(*d) : b.get(0, Value(0.0));
       }},
      {"abs",
       [](Run&, const Value& v, const Arguments& a) {
         Bound("abs", a, {});
         if (v.is_undefined()) fail("{}", v.missing());
         check(v.is_number(), "bad operand type for abs(): '{}'", type_name(v));
         if (v.is(Kind::real)) return Value(std::fabs(v.real()));
         check(v.integer() != std::numeric_limits<int64_t>::min(), "an integer exceeds 64 bits");
         return Value(std::abs(v.integer()));
       }},
      {"round", [](Run&, const Value& v, const Arguments& a) { return rounding(v, a); }},
      {"replace",
       [](Run& r, const Value& v, const Arguments& a) {
         const Bound b("replace", a, {"old", "new", "count"}, 2);
         return r.text(replace(r, to_text(r, v), to_text(r, b[0]), to_text(r, b[1]),
                               b.has(2) && !b[2].is_none() ? b.integer(2, -1) : -1));
       }},
      {"tojson", json_filter},
      {"items",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("items", a, {});
         if (v.is_undefined()) return r.list({}, Shape::iterator);
         check(v.is(Kind::dict), "Can only get item pairs from a mapping.");
         return r.list(pairs(r, v.dict(), Shape::items).list().items, Shape::iterator);
       }},
      {"dictsort", dict_sorting},
      {"sort", sorting},
      {"unique", unique},
      {"reverse", reversing},
      {"map", mapping},
      {"select", [](Run& r, const Value& v, const Arguments& a) { return selecting(r, v, a, true, false); }},
      {"reject", [](Run& r, const Value& v, const Arguments& a) { return selecting(r, v, a, false, false); }},
      {"selectattr", [](Run& r, const Value& v, const Arguments& a) { return selecting(r, v, a, true, true); }},
      {"rejectattr", [](Run& r, const Value& v, const Arguments& a) { return selecting(r, v, a, false, true); }},
      {"sum", summing},
      {"min", [](Run& r, const Value& v, const Arguments& a) { return extreme(r, v, a, false); }},
      {"max", [](Run& r, const Value& v, const Arguments& a) { return extreme(r, v, a, true); }},
      {"batch", batches},
      {"slice", slices},
      {"groupby", group_by},
      {"indent", indenting},
      {"wordcount",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("wordcount", a, {});
         const std::string text = to_text(r, v);
         r.step(text.size() / 16);
         int64_t count = 0;
         bool inside = false;
         for (size_t at = 0; at < text.size();) {
           const char32_t c = unicode::next_any(text, at);
           const bool word = is_alpha(c) || is_numeric(c) || c == '_';
           count += word && !inside;
           inside = word;
         }
         return Value(count);
       }},
      {"truncate", truncating},
      {"format",
       [](Run& r, const Value& v, const Arguments& a) {
         check(a.positional.empty() || a.keyword.empty(),
               "can't handle positional and keyword arguments at the same time");
         const Value s = soft(r, v);
         Value values = Value::list(a.positional, Shape::tuple);
         if (!a.keyword.empty()) values = make_dict(r, a);
         return r.text(percent_format(r, s.text(), values, s.markup()), s.markup());
       }},
      {"attr",
       [](Run& r, const Value& v, const Arguments& a) {
         const Bound b("attr", a, {"name"}, 1);
         const std::string& name = b.text(0);
         bool unsafe = false;
         if (v.is_undefined()) fail("{}", v.missing());
         if (v.is(Kind::dict) && !has_method(v, name, unsafe) && !unsafe)
           return Value::undefined(fmt::format("'dict object' has no attribute '{}'", name));
         return attribute(r, v, name);
       }},
      {"center",
       [](Run& r, const Value& v, const Arguments& a) {
         const Bound b("center", a, {"width"});
         const Value s = soft(r, v);
         return r.text(justify(r, s.text(), b.integer(0, 80), " ", 0), s.markup());
       }},
      {"filesizeformat", [](Run&, const Value& v, const Arguments& a) { return file_size(v, a); }},
      {"urlencode",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("urlencode", a, {});
         return url_encode(r, v);
       }},
      {"xmlattr", xml_attributes},
      {"striptags",
       [](Run& r, const Value& v, const Arguments& a) {
         Bound("striptags", a, {});
         std::string text = strip_tags(to_text(r, v)), out;
         for (const auto& word : split(r, text, nullptr, -1, false)) out += (out.empty() ? "" : " ") + word;
         for (const auto& [entity, c] : std::initializer_list<std::pair<const char*, const char*>>{
                  {"&lt;", "<"}, {"&gt;", ">"}, {"&#34;", "\""}, {"&#39;", "'"}, {"&quot;", "\""}, {"&amp;", "&"}})
           out = replace(r, out, entity, c, -1);
         return r.text(std::move(out));
       }},
  };
  return table;
}

// --- Tests
// -----------------------------------------------------------------------------------------------------------------

using Test = bool (*)(Run&, const Value&, const Arguments&);

const Value& other(const Arguments& a, const char* name) {
  check(a.positional.size() == 1 && a.keyword.empty(), "the test '{}' takes one argument", name);
  return a.positional[0];
}
template <int low, int high>
bool ordered(Run& run, const Value& v, const Arguments& a, const char* op) {
  const int c = compare(run, v, other(a, op), op);
  return c >= low && c <= high;
}
bool remainder_is(Run& run, const Value& v, int64_t divisor, int64_t rest) {
  check(!v.is_text(), "not all arguments converted during string formatting");
  return equal(arithmetic(run, Op::modulo, v, Value(divisor)), Value(rest));
}

const std::unordered_map<std::string, Test>& tests() {
  static const Test eq = [](Run&, const Value& v, const Arguments& a) { return equal(v, other(a, "eq")); };
  static const Test ne = [](Run&, const Value& v, const Arguments& a) { return !equal(v, other(a, "ne")); };
  static const Test lt = [](Run& r, const Value& v, const Arguments& a) { return ordered<-1, -1>(r, v, a, "<"); };
  static const Test le = [](Run& r, const Value& v, const Arguments& a) { return ordered<-1, 0>(r, v, a, "<="); };
  static const Test gt = [](Run& r, const Value& v, const Arguments& a) { return ordered<1, 1>(r, v, a, ">"); };
  static const Test ge = [](Run& r, const Value& v, const Arguments& a) { return ordered<0, 1>(r, v, a, ">="); };
  static const std::unordered_map<std::string, Test> table = {
      {"defined", [](Run&, const Value& v, const Arguments&) { return !v.is_undefined(); }},
      {"undefined", [](Run&, const Value& v, const Arguments&) { return v.is_undefined(); }},
      {"none", [](Run&, const Value& v, const Arguments&) { return v.is_none(); }},
      {"boolean", [](Run&, const Value& v, const Arguments&) { return v.is(Kind::boolean); }},
      {"true", [](Run&, const Value& v, const Arguments&) { return v.is(Kind::boolean) && v.boolean(); }},
      {"false", [](Run&, const Value& v, const Arguments&) { return v.is(Kind::boolean) && !v.boolean(); }},
      {"integer", [](Run&, const Value& v, const Arguments&) { return v.is(Kind::integer); }},
      {"float", [](Run&, const Value& v, const Arguments&) { return v.is(Kind::real); }},
      {"number", [](Run&, const Value& v, const Arguments&) { return v.is_number(); }},
      {"string", [](Run&, const Value& v, const Arguments&) { return v.is_text(); }},
      {"mapping", [](Run&, const Value& v, const Arguments&) { return v.is(Kind::dict); }},
      {"iterable", [](Run&, const Value& v, const Arguments&) { return iterable(v); }},
      {"sequence",
       [](Run&, const Value& v, const Arguments&) {
         return v.is_undefined() || v.is_text() || v.is(Kind::dict) ||
                (v.is(Kind::list) &&
                 (v.list().shape == Shape::list || v.list().shape == Shape::tuple || v.list().shape == Shape::range));
       }},
      {"callable",
       [](Run&, const Value& v, const Arguments&) {
         return v.is_undefined() || v.is(Kind::macro) || v.is(Kind::function) || v.is(Kind::loop) || v.is(Kind::joiner);
       }},
      {"odd", [](Run& r, const Value& v, const Arguments&) { return remainder_is(r, v, 2, 1); }},
      {"even", [](Run& r, const Value& v, const Arguments&) { return remainder_is(r, v, 2, 0); }},
      {"divisibleby",
       [](Run& r, const Value& v, const Arguments& a) {
         return equal(arithmetic(r, Op::modulo, v, other(a, "divisibleby")), Value(int64_t{0}));
       }},
      {"lower", [](Run& r, const Value& v, const Arguments&) { return all_cased(to_text(r, v), false); }},
      {"upper", [](Run& r, const Value& v, const Arguments&) { return all_cased(to_text(r, v), true); }},
      {"in", [](Run& r, const Value& v, const Arguments& a) { return contains(r, other(a, "in"), v); }},
      {"escaped", [](Run&, const Value& v, const Arguments&) { return v.markup(); }},
      {"sameas",
       [](Run&, const Value& v, const Arguments& a) {
         const Value& o = other(a, "sameas");
         if (v.kind() != o.kind()) return false;
         if (v.is_none() || v.is_number() || v.is(Kind::space) || v.is(Kind::macro)) return equal(v, o);
         return v.identity() == o.identity();
       }},
      {"filter", [](Run&, const Value& v, const Arguments&) { return v.is_text() && has_filter(v.text()); }},
      {"test", [](Run&, const Value& v, const Arguments&) { return v.is_text() && has_test(v.text()); }},
      {"eq", eq},
      {"equalto", eq},
      {"==", eq},
      {"ne", ne},
      {"!=", ne},
      {"lt", lt},
      {"lessthan", lt},
      {"<", lt},
      {"le", le},
      {"<=", le},
      {"gt", gt},
      {"greaterthan", gt},
      {">", gt},
      {"ge", ge},
      {">=", ge},
  };
  return table;
}

}  // namespace

bool has_method(const Value& object, std::string_view name, bool& unsafe) {
  switch (object.kind()) {
    case Kind::text:
      return text_methods().count(name) != 0;
    case Kind::list:
      switch (object.list().shape) {
        case Shape::list:
          unsafe = list_unsafe.count(name) != 0;
          return unsafe || list_methods.count(name) != 0;
        case Shape::tuple:
        case Shape::range:
          return tuple_methods.count(name) != 0;
        default:
          return false;
      }
    case Kind::dict:
      unsafe = dict_unsafe.count(name) != 0;
      return unsafe || dict_methods.count(name) != 0;
    case Kind::cycler:
      return name == "next" || name == "reset";
    case Kind::integer:
      return number_methods.count(name) != 0 && name != "is_integer";
    case Kind::real:
      return name == "is_integer";
    case Kind::function:
      return object.function().global && object.function().name == "dict" && name == "fromkeys";
    default:
      return false;
  }
}

Value call_function(Run& run, const Function& f, Arguments a) {
  run.step();
  if (!f.global) {
    switch (f.self.kind()) {
      case Kind::text:
        return text_methods().at(f.name)(run, f.self, a);
      case Kind::list:
        return list_method(run, f.name, f.self, a);
      case Kind::dict:
        return dict_method(run, f.name, f.self, a);
      case Kind::real:
        return Value(f.self.real() == std::floor(f.self.real()) && std::isfinite(f.self.real()));
      case Kind::integer: {
        const uint64_t magnitude = f.self.integer() < 0 ? 0 - static_cast<uint64_t>(f.self.integer())
                                                        : static_cast<uint64_t>(f.self.integer());
        return Value(static_cast<int64_t>(magnitude ? 64 - __builtin_clzll(magnitude) : 0));
      }
      case Kind::cycler: {
        auto& c = f.self.object<Cycler>();
        if (f.name == "reset") {
          c.at = 0;
          return Value::none();
        }
        const Value out = c.items[c.at];
        c.at = (c.at + 1) % c.items.size();
        return out;
      }
      case Kind::function: {
        const Bound b("fromkeys", a, {"iterable", "value"}, 1);
        auto dict = std::make_shared<Dict>();
        for (const auto& key : iterate(run, b[0])) {
          check_hashable(key);
          dict->set(key, b.get(1, Value::none()));
        }
        return Value(std::shared_ptr<const Dict>(std::move(dict)));
      }
      default:
        fail("'{}' has no method '{}'", type_name(f.self), f.name);
    }
  }
  if (f.name == "range") return range(run, a);
  if (f.name == "dict") return make_dict(run, a);
  if (f.name == "namespace") return make_namespace(run, a);
  if (f.name == "strftime_now") return strftime_now(run, a);
  if (f.name == "cycler") {
    check(!a.positional.empty() && a.keyword.empty(), "cycler() needs at least one item");
    auto c = std::make_shared<Cycler>();
    c->nesting = Value::list(a.positional).list().nesting;
    c->items = std::move(a.positional);
    return Value::other(Kind::cycler, std::move(c));
  }
  if (f.name == "joiner") {
    const Bound b("joiner", a, {"sep"});
    auto j = std::make_shared<Joiner>();
    j->separator = b.has(0) ? b.text(0) : ", ";
    return Value::other(Kind::joiner, std::move(j));
  }
  const Bound b("raise_exception", a, {"message"}, 1);
  fail("{}", to_text(run, b[0]));
}

bool is_global(const std::string& name) {
  return globals.count(name) != 0;
}
bool has_filter(const std::string& name) {
  return filters().count(name) != 0;
}
bool has_test(const std::string& name) {
  return tests().count(name) != 0;
}

Value Run::filter(const std::string& name, const Value& value, Arguments arguments) {
  step();
  const auto found = filters().find(name);
  if (found == filters().end()) {
    static const std::set<std::string> left_out = {"pprint", "random", "urlize", "wordwrap"};
    check(!left_out.count(name), "the filter '{}' is not supported in chat templates", name);
    fail("No filter named '{}'", name);
  }
  return found->second(*this, value, arguments);
}

bool Run::test(const std::string& name, const Value& value, Arguments arguments) {
  step();
  const auto found = tests().find(name);
  check(found != tests().end(), "No test named '{}'", name);
  return found->second(*this, value, arguments);
}

}  // namespace moiety::jinja
