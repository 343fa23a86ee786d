#pragma once
// Typed settings. A struct names its fields once; from that come parsing (JSON, YAML), validation, help, JSON dump and
// docs.
//
//   struct Config {
//     int64_t experts = 8;
//     std::string gate = "softmax";
//     void fields(Fields& f) {
//       f("experts", experts, "number of experts").min(1).max(4096);
//       f("gate", gate, "how scores become gates").choices({"softmax", "sigmoid"});
//     }
//   };
//   auto config = parse<Config>(json, "run.yaml");
//
// Field types: bool, int, int64_t, float, double, std::string, nlohmann::json (anything), a struct with fields(), and
// std::optional, std::vector and std::map<std::string, ...> of these. null stands for an absent optional.
// A struct may also have `std::string problem() const`: a sentence about fields that do not fit together, "" when they
// do. Every Error names the source with its line, the key path, the value, what is allowed, and the nearest known key.
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "moiety/base/error.h"

namespace moiety {

/// Line numbers of a parsed text, shaped like its values. 0: unknown.
struct Lines {
  int line = 0;
  std::map<std::string, Lines> keys;
  std::vector<Lines> items;
};

struct YamlText {
  nlohmann::json value;
  Lines lines;
};
/// Parses one YAML document (scalars by the core schema of YAML 1.2: `yes` is a string, `1e-4` a number). Throws Error
/// with line and column, also for duplicate keys, keys that are not scalars, more than one document, nesting beyond 64,
/// and aliases that would blow the document up.
YamlText parse_yaml(const std::string& text, const std::string& where);
/// Parses JSON of any origin. Throws Error with line and column; nesting beyond 64 is refused.
nlohmann::json parse_json(std::string_view text, const std::string& where);

/// Runs `body`, which reads JSON of any shape: a value of another type than it asks for becomes an Error naming
/// `where`.
template <class Body>
auto reading_json(const std::string& where, const Body& body) {
  try {
    return body();
  } catch (const nlohmann::json::exception& error) {
    std::string reason = error.what();
    size_t bracket = reason.find("] ");  // "[json.exception.type_error.302] type must be number, but is string"
    fail("{}: {}", where, bracket == std::string::npos ? reason : reason.substr(bracket + 2));
  }
}

/// What one declared field is: for help, docs and JSON.
struct FieldInfo {
  std::string name;
  std::string
      type;  ///< "integer", "number", "text", "true or false", "list of integer", "map of text", "section", "anything"
  std::string help;
  nlohmann::json value;  ///< the default, or the effective value in a dump
  bool required = false;
  std::optional<double> min, max;
  std::optional<size_t> min_length, max_length;
  std::vector<std::string> choices;
  std::vector<FieldInfo> fields;  ///< of a section, or of the sections of a list or map
};

class Fields;

/// Limits of one field; chained after its declaration. They hold for given values, on lists and maps for every element.
class Field {
 public:
  Field& min(double least);
  Field& max(double most);
  Field& choices(std::vector<std::string> allowed);
  /// Number of elements of a list, map or text.
  Field& length(size_t least, size_t most = std::numeric_limits<size_t>::max());
  Field& required();

 private:
  friend class Fields;
  Field(Fields& owner, size_t index, bool present) : owner_(owner), index_(index), present_(present) {}
  FieldInfo& info();
  void check_number(double limit, bool least);
  Fields& owner_;
  size_t index_;
  bool present_;
};

namespace detail {

template <class T>
struct is_vector : std::false_type {};
template <class T>
struct is_vector<std::vector<T>> : std::true_type {};
template <class T>
struct is_optional : std::false_type {};
template <class T>
struct is_optional<std::optional<T>> : std::true_type {};
template <class T>
struct is_map : std::false_type {};
template <class T>
struct is_map<std::map<std::string, T>> : std::true_type {};

}  // namespace detail

template <class T>
concept Section = requires(T value, Fields& fields) {
  value.fields(fields);
};

/// Visits the fields of one section: reads them when it has input, and records what they are.
class Fields {
 public:
  /// Only records.
  Fields() = default;
  /// Reads from `input`; `path` is the key path of the section, "" at the top. The arguments must outlive this.
  Fields(const nlohmann::json& input, const std::string& where, std::string path, const Lines* lines);

  template <class T>
  Field operator()(const std::string& name, T& value, const std::string& help) {
    const nlohmann::json* given = find(name);
    if (given != nullptr) {
      read(*given, value, path_of(name), lines_of(lines_, name));
    }
    FieldInfo info;
    info.name = name;
    info.help = help;
    info.type = describe_type<T>(info.fields);
    info.value = to_json(value);
    infos_.push_back(std::move(info));
    return Field(*this, infos_.size() - 1, given != nullptr);
  }

  const std::vector<FieldInfo>& infos() const { return infos_; }
  /// Throws Error when the input is no object or has a key outside `known`.
  void check_keys(const std::vector<FieldInfo>& known) const;
  [[noreturn]] void reject(const std::string& path, const Lines* lines, const std::string& what) const;
  const std::string& path() const { return path_; }
  const Lines* lines() const { return lines_; }

  template <class T>
  static nlohmann::json to_json(T& value) {
    if constexpr (Section<T>) {
      Fields inner;
      value.fields(inner);
      nlohmann::json out = nlohmann::json::object();
      for (const FieldInfo& info : inner.infos_) out[info.name] = info.value;
      return out;
    } else if constexpr (detail::is_optional<T>::value) {
      return value ? to_json(*value) : nlohmann::json();
    } else if constexpr (std::is_same_v<T, std::vector<bool>>) {
      return value;
    } else if constexpr (detail::is_vector<T>::value) {
      nlohmann::json out = nlohmann::json::array();
      for (auto& item : value) out.push_back(to_json(item));
      return out;
    } else if constexpr (detail::is_map<T>::value) {
      nlohmann::json out = nlohmann::json::object();
      for (auto& [key, item] : value) out[key] = to_json(item);
      return out;
    } else {
      return value;
    }
  }

 private:
  friend class Field;

  const nlohmann::json* find(const std::string& name) const;
  std::string path_of(const std::string& name) const { return path_.empty() ? name : path_ + "." + name; }
  static const Lines* lines_of(const Lines* lines, const std::string& key);
  static const Lines* lines_of(const Lines* lines, size_t index);

  [[noreturn]] void wrong_type(const nlohmann::json& given, const std::string& path, const Lines* lines,
                               const std::string& right) const;
  void read(const nlohmann::json& given, bool& value, const std::string& path, const Lines* lines) const;
  void read(const nlohmann::json& given, int64_t& value, const std::string& path, const Lines* lines) const;
  void read(const nlohmann::json& given, int& value, const std::string& path, const Lines* lines) const;
  void read(const nlohmann::json& given, double& value, const std::string& path, const Lines* lines) const;
  void read(const nlohmann::json& given, float& value, const std::string& path, const Lines* lines) const;
  void read(const nlohmann::json& given, std::string& value, const std::string& path, const Lines* lines) const;
  void read(const nlohmann::json& given, nlohmann::json& value, const std::string&, const Lines*) const {
    value = given;
  }

  template <Section T>
  void read(const nlohmann::json& given, T& value, const std::string& path, const Lines* lines) const {
    T known;
    Fields names;
    known.fields(names);
    Fields inner(given, where_, path, lines);
    inner.check_keys(names.infos());
    value.fields(inner);
    if constexpr (requires { value.problem(); }) {
      std::string problem = value.problem();
      if (!problem.empty()) reject(path, lines, problem);
    }
  }

  template <class T>
  void read(const nlohmann::json& given, std::optional<T>& value, const std::string& path, const Lines* lines) const {
    if (given.is_null()) {
      value.reset();
      return;
    }
    T inner{};
    read(given, inner, path, lines);
    value = std::move(inner);
  }

  template <class T>
  void read(const nlohmann::json& given, std::vector<T>& value, const std::string& path, const Lines* lines) const {
    if (!given.is_array()) wrong_type(given, path, lines, "a list");
    value.clear();
    for (size_t i = 0; i < given.size(); ++i) {
      T item{};
      read(given[i], item, path + "[" + std::to_string(i) + "]", lines_of(lines, i));
      value.push_back(std::move(item));
    }
  }

  template <class T>
  void read(const nlohmann::json& given, std::map<std::string, T>& value, const std::string& path,
            const Lines* lines) const {
    if (!given.is_object()) wrong_type(given, path, lines, "a section of keys and values");
    value.clear();
    for (const auto& [key, element] : given.items()) {
      T item{};
      read(element, item, path + "." + key, lines_of(lines, key));
      value.emplace(key, std::move(item));
    }
  }

  template <class T>
  static std::string describe_type(std::vector<FieldInfo>& inner) {
    if constexpr (std::is_same_v<T, bool>) {
      return "true or false";
    } else if constexpr (std::is_integral_v<T>) {
      return "integer";
    } else if constexpr (std::is_floating_point_v<T>) {
      return "number";
    } else if constexpr (std::is_same_v<T, std::string>) {
      return "text";
    } else if constexpr (std::is_same_v<T, nlohmann::json>) {
      return "anything";
    } else if constexpr (detail::is_optional<T>::value) {
      return describe_type<typename T::value_type>(inner);
    } else if constexpr (detail::is_vector<T>::value) {
      return "list of " + describe_type<typename T::value_type>(inner);
    } else if constexpr (detail::is_map<T>::value) {
      return "map of " + describe_type<typename T::mapped_type>(inner);
    } else {
      T value;
      Fields fields;
      value.fields(fields);
      inner = fields.infos();
      return "section";
    }
  }

  const nlohmann::json* input_ = nullptr;
  std::string where_, path_;
  const Lines* lines_ = nullptr;
  std::vector<FieldInfo> infos_;
};

/// Reads a C from JSON; what is not given keeps its default. `where` names the source in errors.
template <Section C>
C parse(const nlohmann::json& json, const std::string& where, const Lines* lines = nullptr) {
  C config, defaults;
  Fields names;
  defaults.fields(names);
  Fields fields(json, where, "", lines);
  fields.check_keys(names.infos());
  config.fields(fields);
  if constexpr (requires { config.problem(); }) {
    std::string problem = config.problem();
    if (!problem.empty()) fields.reject("", lines, problem);
  }
  return config;
}

/// Reads a C from YAML text.
template <Section C>
C parse_yaml_as(const std::string& text, const std::string& where) {
  YamlText yaml = parse_yaml(text, where);
  if (yaml.value.is_null()) yaml.value = nlohmann::json::object();
  return parse<C>(yaml.value, where, &yaml.lines);
}

/// The fields of C with their defaults.
template <Section C>
std::vector<FieldInfo> describe() {
  C config;
  Fields fields;
  config.fields(fields);
  return fields.infos();
}

/// The effective values, as parse<C> reads them.
template <Section C>
nlohmann::json dump(const C& config) {
  C copy = config;
  return Fields::to_json(copy);
}

/// "integer of at least 1", "a or b", ...: what a field accepts.
std::string allowed_text(const FieldInfo& field);
/// One line a field, indented; sections below their field.
std::string help_text(const std::vector<FieldInfo>& fields, int indent = 2);
/// A Markdown table of key, type, default and meaning.
std::string markdown_table(const std::vector<FieldInfo>& fields);
/// A JSON Schema (draft 2020-12) of the section.
nlohmann::json schema(const std::vector<FieldInfo>& fields);

}  // namespace moiety
