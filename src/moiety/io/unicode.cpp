#include "moiety/io/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "moiety/base/error.h"

namespace moiety::unicode {
namespace {

struct LowerRange {
  char32_t first, last;
  int32_t distance;
};
struct ScriptRange {
  char32_t first, last;
  int script;
};
#include "moiety/io/unicode_tables.inc"

template <class R>
const R* find(std::span<const R> table, char32_t c) {
  auto it = std::upper_bound(table.begin(), table.end(), c, [](char32_t x, const R& r) { return x < r.first; });
  if (it == table.begin()) return nullptr;
  --it;
  return c <= it->last ? &*it : nullptr;
}

template <class R, size_t N>
bool in(const R (&table)[N], char32_t c) {
  return find(std::span<const R>(table), c) != nullptr;
}

bool inert(char32_t c) {
  return c >= 0x7FD && (in(kInert, c) || in(kNewCodePoints, c));
}

void append_normalized(std::string& out, std::string_view text, Form form) {
  if (text.empty()) return;
  int options = UTF8PROC_STABLE;
  options |= form == Form::NFC || form == Form::NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == Form::NFKC || form == Form::NFKD) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* result = nullptr;
  const auto size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &result, static_cast<utf8proc_option_t>(options));
  std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  check(size >= 0, "Unicode normalization of {} bytes failed: {}.", text.size(), utf8proc_errmsg(size));
  out.append(reinterpret_cast<const char*>(result), static_cast<size_t>(size));
}

}  // namespace

char32_t next(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned char b = byte(0);
  char32_t c = b;
  const size_t n = char_length(b);
  if (n == 2) c = (b & 0x1Fu) << 6 | (byte(1) & 0x3Fu);
  if (n == 3) c = (b & 0x0Fu) << 12 | (byte(1) & 0x3Fu) << 6 | (byte(2) & 0x3Fu);
  if (n == 4) c = (b & 0x07u) << 18 | (byte(1) & 0x3Fu) << 12 | (byte(2) & 0x3Fu) << 6 | (byte(3) & 0x3Fu);
  at += n;
  return c;
}

char32_t previous(std::string_view text, size_t at) {
  do --at;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return next(text, at);
}

void append(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

int well_formed(std::string_view bytes, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[at + i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return -1;
  const size_t n = char_length(lead);
  // The second byte's range depends on the lead: no overlong forms, surrogates or values above U+10FFFF.
  unsigned char low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t i = 1; i < n; ++i) {
    if (at + i >= bytes.size()) return 0;
    if (byte(i) < low || byte(i) > high) return -static_cast<int>(i);
    low = 0x80, high = 0xBF;
  }
  return static_cast<int>(n);
}

char32_t next_any(std::string_view bytes, size_t& at) {
  const int n = well_formed(bytes, at);
  if (n > 0) return next(bytes, at);
  at = n == 0 ? bytes.size() : at + static_cast<size_t>(-n);
  return 0xFFFD;
}

std::vector<char32_t> decode(std::string_view bytes) {
  std::vector<char32_t> out;
  out.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) out.push_back(next_any(bytes, at));
  return out;
}

bool valid(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const int n = well_formed(bytes, at);
    if (n <= 0) return false;
    at += static_cast<size_t>(n);
  }
  return true;
}

std::string sanitize(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  size_t at = 0, copied = 0;
  while (at < bytes.size()) {
    const int n = well_formed(bytes, at);
    if (n > 0) {
      at += static_cast<size_t>(n);
      continue;
    }
    out.append(bytes, copied, at - copied);
    out += "\xEF\xBF\xBD";
    at = n == 0 ? bytes.size() : at + static_cast<size_t>(-n);
    copied = at;
  }
  out.append(bytes, copied, bytes.size() - copied);
  return out;
}

bool is_white_space(char32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 ||
         c == 0x202F || c == 0x205F || c == 0x3000;
}
bool is_word(char32_t c) {
  return in(kWord, c);
}
bool is_numeric(char32_t c) {
  return c < 0x80 ? c >= '0' && c <= '9' : in(kNumeric, c);
}
bool is_punctuation(char32_t c) {
  return in(kPunctuation, c);
}
bool is_control(char32_t c) {
  return in(kControl, c);
}
bool is_nonspacing_mark(char32_t c) {
  return c >= 0x300 && in(kNonspacingMark, c);
}
bool is_combining_mark(char32_t c) {
  return c >= 0x300 && in(kCombiningMark, c);
}

bool is_chinese(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
         (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

void append_lower(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
  } else if (c == 0x130) {
    out += "i\xCC\x87";
  } else if (const auto* r = find(std::span<const LowerRange>(kNewLower), c)) {
    append(out, static_cast<char32_t>(static_cast<int32_t>(c) + r->distance));
  } else {
    append(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
  }
}

int script(char32_t c) {
  const auto* r = find(std::span<const ScriptRange>(kScripts), c);
  return r ? r->script : 0;
}

std::string normalize(std::string_view text, Form form) {
  std::string out;
  out.reserve(text.size());
  // ASCII never changes and never joins what stands before it, and inert characters join nothing: only the stretches
  // between (with the ASCII character that a mark may join) go through the library.
  size_t at = 0, begin = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      size_t run = at;
      while (run < text.size() && static_cast<unsigned char>(text[run]) < 0x80) ++run;
      if (begin < at) append_normalized(out, text.substr(begin, at - begin), form);
      const size_t keep = run < text.size() ? run - 1 : run;
      out.append(text, at, keep - at);
      begin = keep;
      at = run;
      continue;
    }
    const size_t start = at;
    if (inert(next(text, at))) {
      append_normalized(out, text.substr(begin, start - begin), form);
      out.append(text, start, at - start);
      begin = at;
    }
  }
  append_normalized(out, text.substr(begin), form);
  return out;
}

size_t grapheme_end(std::string_view text, size_t from) {
  size_t at = from;
  char32_t before = next(text, at);
  utf8proc_int32_t state = 0;
  while (at < text.size()) {
    size_t end = at;
    const char32_t c = next(text, end);
    const auto* young = find(std::span<const CategoryRange>(kNewCodePoints), c);
    bool boundary = utf8proc_grapheme_break_stateful(static_cast<utf8proc_int32_t>(before),
                                                     static_cast<utf8proc_int32_t>(c), &state);
    if (young && young->category[0] == 'M' && before != '\r' && before != '\n' && !is_control(before)) boundary = false;
    if (boundary) break;
    before = c;
    at = end;
  }
  return at;
}

std::span<const CategoryRange> new_code_points() {
  return kNewCodePoints;
}
std::span<const Range> new_han() {
  return kNewHan;
}

}  // namespace moiety::unicode
