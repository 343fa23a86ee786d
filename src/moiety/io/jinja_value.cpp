// Values as Python has them: str and repr, comparison, arithmetic, indexing, formatting, JSON.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "moiety/io/jinja.h"
#include "moiety/io/unicode.h"

namespace moiety::jinja {
namespace {

constexpr int max_nesting = 200;

int nested(const std::vector<Value>& items) {
  int deepest = 0;
  for (const auto& i : items) deepest = std::max(deepest, nesting(i));
  check(deepest < max_nesting, "values nest more than {} deep", max_nesting);
  return deepest + 1;
}

const char* op_text(Op op) {
  switch (op) {
    case Op::add:
      return "+";
    case Op::subtract:
      return "-";
    case Op::multiply:
      return "*";
    case Op::divide:
      return "/";
    case Op::floor_divide:
      return "//";
    case Op::modulo:
      return "%";
    default:
      return "** or pow()";
  }
}

// By reference: the operation that sets `value` runs before this reads it.
int64_t checked(bool overflow, const int64_t& value) {
  check(!overflow, "an integer exceeds 64 bits");
  return value;
}

}  // namespace

// The rendering that runs in this thread: comparisons and hashes inside of containers count as its work.
thread_local Run* running = nullptr;

RunningHere::RunningHere(Run* run) : before_(running) {
  running = run;
}
RunningHere::~RunningHere() {
  running = before_;
}

Value::Value(std::string value, bool markup)
    : kind_(Kind::text), object_(std::make_shared<const Text>(Text{std::move(value), markup})) {}
Value::Value(std::shared_ptr<const List> list) : kind_(Kind::list), object_(std::move(list)) {}
Value::Value(std::shared_ptr<const Dict> dict) : kind_(Kind::dict), object_(std::move(dict)) {}
Value::Value(std::shared_ptr<const Function> function) : kind_(Kind::function), object_(std::move(function)) {}
Value::Value(std::shared_ptr<Loop> loop) : kind_(Kind::loop), object_(std::move(loop)) {}
Value Value::list(std::vector<Value> items, Shape shape) {
  auto list = std::make_shared<List>();
  list->shape = shape;
  list->nesting = nested(items);
  list->items = std::move(items);
  return Value(std::shared_ptr<const List>(std::move(list)));
}
Value Value::undefined(std::string message, bool unsafe) {
  Value v;
  v.object_ = std::make_shared<const Missing>(Missing{std::move(message), unsafe});
  return v;
}
Value Value::space(Space* space) {
  Value v;
  v.kind_ = Kind::space;
  v.number_.space = space;
  return v;
}
Value Value::macro(Macro* macro) {
  Value v;
  v.kind_ = Kind::macro;
  v.number_.macro = macro;
  return v;
}
Value Value::other(Kind kind, std::shared_ptr<void> object) {
  Value v;
  v.kind_ = kind;
  v.object_ = std::move(object);
  return v;
}
const std::string& Value::text() const {
  return static_cast<const Text*>(object_.get())->text;
}
bool Value::markup() const {
  return kind_ == Kind::text && static_cast<const Text*>(object_.get())->markup;
}
std::string Value::missing() const {
  return object_ ? static_cast<const Missing*>(object_.get())->message : "an undefined value is used";
}

int nesting(const Value& value) {
  switch (value.kind()) {
    case Kind::list:
      return value.list().nesting;
    case Kind::dict:
      return value.dict().nesting;
    case Kind::cycler:
      return value.object<Cycler>().nesting;
    case Kind::function:
      return nesting(value.function().self) + 1;
    default:
      return 0;
  }
}

bool Value::truth() const {
  switch (kind_) {
    case Kind::undefined:
    case Kind::none:
      return false;
    case Kind::boolean:
      return number_.boolean;
    case Kind::integer:
      return number_.integer != 0;
    case Kind::real:
      return number_.real != 0;
    case Kind::text:
      return !text().empty();
    case Kind::list:
      return list().shape == Shape::iterator || !list().items.empty();
    case Kind::dict:
      return !dict().items.empty();
    default:
      return true;
  }
}

size_t ValueHash::operator()(const Value& v) const {
  if (running) running->step();
  switch (v.kind()) {
    case Kind::boolean:
    case Kind::integer:
      return std::hash<double>()(static_cast<double>(v.integer()));
    case Kind::real:
      return std::hash<double>()(v.real());
    case Kind::text:
      return std::hash<std::string>()(v.text());
    case Kind::list:
      return v.list().items.size() + 77;  // tuples: rare as keys
    default:
      return static_cast<size_t>(v.kind());
  }
}
bool ValueEqual::operator()(const Value& a, const Value& b) const {
  return equal(a, b);
}

const Value* Dict::find(const Value& key) const {
  if (!index_.empty()) {
    const auto found = index_.find(key);
    return found == index_.end() ? nullptr : &items[found->second].second;
  }
  for (const auto& [k, v] : items)
    if (equal(k, key)) return &v;
  return nullptr;
}
const Value* Dict::find_text(std::string_view key) const {
  if (!index_.empty()) return find(Value(std::string(key)));
  for (const auto& [k, v] : items)
    if (k.is_text() && k.text() == key) return &v;
  return nullptr;
}
void Dict::set(Value key, Value value) {
  nesting = std::max({nesting, moiety::jinja::nesting(key) + 1, moiety::jinja::nesting(value) + 1});
  check(nesting <= max_nesting, "values nest more than {} deep", max_nesting);
  if (auto* found = const_cast<Value*>(find(key))) {
    *found = std::move(value);
    return;
  }
  items.emplace_back(std::move(key), std::move(value));
  if (items.size() == 17)
    for (size_t i = 0; i < items.size(); ++i) index_.emplace(items[i].first, i);
  else if (items.size() > 17)
    index_.emplace(items.back().first, items.size() - 1);
}

void check_hashable(const Value& v) {
  if (v.is(Kind::dict)) fail("unhashable type: 'dict'");
  if (!v.is(Kind::list)) return;
  const Shape shape = v.list().shape;
  if (shape == Shape::list) fail("unhashable type: 'list'");
  if (shape == Shape::tuple)
    for (const auto& i : v.list().items) check_hashable(i);
}

std::string type_name(const Value& v) {
  switch (v.kind()) {
    case Kind::undefined:
      return "Undefined";
    case Kind::none:
      return "NoneType";
    case Kind::boolean:
      return "bool";
    case Kind::integer:
      return "int";
    case Kind::real:
      return "float";
    case Kind::text:
      return v.markup() ? "Markup" : "str";
    case Kind::list:
      switch (v.list().shape) {
        case Shape::list:
          return "list";
        case Shape::tuple:
          return "tuple";
        case Shape::iterator:
          return "generator";
        case Shape::keys:
          return "dict_keys";
        case Shape::values:
          return "dict_values";
        case Shape::items:
          return "dict_items";
        case Shape::range:
          return "range";
      }
      return "list";
    case Kind::dict:
      return "dict";
    case Kind::space:
      return "Namespace";
    case Kind::macro:
      return "Macro";
    case Kind::loop:
      return "LoopContext";
    case Kind::function:
      return v.function().global ? "function" : "builtin_function_or_method";
    case Kind::cycler:
      return "Cycler";
    case Kind::joiner:
      return "Joiner";
  }
  return "object";
}

std::string real_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
  const auto result = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  std::string_view scientific(buffer, static_cast<size_t>(result.ptr - buffer));
  const size_t e = scientific.find('e');
  int exponent = 0;
  std::from_chars(scientific.data() + e + (scientific[e + 1] == '+' ? 2 : 1), scientific.data() + scientific.size(),
                  exponent);
  if (exponent < -4 || exponent >= 16) {
    return fmt::format("{}e{}{:02}", scientific.substr(0, e), exponent < 0 ? '-' : '+', std::abs(exponent));
  }
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed);
  std::string out(buffer, fixed.ptr);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

namespace {

std::string quote(std::string_view text) {
  const char mark = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, mark);
  for (size_t at = 0; at < text.size();) {
    const size_t before = at;
    const char32_t c = unicode::next_any(text, at);
    if (c == static_cast<char32_t>(mark) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (printable(c)) {
      out.append(text.substr(before, at - before));
    } else if (c < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c));
    } else if (c < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<uint32_t>(c));
    }
  }
  out += mark;
  return out;
}

void write_repr(Run& run, const Value& v, std::string& out) {
  const Run::Deeper deeper(run);
  run.step();
  check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the text of a value exceeds {} bytes", run.max_bytes());
  const auto sequence = [&](const std::vector<Value>& items) {
    for (size_t i = 0; i < items.size(); ++i) {
      if (i) out += ", ";
      write_repr(run, items[i], out);
    }
  };
  const auto mapping = [&](const Dict& dict) {
    out += '{';
    for (size_t i = 0; i < dict.items.size(); ++i) {
      if (i) out += ", ";
      write_repr(run, dict.items[i].first, out);
      out += ": ";
      write_repr(run, dict.items[i].second, out);
    }
    out += '}';
  };
  switch (v.kind()) {
    case Kind::undefined:
      out += "Undefined";
      return;
    case Kind::none:
      out += "None";
      return;
    case Kind::boolean:
      out += v.boolean() ? "True" : "False";
      return;
    case Kind::integer:
      out += std::to_string(v.integer());
      return;
    case Kind::real:
      out += real_text(v.real());
      return;
    case Kind::text:
      if (v.markup()) out += "Markup(";
      out += quote(v.text());
      if (v.markup()) out += ')';
      return;
    case Kind::list: {
      const List& list = v.list();
      switch (list.shape) {
        case Shape::list:
          out += '[';
          sequence(list.items);
          out += ']';
          return;
        case Shape::tuple:
          out += '(';
          sequence(list.items);
          out += list.items.size() == 1 ? ",)" : ")";
          return;
        case Shape::iterator:
          out += "<generator object>";
          return;
        case Shape::range:
          out += list.step == 1 ? fmt::format("range({}, {})", list.start, list.stop)
                                : fmt::format("range({}, {}, {})", list.start, list.stop, list.step);
          return;
        default:
          out += type_name(v) + "([";
          sequence(list.items);
          out += "])";
          return;
      }
    }
    case Kind::dict:
      mapping(v.dict());
      return;
    case Kind::space:
      out += "<Namespace ";
      mapping(v.space().attributes);
      out += '>';
      return;
    case Kind::macro:
      out += "<Macro " + (v.macro().name.empty() ? std::string("anonymous") : quote(v.macro().name)) + ">";
      return;
    default:
      out += "<" + type_name(v) + " object>";
      return;
  }
}

}  // namespace

std::string to_repr(Run& run, const Value& value) {
  std::string out;
  write_repr(run, value, out);
  run.step(out.size() / 16);
  return out;
}

std::string to_text(Run& run, const Value& value) {
  if (value.is_text()) return value.text();
  if (value.is_undefined()) return {};
  return to_repr(run, value);
}

namespace {

void write_json_text(const std::string& text, bool ascii, std::string& out) {
  out += '"';
  for (size_t at = 0; at < text.size();) {
    const size_t before = at;
    const char32_t c = unicode::next_any(text, at);
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\b':
        out += "\\b";
        break;
      default:
        if (c < 0x20 || (ascii && c >= 0x7F)) {
          if (c >= 0x10000) {
            out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + ((c - 0x10000) >> 10), 0xDC00 + ((c - 0x10000) & 0x3FF));
          } else {
            out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
          }
        } else {
          out.append(text, before, at - before);
        }
    }
  }
  out += '"';
}

struct JsonStyle {
  bool ascii;
  const std::optional<std::string>& indent;
  const std::string &comma, &colon;
  bool sorted;
};

void write_json(Run& run, const Value& v, const JsonStyle& style, size_t level, std::string& out) {
  const Run::Deeper deeper(run);
  run.step();
  check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the JSON of a value exceeds {} bytes", run.max_bytes());
  const auto line = [&](size_t depth) {
    if (!style.indent) return;
    run.step(depth);
    out += '\n';
    for (size_t i = 0; i < depth; ++i) out += *style.indent;
  };
  const auto real = [](double d) -> std::string {
    return std::isnan(d) ? "NaN" : std::isinf(d) ? (d < 0 ? "-Infinity" : "Infinity") : real_text(d);
  };
  switch (v.kind()) {
    case Kind::none:
      out += "null";
      return;
    case Kind::boolean:
      out += v.boolean() ? "true" : "false";
      return;
    case Kind::integer:
      out += std::to_string(v.integer());
      return;
    case Kind::real:
      out += real(v.real());
      return;
    case Kind::text:
      write_json_text(v.text(), style.ascii, out);
      return;
    case Kind::list: {
      if (v.list().shape != Shape::list && v.list().shape != Shape::tuple) break;
      const auto& items = v.list().items;
      out += '[';
      for (size_t i = 0; i < items.size(); ++i) {
        if (i) out += style.comma;
        line(level + 1);
        write_json(run, items[i], style, level + 1, out);
      }
      if (!items.empty()) line(level);
      out += ']';
      return;
    }
    case Kind::dict: {
      std::vector<const std::pair<Value, Value>*> items;
      for (const auto& i : v.dict().items) items.push_back(&i);
      if (style.sorted)
        std::stable_sort(items.begin(), items.end(),
                         [&](const auto* a, const auto* b) { return compare(run, a->first, b->first, "<") == -1; });
      out += '{';
      for (size_t i = 0; i < items.size(); ++i) {
        if (i) out += style.comma;
        line(level + 1);
        const Value& key = items[i]->first;
        std::string name;
        switch (key.kind()) {
          case Kind::text:
            name = key.text();
            break;
          case Kind::none:
            name = "null";
            break;
          case Kind::boolean:
            name = key.boolean() ? "true" : "false";
            break;
          case Kind::integer:
            name = std::to_string(key.integer());
            break;
          case Kind::real:
            name = real(key.real());
            break;
          default:
            fail("keys must be str, int, float, bool or None, not {}", type_name(key));
        }
        write_json_text(name, style.ascii, out);
        out += style.colon;
        write_json(run, items[i]->second, style, level + 1, out);
      }
      if (!items.empty()) line(level);
      out += '}';
      return;
    }
    default:
      break;
  }
  fail("Object of type {} is not JSON serializable", type_name(v));
}

}  // namespace

std::string to_json(Run& run, const Value& value, bool ascii, const std::optional<std::string>& indent,
                    const std::string& comma, const std::string& colon, bool sorted) {
  std::string out;
  write_json(run, value, {ascii, indent, comma, colon, sorted}, 0, out);
  run.step(out.size() / 16);
  return out;
}

Value from_json(const nlohmann::ordered_json& json, int depth) {
  check(depth < max_nesting, "the chat nests more than {} deep", max_nesting);
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::null:
      return Value::none();
    case nlohmann::ordered_json::value_t::boolean:
      return Value(json.get<bool>());
    case nlohmann::ordered_json::value_t::number_integer:
      return Value(json.get<int64_t>());
    case nlohmann::ordered_json::value_t::number_unsigned: {
      const auto value = json.get<uint64_t>();
      check(value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()), "the integer {} does not fit 64 bits",
            value);
      return Value(static_cast<int64_t>(value));
    }
    case nlohmann::ordered_json::value_t::number_float:
      return Value(json.get<double>());
    case nlohmann::ordered_json::value_t::string:
      return Value(unicode::sanitize(json.get_ref<const std::string&>()));
    case nlohmann::ordered_json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const auto& i : json) items.push_back(from_json(i, depth + 1));
      return Value::list(std::move(items));
    }
    case nlohmann::ordered_json::value_t::object: {
      auto dict = std::make_shared<Dict>();
      for (const auto& [key, value] : json.items())
        dict->set(Value(unicode::sanitize(key)), from_json(value, depth + 1));
      return Value(std::shared_ptr<const Dict>(std::move(dict)));
    }
    default:
      fail("the chat holds a value that is no JSON");
  }
}

// --- Comparison
// ------------------------------------------------------------------------------------------------------------
namespace {
int order(double a, double b) {
  return a < b ? -1 : a > b ? 1 : a == b ? 0 : 2;
}
}  // namespace

bool equal(const Value& a, const Value& b) {
  if (running) running->step();
  if (a.is_number() && b.is_number()) {
    if (a.is_integral() && b.is_integral()) return a.integer() == b.integer();
    return a.real() == b.real();
  }
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::undefined:
    case Kind::none:
      return true;
    case Kind::text:
      if (running) running->step(std::min(a.text().size(), b.text().size()) / 64);
      return a.text() == b.text();
    case Kind::list: {
      const List &x = a.list(), &y = b.list();
      if (&x == &y) return true;
      if (x.shape != y.shape || x.shape == Shape::iterator || x.shape == Shape::values ||
          x.items.size() != y.items.size())
        return false;
      if (x.shape == Shape::keys || x.shape == Shape::items) {  // sets
        return std::all_of(x.items.begin(), x.items.end(), [&](const Value& i) {
          return std::any_of(y.items.begin(), y.items.end(), [&](const Value& j) { return equal(i, j); });
        });
      }
      for (size_t i = 0; i < x.items.size(); ++i)
        if (!equal(x.items[i], y.items[i])) return false;
      return true;
    }
    case Kind::dict: {
      const Dict &x = a.dict(), &y = b.dict();
      if (x.items.size() != y.items.size()) return false;
      for (const auto& [key, value] : x.items) {
        const Value* other = y.find(key);
        if (!other || !equal(value, *other)) return false;
      }
      return true;
    }
    case Kind::space:
      return &a.space() == &b.space();
    case Kind::macro:
      return &a.macro() == &b.macro();
    case Kind::function:
      return a.function().name == b.function().name && equal(a.function().self, b.function().self);
    default:
      return a.identity() == b.identity();
  }
}

int compare(Run& run, const Value& a, const Value& b, const char* op) {
  run.step();
  if (a.is_undefined() || b.is_undefined()) fail("{}", (a.is_undefined() ? a : b).missing());
  if (a.is_number() && b.is_number()) {
    if (a.is_integral() && b.is_integral()) return a.integer() < b.integer() ? -1 : a.integer() > b.integer();
    return order(a.real(), b.real());
  }
  if (a.is_text() && b.is_text()) {
    run.step(std::min(a.text().size(), b.text().size()) / 64);
    const int c = a.text().compare(b.text());
    return c < 0 ? -1 : c > 0;
  }
  if (a.is(Kind::list) && b.is(Kind::list) && a.list().shape == b.list().shape &&
      (a.list().shape == Shape::list || a.list().shape == Shape::tuple)) {
    const auto &x = a.list().items, &y = b.list().items;
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i)
      if (!equal(x[i], y[i])) return compare(run, x[i], y[i], op);
    return x.size() < y.size() ? -1 : x.size() > y.size();
  }
  fail("'{}' not supported between instances of '{}' and '{}'", op, type_name(a), type_name(b));
}

bool contains(Run& run, const Value& container, const Value& item) {
  switch (container.kind()) {
    case Kind::undefined:
      return false;
    case Kind::text:
      if (item.is_undefined() || !item.is_text())
        fail("'in <string>' requires string as left operand, not {}", type_name(item));
      run.step(container.text().size() / 64);
      return container.text().find(item.text()) != std::string::npos;
    case Kind::dict:
      check_hashable(item);
      return container.dict().find(item) != nullptr;
    case Kind::list: {
      const List& list = container.list();
      if (list.shape == Shape::iterator) {
        while (list.used < list.items.size())
          if (equal(list.items[list.used++], item)) return true;
        return false;
      }
      return std::any_of(list.items.begin(), list.items.end(), [&](const Value& i) { return equal(i, item); });
    }
    default:
      fail("argument of type '{}' is not iterable", type_name(container));
  }
}

bool iterable(const Value& v) {
  return v.is_undefined() || v.is_text() || v.is(Kind::list) || v.is(Kind::dict) || v.is(Kind::loop);
}

std::vector<Value> iterate(Run& run, const Value& v) {
  std::vector<Value> out;
  switch (v.kind()) {
    case Kind::undefined:
      return out;
    case Kind::text: {
      run.step(v.text().size());
      for (size_t at = 0; at < v.text().size();) {
        const size_t before = at;
        unicode::next_any(v.text(), at);
        out.emplace_back(v.text().substr(before, at - before));
      }
      return out;
    }
    case Kind::list: {
      const List& list = v.list();
      run.step(list.items.size());
      if (list.shape != Shape::iterator) return list.items;
      out.assign(list.items.begin() + static_cast<std::ptrdiff_t>(list.used), list.items.end());
      list.used = list.items.size();
      return out;
    }
    case Kind::dict:
      run.step(v.dict().items.size());
      for (const auto& [key, value] : v.dict().items) out.push_back(key);
      return out;
    default:
      fail("'{}' object is not iterable", type_name(v));
  }
}

int64_t length(Run& run, const Value& v) {
  switch (v.kind()) {
    case Kind::undefined:
      return 0;
    case Kind::text:
      run.step(v.text().size() / 64);
      return static_cast<int64_t>(text_length(v.text()));
    case Kind::list:
      if (v.list().shape != Shape::iterator) return static_cast<int64_t>(v.list().items.size());
      break;
    case Kind::dict:
      return static_cast<int64_t>(v.dict().items.size());
    default:
      break;
  }
  fail("object of type '{}' has no len()", type_name(v));
}

// --- Access
// ----------------------------------------------------------------------------------------------------------------
namespace {

Value no_attribute(Run& run, const Value& object, const Value& key) {
  const std::string what = object.is_none() ? "None" : type_name(object) + " object";
  if (key.is_text()) return Value::undefined(fmt::format("'{}' has no attribute '{}'", what, key.text()));
  return Value::undefined(fmt::format("{} has no element {}", what, to_repr(run, key)));
}

// Python's own attribute of a value: a method, or nothing.
std::optional<Value> own_attribute(const Value& object, const std::string& name) {
  bool unsafe = false;
  const bool dunder = name.size() > 4 && name.starts_with("__") && name.ends_with("__");
  const bool method = has_method(object, name, unsafe);
  if (unsafe || dunder)
    return Value::undefined(fmt::format("access to attribute '{}' of '{}' object is unsafe.", name, type_name(object)),
                            true);
  if (!method) return std::nullopt;
  check(nesting(object) < max_nesting - 1, "values nest more than {} deep", max_nesting);
  return Value(std::make_shared<const Function>(Function{name, object, false}));
}

const Value* subscript(const Value& object, const Value& key) {
  if (object.is(Kind::dict)) {
    check_hashable(key);
    return object.dict().find(key);
  }
  return nullptr;
}

std::optional<Value> indexed(Run& run, const Value& object, const Value& key) {
  if (!key.is_integral()) return std::nullopt;
  int64_t i = key.integer();
  if (object.is(Kind::list) && (object.list().shape == Shape::list || object.list().shape == Shape::tuple ||
                                object.list().shape == Shape::range)) {
    const auto& items = object.list().items;
    const auto size = static_cast<int64_t>(items.size());
    if (i < 0) i += size;
    if (i < 0 || i >= size) return std::nullopt;
    return items[static_cast<size_t>(i)];
  }
  if (object.is_text()) {
    const auto& text = object.text();
    run.step(text.size() / 64);
    const auto size = static_cast<int64_t>(text_length(text));
    if (i < 0) i += size;
    if (i < 0 || i >= size) return std::nullopt;
    size_t at = 0, before = 0;
    if (size == static_cast<int64_t>(text.size())) at = static_cast<size_t>(i), i = 0;
    for (; i >= 0; --i) {
      before = at;
      unicode::next_any(text, at);
    }
    return Value(text.substr(before, at - before), object.markup());
  }
  return std::nullopt;
}

}  // namespace

Value attribute(Run& run, const Value& object, const std::string& name) {
  run.step();
  if (object.is_undefined()) fail("{}", object.missing());
  if (object.is(Kind::space)) {
    if (const Value* found = object.space().attributes.find_text(name)) return *found;
    return no_attribute(run, object, Value(name));
  }
  if (object.is(Kind::loop)) return run.loop_attribute(object.loop(), name);
  if (object.is(Kind::macro) && (name == "name" || name == "arguments" || name == "caller" || name == "catch_kwargs" ||
                                 name == "catch_varargs")) {
    const Statement& s = *object.macro().definition;
    if (name == "name") return Value(object.macro().name);
    if (name == "caller") return Value(s.uses_caller);
    if (name == "catch_kwargs") return Value(s.uses_kwargs);
    if (name == "catch_varargs") return Value(s.uses_varargs);
    std::vector<Value> names;
    for (const auto& p : s.parameters) names.emplace_back(p);
    return Value::list(std::move(names), Shape::tuple);
  }
  if (object.is(Kind::cycler) && name == "current") return object.object<Cycler>().items[object.object<Cycler>().at];
  if (object.is(Kind::list) && object.list().group && (name == "grouper" || name == "list"))
    return object.list().items[name == "list" ? 1 : 0];
  if (auto own = own_attribute(object, name)) return *own;
  if (const Value* found = object.is(Kind::dict) ? object.dict().find_text(name) : nullptr) return *found;
  return no_attribute(run, object, Value(name));
}

Value item(Run& run, const Value& object, const Value& key) {
  run.step();
  if (object.is_undefined()) fail("{}", object.missing());
  if (const Value* found = subscript(object, key)) return *found;
  if (auto found = indexed(run, object, key)) return *found;
  if (key.is_text()) {
    const auto& name = key.text();
    if (object.is(Kind::dict)) {
      if (auto own = own_attribute(object, name)) return *own;
    } else {
      return attribute(run, object, name);
    }
  }
  return no_attribute(run, object, key);
}

Value slice(Run& run, const Value& object, const Value& start, const Value& stop, const Value& step) {
  if (object.is_undefined()) fail("{}", object.missing());
  const auto number = [](const Value& v, int64_t none) {
    if (v.is_none()) return none;
    check(v.is_integral(), "slice indices must be integers or None or have an __index__ method");
    return v.integer();
  };
  const int64_t by = number(step, 1);
  const bool sequence =
      object.is(Kind::list) && (object.list().shape == Shape::list || object.list().shape == Shape::tuple ||
                                object.list().shape == Shape::range);
  if (object.is(Kind::dict)) fail("unhashable type: 'slice'");
  if (!object.is_text() && !sequence) fail("'{}' object is not subscriptable", type_name(object));
  check(by != 0, "slice step cannot be zero");
  const std::string* text = object.is_text() ? &object.text() : nullptr;
  std::vector<char32_t> points;
  bool ascii = false;
  int64_t size = 0;
  if (text) {
    run.step(text->size() / 16);
    ascii = text_length(*text) == text->size();
    if (!ascii) points = unicode::decode(*text);
    size = static_cast<int64_t>(ascii ? text->size() : points.size());
  } else {
    size = static_cast<int64_t>(object.list().items.size());
  }
  const auto clip = [&](const Value& v, int64_t none) {
    if (v.is_none()) return none;
    int64_t i = number(v, 0);
    if (i < 0) i = i < -size ? (by < 0 ? -1 : 0) : i + size;
    if (i >= size) i = by < 0 ? size - 1 : size;
    return i;
  };
  const int64_t from = clip(start, by < 0 ? size - 1 : 0), to = clip(stop, by < 0 ? -1 : size);
  std::vector<size_t> picks;
  std::string out;
  std::vector<Value> items;
  const auto pick = [&](int64_t i) {
    if (!text) {
      items.push_back(object.list().items[static_cast<size_t>(i)]);
    } else if (ascii) {
      out += (*text)[static_cast<size_t>(i)];
    } else {
      unicode::append(out, points[static_cast<size_t>(i)]);
    }
  };
  if (by > 0) {
    for (int64_t i = from; i<to; i = by> to - i ? to : i + by) pick(i);
  } else {
    for (int64_t i = from; i > to; i = by < to - i ? to : i + by) pick(i);
  }
  if (text) return run.text(std::move(out), object.markup());
  return run.list(std::move(items), object.list().shape == Shape::tuple ? Shape::tuple : Shape::list);
}

// --- Arithmetic
// ------------------------------------------------------------------------------------------------------------
namespace {

Value integer_arithmetic(Op op, int64_t a, int64_t b) {
  int64_t out = 0;
  switch (op) {
    case Op::add:
      return Value(checked(__builtin_add_overflow(a, b, &out), out));
    case Op::subtract:
      return Value(checked(__builtin_sub_overflow(a, b, &out), out));
    case Op::multiply:
      return Value(checked(__builtin_mul_overflow(a, b, &out), out));
    case Op::divide:
      check(b != 0, "division by zero");
      return Value(static_cast<double>(a) / static_cast<double>(b));
    case Op::floor_divide: {
      check(b != 0, "integer division or modulo by zero");
      check(!(a == std::numeric_limits<int64_t>::min() && b == -1), "an integer exceeds 64 bits");
      const int64_t q = a / b;
      return Value((a % b != 0 && (a < 0) != (b < 0)) ? q - 1 : q);
    }
    case Op::modulo: {
      check(b != 0, "integer division or modulo by zero");
      if (b == -1) return Value(int64_t{0});
      const int64_t r = a % b;
      return Value(r != 0 && (r < 0) != (b < 0) ? r + b : r);
    }
    default: {
      if (b < 0) {
        check(a != 0, "0.0 cannot be raised to a negative power");
        return Value(std::pow(static_cast<double>(a), static_cast<double>(b)));
      }
      int64_t result = 1, base = a;
      for (int64_t e = b; e > 0; e >>= 1) {
        if (e & 1) result = checked(__builtin_mul_overflow(result, base, &out), out);
        if (e > 1) base = checked(__builtin_mul_overflow(base, base, &out), out);
      }
      return Value(result);
    }
  }
}

Value real_arithmetic(Op op, double a, double b) {
  switch (op) {
    case Op::add:
      return Value(a + b);
    case Op::subtract:
      return Value(a - b);
    case Op::multiply:
      return Value(a * b);
    case Op::divide:
      check(b != 0, "float division by zero");
      return Value(a / b);
    case Op::floor_divide:
    case Op::modulo: {
      check(b != 0, "float modulo or floor division by zero");
      double r = std::fmod(a, b);
      double q = (a - r) / b;
      if (r != 0) {
        if ((b < 0) != (r < 0)) r += b, q -= 1;
      } else {
        r = std::copysign(0.0, b);
      }
      if (op == Op::modulo) return Value(r);
      if (q == 0) return Value(std::copysign(0.0, a / b));
      double f = std::floor(q);
      if (q - f > 0.5) f += 1;
      return Value(f);
    }
    default:
      check(!(a == 0 && b < 0), "0.0 cannot be raised to a negative power");
      check(!(a < 0 && b != std::floor(b)), "complex numbers are not supported");
      {
        const double p = std::pow(a, b);
        check(!(std::isinf(p) && !std::isinf(a) && !std::isinf(b)), "(34, 'Numerical result out of range')");
        return Value(p);
      }
  }
}

Value repeat(Run& run, const Value& what, int64_t times) {
  times = std::max<int64_t>(times, 0);
  if (what.is_text()) {
    const auto& text = what.text();
    check(text.empty() || times <= run.max_bytes() / static_cast<int64_t>(text.size()),
          "the template makes a string of more than {} bytes", run.max_bytes());
    std::string out;
    if (text.empty()) times = 0;
    const auto size = static_cast<size_t>(times) * text.size();
    out.reserve(size);
    // Doubled, not appended piece by piece: 28 bytes of template may ask for millions of pieces.
    if (times > 0) out = text;
    while (out.size() < size) out.append(out, 0, std::min(out.size(), size - out.size()));
    return run.text(std::move(out), what.markup());
  }
  const auto& items = what.list().items;
  if (items.empty()) times = 0;
  // Paid for before it is made.
  for (int64_t i = 0; i < times; ++i) run.step(Run::list_cost * items.size());
  std::vector<Value> out;
  out.reserve(items.size() * static_cast<size_t>(times));
  for (int64_t i = 0; i < times; ++i) out.insert(out.end(), items.begin(), items.end());
  return run.list(std::move(out), what.list().shape);
}

bool plain_sequence(const Value& v) {
  return v.is(Kind::list) && (v.list().shape == Shape::list || v.list().shape == Shape::tuple);
}

}  // namespace

Value arithmetic(Run& run, Op op, const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (a.is_integral() && b.is_integral()) return integer_arithmetic(op, a.integer(), b.integer());
    return real_arithmetic(op, a.real(), b.real());
  }
  if (op == Op::modulo && a.is_text()) return run.text(percent_format(run, a.text(), b, a.markup()), a.markup());
  if (a.is_undefined() || b.is_undefined()) fail("{}", (a.is_undefined() ? a : b).missing());
  if (op == Op::add) {
    if (a.is_text() && b.is_text()) {
      // Adding to Markup escapes the other side.
      const bool markup = a.markup() || b.markup();
      std::string out = markup && !a.markup() ? escape_html(a.text()) : a.text();
      out += markup && !b.markup() ? escape_html(b.text()) : b.text();
      return run.text(std::move(out), markup);
    }
    if (plain_sequence(a) && plain_sequence(b) && a.list().shape == b.list().shape) {
      auto items = a.list().items;
      items.insert(items.end(), b.list().items.begin(), b.list().items.end());
      return run.list(std::move(items), a.list().shape);
    }
    if (a.is_text()) fail("can only concatenate str (not \"{}\") to str", type_name(b));
    if (plain_sequence(a)) fail("can only concatenate {} (not \"{}\") to {}", type_name(a), type_name(b), type_name(a));
  }
  if (op == Op::multiply) {
    if ((a.is_text() || plain_sequence(a)) && b.is_integral()) return repeat(run, a, b.integer());
    if ((b.is_text() || plain_sequence(b)) && a.is_integral()) return repeat(run, b, a.integer());
    if (a.is_text() || plain_sequence(a)) fail("can't multiply sequence by non-int of type '{}'", type_name(b));
  }
  fail("unsupported operand type(s) for {}: '{}' and '{}'", op_text(op), type_name(a), type_name(b));
}

}  // namespace moiety::jinja
