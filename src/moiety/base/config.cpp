#include "moiety/base/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/text.h"

namespace moiety {
namespace {

/// A value in a message: short, whatever it is.
std::string value_text(const nlohmann::json& value) {
  if (value.is_object()) return fmt::format("a section of {} keys", value.size());
  if (value.is_array() && value.size() > 8) return fmt::format("a list of {}", value.size());
  return shown(value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

std::string number_text(double value) {
  return value == std::floor(value) && std::abs(value) < 1e15 ? fmt::format("{}", static_cast<int64_t>(value))
                                                              : fmt::format("{}", value);
}

/// Calls `visit` with every number, text or element below `value`.
template <class Visit>
void each_leaf(const nlohmann::json& value, const Visit& visit) {
  if (value.is_array() || value.is_object()) {
    for (const auto& item : value) each_leaf(item, visit);
  } else if (!value.is_null()) {
    visit(value);
  }
}

}  // namespace

Fields::Fields(const nlohmann::json& input, const std::string& where, std::string path, const Lines* lines)
    : input_(&input), where_(where), path_(std::move(path)), lines_(lines) {}

const nlohmann::json* Fields::find(const std::string& name) const {
  if (input_ == nullptr) return nullptr;
  auto found = input_->find(name);
  return found == input_->end() ? nullptr : &*found;
}

const Lines* Fields::lines_of(const Lines* lines, const std::string& key) {
  if (lines == nullptr) return nullptr;
  auto found = lines->keys.find(key);
  return found == lines->keys.end() ? lines : &found->second;
}

const Lines* Fields::lines_of(const Lines* lines, size_t index) {
  if (lines == nullptr) return nullptr;
  return index < lines->items.size() ? &lines->items[index] : lines;
}

void Fields::reject(const std::string& path, const Lines* lines, const std::string& what) const {
  std::string place = where_;
  if (lines != nullptr && lines->line > 0) place += fmt::format(":{}", lines->line);
  if (path.empty()) fail("{}: {}", place, what);
  fail("{}: `{}` {}", place, shown(path, 200), what);
}

void Fields::wrong_type(const nlohmann::json& given, const std::string& path, const Lines* lines,
                        const std::string& right) const {
  reject(path, lines, fmt::format("is {}; {} is right", value_text(given), right));
}

void Fields::check_keys(const std::vector<FieldInfo>& known) const {
  if (!input_->is_object()) {
    if (!path_.empty()) wrong_type(*input_, path_, lines_, "a section of keys and values");
    reject("", lines_, fmt::format("the settings are {}; keys and values are right", value_text(*input_)));
  }
  std::vector<std::string> names;
  for (const FieldInfo& info : known) names.push_back(info.name);
  for (const auto& [key, value] : input_->items()) {
    if (std::find(names.begin(), names.end(), key) != names.end()) continue;
    std::string inside = path_.empty() ? "" : fmt::format(" in `{}`", shown(path_, 200));
    std::string keys = names.empty() ? "there are no keys" : "the keys are " + list_of(names, "and");
    reject("", lines_of(lines_, key),
           fmt::format("unknown key `{}`{}{}; {}", shown(key), inside, did_you_mean(key, names), keys));
  }
}

void Fields::read(const nlohmann::json& given, bool& value, const std::string& path, const Lines* lines) const {
  if (!given.is_boolean()) wrong_type(given, path, lines, "true or false");
  value = given.get<bool>();
}

void Fields::read(const nlohmann::json& given, int64_t& value, const std::string& path, const Lines* lines) const {
  if (given.is_number_unsigned()) {
    auto number = given.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      wrong_type(given, path, lines, "a whole number below 2^63");
    value = static_cast<int64_t>(number);
  } else if (given.is_number_integer()) {
    value = given.get<int64_t>();
  } else if (given.is_number_float() && std::abs(given.get<double>()) <= 9007199254740992.0 &&
             given.get<double>() == std::floor(given.get<double>())) {
    value = static_cast<int64_t>(given.get<double>());  // 1e3 is a whole number too
  } else {
    wrong_type(given, path, lines, "a whole number");
  }
}

void Fields::read(const nlohmann::json& given, int& value, const std::string& path, const Lines* lines) const {
  int64_t wide = 0;
  read(given, wide, path, lines);
  if (wide < std::numeric_limits<int>::min() || wide > std::numeric_limits<int>::max())
    wrong_type(given, path, lines, "a whole number between -2^31 and 2^31 - 1");
  value = static_cast<int>(wide);
}

void Fields::read(const nlohmann::json& given, double& value, const std::string& path, const Lines* lines) const {
  if (!given.is_number() || !std::isfinite(given.get<double>())) wrong_type(given, path, lines, "a finite number");
  value = given.get<double>();
}

void Fields::read(const nlohmann::json& given, float& value, const std::string& path, const Lines* lines) const {
  double wide = 0;
  read(given, wide, path, lines);
  if (std::abs(wide) > static_cast<double>(std::numeric_limits<float>::max()))
    wrong_type(given, path, lines, "a number that fits 32-bit floating point");
  value = static_cast<float>(wide);
}

void Fields::read(const nlohmann::json& given, std::string& value, const std::string& path, const Lines* lines) const {
  if (!given.is_string()) {
    bool scalar = given.is_number() || given.is_boolean();
    wrong_type(given, path, lines, scalar ? "text (in quotes)" : "text");
  }
  value = given.get<std::string>();
}

FieldInfo& Field::info() {
  return owner_.infos_[index_];
}

void Field::check_number(double limit, bool least) {
  if (!present_) return;
  each_leaf(info().value, [&](const nlohmann::json& leaf) {
    if (!leaf.is_number()) return;
    double value = leaf.get<double>();
    if (least ? value >= limit : value <= limit) return;
    owner_.reject(
        owner_.path_of(info().name), Fields::lines_of(owner_.lines_, info().name),
        fmt::format("is {}; {} {} is right", number_text(value), least ? "at least" : "at most", number_text(limit)));
  });
}

Field& Field::min(double least) {
  info().min = least;
  check_number(least, true);
  return *this;
}

Field& Field::max(double most) {
  info().max = most;
  check_number(most, false);
  return *this;
}

Field& Field::choices(std::vector<std::string> allowed) {
  info().choices = std::move(allowed);
  if (!present_) return *this;
  const auto& names = info().choices;
  each_leaf(info().value, [&](const nlohmann::json& leaf) {
    if (!leaf.is_string()) return;
    auto value = leaf.get<std::string>();
    if (std::find(names.begin(), names.end(), value) != names.end()) return;
    owner_.reject(owner_.path_of(info().name), Fields::lines_of(owner_.lines_, info().name),
                  fmt::format("is `{}`; {} is right{}", shown(value), list_of(names), did_you_mean(value, names)));
  });
  return *this;
}

Field& Field::length(size_t least, size_t most) {
  info().min_length = least;
  if (most != std::numeric_limits<size_t>::max()) info().max_length = most;
  const nlohmann::json& value = info().value;
  if (!present_ || value.is_null()) return *this;
  size_t length = value.is_string() ? value.get_ref<const std::string&>().size() : value.size();
  if (length < least || length > most) {
    std::string right = least == most       ? fmt::format("{}", least)
                        : info().max_length ? fmt::format("{} to {}", least, most)
                                            : fmt::format("at least {}", least);
    owner_.reject(owner_.path_of(info().name), Fields::lines_of(owner_.lines_, info().name),
                  fmt::format("has {} elements; {} is right", length, right));
  }
  return *this;
}

Field& Field::required() {
  info().required = true;
  if (owner_.input_ != nullptr && !present_)
    owner_.reject(owner_.path_of(info().name), owner_.lines_, fmt::format("is missing: {}", info().help));
  return *this;
}

std::string allowed_text(const FieldInfo& field) {
  std::string text = field.choices.empty() ? field.type : list_of(field.choices);
  if (field.min && field.max) {
    text += fmt::format(", {} to {}", number_text(*field.min), number_text(*field.max));
  } else if (field.min) {
    text += fmt::format(", at least {}", number_text(*field.min));
  } else if (field.max) {
    text += fmt::format(", at most {}", number_text(*field.max));
  }
  if (field.min_length && field.max_length && *field.min_length == *field.max_length) {
    text += fmt::format(", {} of them", *field.min_length);
  } else if (field.min_length || field.max_length) {
    if (field.min_length && *field.min_length > 0) text += fmt::format(", at least {} of them", *field.min_length);
    if (field.max_length) text += fmt::format(", at most {} of them", *field.max_length);
  }
  return text;
}

namespace {

std::string default_text(const FieldInfo& field) {
  if (field.required) return "required";
  if (field.value.is_null()) return "none";
  if (!field.fields.empty() && field.value.is_object()) return "";
  return field.value.is_string() && !field.value.get_ref<const std::string&>().empty() ? field.value.get<std::string>()
                                                                                       : field.value.dump();
}

std::string table_cell(std::string text) {
  for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2) text.insert(at, "\\");
  return text;
}

void table_rows(const std::vector<FieldInfo>& fields, const std::string& prefix, std::string& out) {
  for (const FieldInfo& field : fields) {
    std::string value = default_text(field);
    if (!value.empty() && !field.required && !field.value.is_null()) value = "`" + value + "`";
    out += fmt::format("| `{}{}` | {} | {} | {} |\n", prefix, field.name, table_cell(allowed_text(field)),
                       table_cell(value), table_cell(field.help));
    std::string suffix = field.type == "section" ? "." : field.type.rfind("map", 0) == 0 ? ".*." : "[].";
    table_rows(field.fields, prefix + field.name + suffix, out);
  }
}

nlohmann::json field_schema(const FieldInfo& field) {
  nlohmann::json out;
  std::string type = field.type;
  // Limits stand at the innermost type: "list of list of integer".
  std::vector<std::string> around;
  for (;;) {
    if (type.rfind("list of ", 0) == 0) {
      around.push_back("list");
      type = type.substr(8);
    } else if (type.rfind("map of ", 0) == 0) {
      around.push_back("map");
      type = type.substr(7);
    } else {
      break;
    }
  }
  if (type == "section") out = schema(field.fields);
  if (type == "integer") out["type"] = "integer";
  if (type == "number") out["type"] = "number";
  if (type == "text") out["type"] = "string";
  if (type == "true or false") out["type"] = "boolean";
  if (field.min) out["minimum"] = *field.min;
  if (field.max) out["maximum"] = *field.max;
  if (!field.choices.empty()) out["enum"] = field.choices;
  if (out.is_null()) out = nlohmann::json::object();
  for (auto kind = around.rbegin(); kind != around.rend(); ++kind) {
    if (*kind == "list") {
      out = {{"type", "array"}, {"items", out}};
    } else {
      out = {{"type", "object"}, {"additionalProperties", out}};
    }
  }
  bool list = !around.empty() && around[0] == "list", map = !around.empty() && around[0] == "map";
  std::string what = list ? "Items" : map ? "Properties" : "Length";
  if (field.min_length) out["min" + what] = *field.min_length;
  if (field.max_length) out["max" + what] = *field.max_length;
  out["description"] = field.help;
  if (!field.required && type != "section") out["default"] = field.value;
  return out;
}

}  // namespace

std::string help_text(const std::vector<FieldInfo>& fields, int indent) {
  size_t width = 0;
  for (const FieldInfo& field : fields) width = std::max(width, field.name.size());
  std::string out;
  for (const FieldInfo& field : fields) {
    std::string value = default_text(field);
    if (!value.empty() && !field.required) value = "default " + value;
    out += fmt::format("{:{}}{:<{}}  {} ({}{}{})\n", "", indent, field.name, width, field.help, allowed_text(field),
                       value.empty() ? "" : "; ", value);
    if (!field.fields.empty()) out += help_text(field.fields, indent + 2);
  }
  return out;
}

std::string markdown_table(const std::vector<FieldInfo>& fields) {
  std::string out = "| key | value | default | meaning |\n| --- | --- | --- | --- |\n";
  table_rows(fields, "", out);
  return out;
}

nlohmann::json schema(const std::vector<FieldInfo>& fields) {
  nlohmann::json properties = nlohmann::json::object(), required = nlohmann::json::array();
  for (const FieldInfo& field : fields) {
    properties[field.name] = field_schema(field);
    if (field.required) required.push_back(field.name);
  }
  nlohmann::json out{{"type", "object"}, {"properties", properties}, {"additionalProperties", false}};
  if (!required.empty()) out["required"] = required;
  return out;
}

}  // namespace moiety
