#pragma once
// Unicode as the `tokenizers` package sees it: its parts carry Unicode data of different ages, measured by
// tools/unicode_tables.py. Texts are valid UTF-8 unless said otherwise.
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moiety::unicode {

/// Bytes of the character that starts with this lead byte of valid UTF-8.
inline size_t char_length(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}
/// The character at `text[at]`; moves `at` behind it.
char32_t next(std::string_view text, size_t& at);
/// The character that ends at `text[at - 1]` (`at` > 0).
char32_t previous(std::string_view text, size_t at);
void append(std::string& out, char32_t c);

/// Length of the well-formed character at `bytes[at]`, or minus the length of the maximal ill-formed sequence there
/// (Unicode, chapter 3: surrogates, overlong forms and values above U+10FFFF are ill-formed). An ill-formed sequence
/// that only lacks bytes at the end of `bytes` gives 0.
int well_formed(std::string_view bytes, size_t at);
/// The character at `bytes[at]`, U+FFFD for a maximal ill-formed sequence; moves `at` behind it.
char32_t next_any(std::string_view bytes, size_t& at);
/// Any bytes to characters, or to valid UTF-8: U+FFFD for each maximal ill-formed sequence.
std::vector<char32_t> decode(std::string_view bytes);
std::string sanitize(std::string_view bytes);
bool valid(std::string_view bytes);

bool is_white_space(char32_t c);  ///< the property White_Space
bool is_word(char32_t c);         ///< \w of the Rust regex package
bool is_numeric(char32_t c);
bool is_punctuation(char32_t c);      ///< ASCII punctuation and symbols, and category P
bool is_control(char32_t c);          ///< what BERT's clean_text drops
bool is_nonspacing_mark(char32_t c);  ///< what BERT's strip_accents drops
bool is_combining_mark(char32_t c);   ///< what StripAccents drops
bool is_chinese(char32_t c);          ///< BERT's CJK blocks
void append_lower(std::string& out, char32_t c);
/// Class of the UnicodeScripts pre-tokenizer: characters split where it changes; 0 goes with everything.
int script(char32_t c);

enum class Form { NFC, NFD, NFKC, NFKD };
std::string normalize(std::string_view text, Form form);
/// End of the extended grapheme cluster that starts at `from`.
size_t grapheme_end(std::string_view text, size_t from);

struct CategoryRange {
  char32_t first, last;
  char category[3];
};
/// Code points younger than the Unicode version of older system libraries, with their general category.
std::span<const CategoryRange> new_code_points();
struct Range {
  char32_t first, last;
};
std::span<const Range> new_han();

}  // namespace moiety::unicode
