#pragma once
// UTF-8 as Unicode chapter 3 defines it: surrogates, overlong forms and values above U+10FFFF are ill-formed.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moiety::utf8 {

/// Decodes the character at `at` (< text.size()) and moves `at` behind it. An ill-formed sequence gives U+FFFD and
/// moves behind its longest prefix that could have begun a character (one U+FFFD per maximal ill-formed sequence); `ok`
/// becomes false then.
inline char32_t next(std::string_view text, size_t& at, bool& ok) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(at++);
  if (lead < 0x80) return lead;
  int more = 0;
  unsigned char low = 0x80, high = 0xBF;
  char32_t value = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    more = 1, value = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    more = 2, value = lead & 0x0F;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    more = 3, value = lead & 0x07;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    ok = false;
    return 0xFFFD;
  }
  for (; more > 0; --more) {
    if (at >= text.size() || byte(at) < low || byte(at) > high) {
      ok = false;
      return 0xFFFD;
    }
    value = value << 6 | (byte(at++) & 0x3F);
    low = 0x80, high = 0xBF;
  }
  return value;
}

inline void append(std::string& out, char32_t c) {
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

/// True when the whole text is well-formed.
inline bool valid(std::string_view text) {
  bool ok = true;
  for (size_t at = 0; at < text.size() && ok;) next(text, at, ok);
  return ok;
}

/// The text itself when well-formed, else with U+FFFD for every maximal ill-formed sequence.
inline std::string repair(std::string_view text) {
  if (valid(text)) return std::string(text);
  std::string out;
  bool ok = true;
  for (size_t at = 0; at < text.size();) append(out, next(text, at, ok));
  return out;
}

inline std::vector<char32_t> decode(std::string_view text) {
  std::vector<char32_t> out;
  out.reserve(text.size());
  bool ok = true;
  for (size_t at = 0; at < text.size();) out.push_back(next(text, at, ok));
  return out;
}

inline std::string encode(const std::vector<char32_t>& text) {
  std::string out;
  out.reserve(text.size());
  for (const char32_t c : text) append(out, c);
  return out;
}

}  // namespace moiety::utf8
