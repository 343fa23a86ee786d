#pragma once
// Small helpers for sentences: the nearest known name for a mistyped one, lists of names, quoted values.
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace moiety {

/// Edits that turn `a` into `b`: insert, delete, replace, swap of neighbours (optimal string alignment), letter case
/// ignored. Only the first 128 bytes of each count.
size_t edit_distance(std::string_view a, std::string_view b);

/// The candidate nearest to `name`, when it is near enough to be meant (about a third of the letters differ, or one is
/// a prefix of the other); the first of equals.
std::optional<std::string> nearest(std::string_view name, const std::vector<std::string>& candidates);

/// "; did you mean `X`?" or "", to put at the end of a sentence.
std::string did_you_mean(std::string_view name, const std::vector<std::string>& candidates);

/// "a, b or c".
std::string list_of(const std::vector<std::string>& names, std::string_view last = "or");

/// The text shortened to about `limit` bytes, in one line, control characters and ill-formed UTF-8 shown as \xNN: safe
/// to put into a message whatever a file holds.
std::string shown(std::string_view text, size_t limit = 80);

}  // namespace moiety
