// YAML and JSON text to JSON values, with the line of every value.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <charconv>
#include <cmath>
#include <sstream>

#include "moiety/base/config.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

constexpr size_t max_depth = 64;
constexpr size_t max_yaml_bytes = size_t{4} << 20;

bool all_digits(std::string_view text, bool hex = false) {
  if (text.empty()) return false;
  for (char c : text) {
    bool digit = c >= '0' && c <= '9';
    if (!digit && !(hex && ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')))) return false;
  }
  return true;
}

template <class T>
std::optional<T> whole(std::string_view text, int base) {
  T value{};
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// [-+]? ( .digits | digits (. digits?)? ) ( [eE] [-+]? digits )?
bool looks_real(std::string_view text) {
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  std::string_view mantissa = text;
  size_t e = text.find_first_of("eE");
  if (e != std::string_view::npos) {
    mantissa = text.substr(0, e);
    std::string_view exponent = text.substr(e + 1);
    if (!exponent.empty() && (exponent[0] == '-' || exponent[0] == '+')) exponent.remove_prefix(1);
    if (!all_digits(exponent)) return false;
  }
  size_t dot = mantissa.find('.');
  if (dot == std::string_view::npos) return all_digits(mantissa);
  std::string_view before = mantissa.substr(0, dot), after = mantissa.substr(dot + 1);
  return (before.empty() || all_digits(before)) && (after.empty() || all_digits(after)) &&
         !(before.empty() && after.empty());
}

/// A plain scalar by the core schema of YAML 1.2.
nlohmann::json plain_scalar(const std::string& text) {
  if (text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL") return nullptr;
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  std::string_view digits = text;
  bool negative = digits[0] == '-';
  if (negative || digits[0] == '+') digits.remove_prefix(1);
  if (all_digits(digits)) {
    std::string signed_text = (negative ? "-" : "") + std::string(digits);
    if (auto value = whole<int64_t>(signed_text, 10)) return *value;
    if (auto value = whole<uint64_t>(signed_text, 10)) return *value;
  }
  if (text.rfind("0x", 0) == 0 && all_digits(text.substr(2), true)) {
    if (auto value = whole<uint64_t>(std::string_view(text).substr(2), 16)) return *value;
  }
  if (text.rfind("0o", 0) == 0) {
    if (auto value = whole<uint64_t>(std::string_view(text).substr(2), 8)) return *value;
  }
  if (looks_real(text)) return std::strtod(text.c_str(), nullptr);
  if (digits == ".inf" || digits == ".Inf" || digits == ".INF") return negative ? -INFINITY : INFINITY;
  if (text == ".nan" || text == ".NaN" || text == ".NAN") return NAN;
  return text;
}

/// Builds the values from the parser's events; no recursion, and aliases are paid for from a budget.
class Builder : public YAML::EventHandler {
 public:
  Builder(std::string where, size_t text_bytes) : where_(std::move(where)), budget_(10000 + 4 * text_bytes) {}

  nlohmann::json value;
  Lines lines;

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { put(mark, nullptr, anchor); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    auto found = anchors_.find(anchor);
    if (found == anchors_.end()) refuse(mark, "an alias inside the value that it names");
    put(mark, found->second.first, 0, found->second.second);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& text) override {
    bool as_text = tag == "!" || tag == "tag:yaml.org,2002:str";
    put(mark, as_text ? nlohmann::json(text) : plain_scalar(text), anchor, text.size(), &text);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, anchor, nlohmann::json::array());
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, anchor, nlohmann::json::object());
  }
  void OnMapEnd() override { close(); }

 private:
  struct Open {
    nlohmann::json value;
    Lines lines;
    YAML::anchor_t anchor = 0;
    YAML::Mark mark;
    size_t bytes = 0;
    bool has_key = false;
    std::string key;
    int key_line = 0;
  };

  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& what) const {
    fail("{}:{}:{}: {}", where_, mark.line + 1, mark.column + 1, what);
  }

  void open(const YAML::Mark& mark, YAML::anchor_t anchor, nlohmann::json empty) {
    if (stack_.size() >= max_depth) refuse(mark, fmt::format("nested more than {} deep", max_depth));
    if (!stack_.empty() && stack_.back().value.is_object() && !stack_.back().has_key)
      refuse(mark, "a key that is a list or a section; a word is right");
    Open frame;
    frame.value = std::move(empty);
    frame.lines.line = mark.line + 1;
    frame.anchor = anchor;
    frame.mark = mark;
    stack_.push_back(std::move(frame));
  }

  void close() {
    Open done = std::move(stack_.back());
    stack_.pop_back();
    if (done.anchor != 0) anchors_[done.anchor] = {done.value, done.bytes};
    add(done.mark, std::move(done.value), std::move(done.lines), done.bytes + 1, nullptr);
  }

  void put(const YAML::Mark& mark, nlohmann::json scalar, YAML::anchor_t anchor, size_t bytes = 0,
           const std::string* text = nullptr) {
    if (anchor != 0) anchors_[anchor] = {scalar, bytes};
    Lines line;
    line.line = mark.line + 1;
    add(mark, std::move(scalar), std::move(line), bytes + 1, text);
  }

  void add(const YAML::Mark& mark, nlohmann::json element, Lines element_lines, size_t bytes, const std::string* text) {
    if (bytes > budget_) refuse(mark, "aliases make this document much larger than its text");
    if (stack_.empty()) {
      value = std::move(element);
      lines = std::move(element_lines);
      return;
    }
    Open& top = stack_.back();
    top.bytes += bytes;
    if (top.value.is_array()) {
      spend(mark, bytes);
      top.value.push_back(std::move(element));
      top.lines.items.push_back(std::move(element_lines));
    } else if (!top.has_key) {
      if (element.is_object() || element.is_array()) refuse(mark, "a key that is a list or a section; a word is right");
      top.key = text != nullptr ? *text : element.is_string() ? element.get<std::string>() : element.dump();
      top.key_line = mark.line + 1;
      if (top.value.contains(top.key)) refuse(mark, fmt::format("the key `{}` comes twice", shown(top.key)));
      top.has_key = true;
    } else {
      spend(mark, bytes);
      element_lines.line = top.key_line;
      top.value[top.key] = std::move(element);
      top.lines.keys[top.key] = std::move(element_lines);
      top.has_key = false;
    }
  }

  void spend(const YAML::Mark& mark, size_t bytes) {
    spent_ += bytes;
    // Containers are counted again when they close: at most once a level.
    if (spent_ > budget_ * max_depth) refuse(mark, "aliases make this document much larger than its text");
  }

  std::string where_;
  size_t budget_, spent_ = 0;
  std::vector<Open> stack_;
  std::map<YAML::anchor_t, std::pair<nlohmann::json, size_t>> anchors_;
};

}  // namespace

YamlText parse_yaml(const std::string& text, const std::string& where) {
  check(text.size() <= max_yaml_bytes, "{}: {} bytes are too many for settings; at most {} are read", where,
        text.size(), max_yaml_bytes);
  Builder builder(where, text.size());
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    if (parser.HandleNextDocument(builder)) {
      Builder rest(where, text.size());
      check(!parser.HandleNextDocument(rest), "{}: more than one YAML document; one is right", where);
    }
  } catch (const YAML::Exception& error) {
    fail("{}:{}:{}: {}", where, error.mark.line + 1, error.mark.column + 1, shown(error.msg, 300));
  }
  return {std::move(builder.value), std::move(builder.lines)};
}

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  // Depth first: a JSON value is copied and printed by recursion.
  size_t depth = 0;
  bool in_text = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (in_text) {
      if (c == '\\') ++i;
      if (c == '"') in_text = false;
    } else if (c == '"') {
      in_text = true;
    } else if (c == '[' || c == '{') {
      check(++depth <= max_depth, "{}: nested more than {} deep at byte {}", where, max_depth, i);
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return reading_json(where + ": not JSON", [&] { return nlohmann::json::parse(text); });
}

}  // namespace moiety
