#pragma once
// Regular expressions of tokenizer files, written for Oniguruma, run by PCRE2 (UTF + UCP): the few differences in
// meaning
// (\h, \w, \s, \b, (?m), nested and intersected classes, code points of newer Unicode versions) are translated.
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace moiety {

class Regex {
 public:
  /// Throws Error naming `where` when the pattern does not compile.
  Regex(std::string_view pattern, const std::string& where);
  /// Walks over all matches in valid UTF-8 text, leftmost first, never an empty match right behind the last match.
  /// Throws Error when a match needs too many steps.
  class Matches {
   public:
    Matches(const Regex& regex, std::string_view text) : regex_(regex), text_(text) {}
    bool next(size_t& begin, size_t& end);

   private:
    const Regex& regex_;
    std::string_view text_;
    size_t from_ = 0;
    size_t last_end_ = std::string_view::npos;
  };

  /// The pattern as PCRE2 gets it.
  static std::string translate(std::string_view pattern, const std::string& where);

 private:
  bool search(std::string_view text, size_t from, size_t& begin, size_t& end) const;
  struct Code;
  std::shared_ptr<const Code> code_;
  std::string where_;
};

}  // namespace moiety
