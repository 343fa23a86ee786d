// Python's two ways to format: "..." % values and "...".format(...).
#include <cmath>

#include "moiety/io/jinja.h"
#include "moiety/io/unicode.h"

namespace moiety::jinja {
namespace {

constexpr int64_t max_width = 1 << 20;

struct Spec {
  char32_t fill = ' ';
  char align = 0;  ///< < > ^ =
  char sign = '-';
  bool alternate = false, zero = false;
  char group = 0;
  int64_t width = 0;
  int64_t precision = -1;
  char type = 0;
};

std::string pad(std::string text, const Spec& spec, char default_align) {
  const auto length = static_cast<int64_t>(text_length(text));
  if (length >= spec.width) return text;
  const int64_t total = spec.width - length;
  const char align = spec.align ? spec.align : default_align;
  int64_t left = align == '>' ? total : align == '^' ? total / 2 : 0;
  int64_t right = total - left;
  size_t head = 0;
  if (align == '=') {
    left = total, right = 0;
    if (!text.empty() && (text[0] == '-' || text[0] == '+' || text[0] == ' ')) head = 1;
    if (text.size() > head + 1 && text[head] == '0' &&
        std::string_view("xXobOB").find(text[head + 1]) != std::string_view::npos)
      head += 2;
  }
  std::string out = text.substr(0, head);
  for (int64_t i = 0; i < left; ++i) unicode::append(out, spec.fill);
  out += text.substr(head);
  for (int64_t i = 0; i < right; ++i) unicode::append(out, spec.fill);
  return out;
}

std::string grouped(const std::string& digits, char group, size_t every) {
  if (!group) return digits;
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i && (digits.size() - i) % every == 0) out += group;
    out += digits[i];
  }
  return out;
}

std::string sign_of(bool negative, char sign) {
  return negative ? "-" : sign == '+' ? "+" : sign == ' ' ? " " : "";
}

std::string integer_digits(uint64_t magnitude, char type) {
  switch (type) {
    case 'x':
      return fmt::format("{:x}", magnitude);
    case 'X':
      return fmt::format("{:X}", magnitude);
    case 'o':
      return fmt::format("{:o}", magnitude);
    case 'b':
      return fmt::format("{:b}", magnitude);
    default:
      return std::to_string(magnitude);
  }
}

std::string integer_text(int64_t value, const Spec& spec) {
  const uint64_t magnitude = value < 0 ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  std::string prefix = sign_of(value < 0, spec.sign);
  if (spec.alternate && std::string_view("xXob").find(spec.type) != std::string_view::npos && spec.type)
    prefix += std::string("0") + spec.type;
  return prefix + grouped(integer_digits(magnitude, spec.type), spec.group,
                          std::string_view("xXob").find(spec.type) != std::string_view::npos && spec.type ? 4 : 3);
}

std::string real_digits(double value, char type, int64_t precision, bool alternate) {
  if (std::isnan(value)) return type >= 'A' && type <= 'Z' ? "NAN" : "nan";
  if (std::isinf(value)) return type >= 'A' && type <= 'Z' ? "INF" : "inf";
  check(precision <= 1000, "the precision {} is larger than 1000", precision);
  char format[] = "%.*f";
  char alternate_format[] = "%#.*f";
  format[3] = alternate_format[4] = type;
  std::string out(2000, '\0');
  const int size =
      std::snprintf(out.data(), out.size(), alternate ? alternate_format : format, static_cast<int>(precision), value);
  out.resize(static_cast<size_t>(size));
  return out;
}

std::string real_text_spec(double value, Spec spec) {
  const bool percent = spec.type == '%';
  if (percent) value *= 100;
  const bool negative = std::signbit(value) && !std::isnan(value);
  std::string digits;
  if (spec.type == 0 && spec.precision < 0) {
    digits = real_text(std::fabs(value));
  } else if (spec.type == 0) {
    // Like 'g' but with at least one digit behind the point.
    digits = real_digits(std::fabs(value), 'g', spec.precision == 0 ? 1 : spec.precision, false);
    const double magnitude = std::fabs(value);
    if (digits.find_first_of(".en") == std::string::npos) {
      // repr switches to an exponent one digit earlier than 'g' does.
      digits = static_cast<int64_t>(digits.size()) >= std::max<int64_t>(spec.precision, 1) &&
                       magnitude >= std::pow(10.0, static_cast<double>(spec.precision) - 1) && spec.precision > 0
                   ? real_digits(magnitude, 'e', spec.precision - 1, false)
                   : digits + ".0";
      if (const size_t e = digits.find('e'); e != std::string::npos && digits.find('.') != std::string::npos) {
        size_t last = e;
        while (digits[last - 1] == '0') --last;
        if (digits[last - 1] == '.') --last;
        digits.erase(last, e - last);
      }
    }
  } else {
    const char type = percent ? 'f' : spec.type == 'n' ? 'g' : spec.type;
    int64_t precision = spec.precision < 0 ? 6 : spec.precision;
    if ((type == 'g' || type == 'G') && precision == 0) precision = 1;
    digits = real_digits(std::fabs(value), type, precision, spec.alternate);
  }
  if (spec.group) {
    const size_t end = std::min(digits.find_first_of(".eE"), digits.size());
    if (std::isfinite(value)) digits = grouped(digits.substr(0, end), spec.group, 3) + digits.substr(end);
  }
  return sign_of(negative, spec.sign) + digits + (percent ? "%" : "");
}

std::string with_spec(Run& run, const Value& value, const std::string& text) {
  if (text.empty()) return to_text(run, value);
  Spec spec;
  const auto points = unicode::decode(text);
  size_t at = 0;
  const auto is_align = [](char32_t c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  if (points.size() > 1 && is_align(points[1])) {
    spec.fill = points[0];
    spec.align = static_cast<char>(points[1]);
    at = 2;
  } else if (is_align(points[0])) {
    spec.align = static_cast<char>(points[0]);
    at = 1;
  }
  const auto is = [&](char c) { return at < points.size() && points[at] == static_cast<char32_t>(c); };
  if (is('+') || is('-') || is(' ')) spec.sign = static_cast<char>(points[at++]);
  if (is('#')) spec.alternate = true, ++at;
  if (is('0')) {
    spec.zero = true;
    ++at;
    if (!spec.align) spec.align = '=', spec.fill = '0';
  }
  const auto number = [&] {
    int64_t n = 0;
    while (at < points.size() && points[at] >= '0' && points[at] <= '9') {
      n = n * 10 + static_cast<int64_t>(points[at++] - '0');
      check(n <= max_width, "the format '{}' has a width above {}", text, max_width);
    }
    return n;
  };
  spec.width = number();
  if (is(',') || is('_')) spec.group = static_cast<char>(points[at++]);
  if (is('.')) {
    ++at;
    check(at < points.size() && points[at] >= '0' && points[at] <= '9', "Format specifier missing precision");
    spec.precision = number();
  }
  if (at < points.size()) spec.type = static_cast<char>(points[at++]);
  check(at == points.size(), "Invalid format specifier '{}'", text);
  run.step(static_cast<size_t>(spec.width) / 16);

  if (value.is_text()) {
    check(spec.type == 0 || spec.type == 's', "Unknown format code '{}' for object of type 'str'", spec.type);
    check(spec.align != '=' || spec.zero, "'=' alignment not allowed in string format specifier");
    std::string s = value.text();
    if (spec.precision >= 0 && static_cast<int64_t>(text_length(s)) > spec.precision)
      s = slice(run, Value(s), Value::none(), Value(spec.precision), Value::none()).text();
    if (spec.align == '=') spec.align = '<';
    return pad(std::move(s), spec, '<');
  }
  if (value.is_number()) {
    if (value.is(Kind::boolean) && spec.type == 0) return pad(integer_text(value.integer(), spec), spec, '>');
    const bool real_type = spec.type != 0 && std::string_view("eEfFgG%").find(spec.type) != std::string_view::npos;
    if (value.is_integral() && !real_type) {
      check(spec.precision < 0, "Precision not allowed in integer format specifier");
      if (spec.type == 'c') {
        std::string out;
        check(value.integer() >= 0 && value.integer() < 0x110000, "%c arg not in range(0x110000)");
        unicode::append(out, static_cast<char32_t>(value.integer()));
        return pad(unicode::sanitize(out), spec, '<');
      }
      check(spec.type == 0 || std::string_view("dnxXob").find(spec.type) != std::string_view::npos,
            "Unknown format code '{}' for object of type 'int'", spec.type);
      return pad(integer_text(value.integer(), spec), spec, '>');
    }
    check(real_type || spec.type == 0 || spec.type == 'n', "Unknown format code '{}' for object of type 'float'",
          spec.type);
    return pad(real_text_spec(value.real(), spec), spec, '>');
  }
  fail("unsupported format string passed to {}.__format__", type_name(value));
}

}  // namespace

std::string percent_format(Run& run, const std::string& format, const Value& values, bool markup) {
  const bool is_tuple = values.is(Kind::list) && values.list().shape == Shape::tuple;
  size_t used = 0;
  bool mapped = false;
  const auto next = [&]() -> Value {
    if (is_tuple) {
      check(used < values.list().items.size(), "not enough arguments for format string");
      return values.list().items[used++];
    }
    check(used == 0, "not enough arguments for format string");
    ++used;
    return values;
  };
  std::string out;
  for (size_t at = 0; at < format.size();) {
    check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the template makes a string of more than {} bytes",
          run.max_bytes());
    if (format[at] != '%') {
      out += format[at++];
      continue;
    }
    ++at;
    check(at < format.size(), "incomplete format");
    if (format[at] == '%') {
      out += '%';
      ++at;
      continue;
    }
    std::optional<Value> value;
    if (format[at] == '(') {
      const size_t begin = ++at;
      for (int depth = 1; at < format.size(); ++at) {
        if (format[at] == '(') ++depth;
        if (format[at] == ')' && --depth == 0) break;
      }
      check(at < format.size(), "incomplete format key");
      check(values.is(Kind::dict), "format requires a mapping");
      const std::string key = format.substr(begin, at++ - begin);
      const Value* found = values.dict().find_text(key);
      check(found != nullptr, "the format names the key '{}', which the values lack", key);
      value = *found;
      mapped = true;
    }
    Spec spec;
    bool left = false;
    for (; at < format.size(); ++at) {
      const char c = format[at];
      if (c == '-') {
        left = true;
      } else if (c == '+') {
        spec.sign = '+';
      } else if (c == ' ') {
        if (spec.sign != '+') spec.sign = ' ';
      } else if (c == '#') {
        spec.alternate = true;
      } else if (c == '0') {
        spec.zero = true;
      } else {
        break;
      }
    }
    const auto number = [&] {
      int64_t n = 0;
      if (at < format.size() && format[at] == '*') {
        ++at;
        const Value star = next();
        check(star.is_integral(), "* wants int");
        n = star.integer();
        check(std::abs(n) <= max_width, "a format has a width above {}", max_width);
        return n;
      }
      for (; at < format.size() && format[at] >= '0' && format[at] <= '9'; ++at) {
        n = n * 10 + (format[at] - '0');
        check(n <= max_width, "a format has a width above {}", max_width);
      }
      return n;
    };
    spec.width = number();
    if (spec.width < 0) left = true, spec.width = -spec.width;
    if (at < format.size() && format[at] == '.') {
      ++at;
      spec.precision = std::max<int64_t>(number(), 0);
    }
    while (at < format.size() && (format[at] == 'l' || format[at] == 'h' || format[at] == 'L')) ++at;
    check(at < format.size(), "incomplete format");
    const char type = format[at++];
    if (!value) value = next();
    run.step(static_cast<size_t>(spec.width) / 16 + 1);
    std::string piece;
    bool numeric = true;
    switch (type) {
      case 's':
      case 'r':
      case 'a':
        piece = type == 's' ? to_text(run, *value) : to_repr(run, *value);
        if (markup && !value->markup()) piece = escape_html(piece);
        if (spec.precision >= 0 && static_cast<int64_t>(text_length(piece)) > spec.precision)
          piece = slice(run, Value(piece), Value::none(), Value(spec.precision), Value::none()).text();
        numeric = false;
        break;
      case 'c':
        if (value->is_text()) {
          check(text_length(value->text()) == 1, "%c requires int or char");
          piece = value->text();
        } else {
          check(value->is_integral() && value->integer() >= 0 && value->integer() < 0x110000,
                "%c requires int or char");
          unicode::append(piece, static_cast<char32_t>(value->integer()));
          piece = unicode::sanitize(piece);
        }
        numeric = false;
        break;
      case 'd':
      case 'i':
      case 'u':
      case 'x':
      case 'X':
      case 'o': {
        const bool decimal = type == 'd' || type == 'i' || type == 'u';
        if (value->is_undefined()) fail("{}", value->missing());
        check(value->is_integral() || (decimal && value->is(Kind::real)), "%{} format: {} is required, not {}", type,
              decimal ? "a real number" : "an integer", type_name(*value));
        check(value->is_integral() || std::fabs(value->real()) < 9.2e18, "an integer exceeds 64 bits");
        const int64_t n = value->is_integral() ? value->integer() : static_cast<int64_t>(value->real());
        const uint64_t magnitude = n < 0 ? 0 - static_cast<uint64_t>(n) : static_cast<uint64_t>(n);
        std::string digits = integer_digits(magnitude, decimal ? 'd' : type);
        while (static_cast<int64_t>(digits.size()) < spec.precision) digits.insert(digits.begin(), '0');
        piece = sign_of(n < 0, spec.sign) + (spec.alternate && !decimal ? std::string("0") + type : "") + digits;
        break;
      }
      case 'e':
      case 'E':
      case 'f':
      case 'F':
      case 'g':
      case 'G': {
        if (value->is_undefined()) fail("{}", value->missing());
        check(value->is_number(), "must be real number, not {}", type_name(*value));
        spec.type = type;
        Spec plain = spec;
        plain.width = 0;
        piece = real_text_spec(value->real(), plain);
        break;
      }
      default:
        fail("unsupported format character '{}' (0x{:x}) at index {}", type, static_cast<unsigned char>(type), at - 1);
    }
    if (left) {
      spec.align = '<';
    } else if (spec.zero && numeric) {
      spec.align = '=', spec.fill = '0';
    } else {
      spec.align = '>';
    }
    out += pad(std::move(piece), spec, '>');
  }
  // As in Python, whatever can be subscripted, but tuples and strings, may be left unused.
  const bool subscripted =
      values.is_undefined() || values.is(Kind::dict) ||
      (values.is(Kind::list) && (values.list().shape == Shape::list || values.list().shape == Shape::range));
  check(mapped || subscripted || used >= (is_tuple ? values.list().items.size() : 1),
        "not all arguments converted during string formatting");
  return out;
}

namespace {

std::string brace(Run& run, std::string_view format, const Arguments& arguments, int64_t& automatic, int depth) {
  check(depth < 2, "Max string recursion exceeded");
  std::string out;
  for (size_t at = 0; at < format.size();) {
    const char c = format[at];
    check(static_cast<int64_t>(out.size()) <= run.max_bytes(), "the template makes a string of more than {} bytes",
          run.max_bytes());
    if (c == '{' && at + 1 < format.size() && format[at + 1] == '{') {
      out += '{';
      at += 2;
      continue;
    }
    if (c == '}') {
      check(at + 1 < format.size() && format[at + 1] == '}', "Single '}}' encountered in format string");
      out += '}';
      at += 2;
      continue;
    }
    if (c != '{') {
      out += c;
      ++at;
      continue;
    }
    size_t end = ++at;
    for (int open = 1; end < format.size(); ++end) {
      if (format[end] == '{') ++open;
      if (format[end] == '}' && --open == 0) break;
    }
    check(at < format.size(), "Single '{{' encountered in format string");
    check(end < format.size(), "expected '}}' before end of string");
    std::string_view field = format.substr(at, end - at);
    at = end + 1;
    // The name ends at the first '!' or ':' outside of brackets.
    size_t cut = 0;
    for (bool bracket = false; cut < field.size(); ++cut) {
      if (field[cut] == '[') bracket = true;
      if (field[cut] == ']') bracket = false;
      if (!bracket && (field[cut] == '!' || field[cut] == ':')) break;
    }
    std::string_view name = field.substr(0, cut), rest = field.substr(cut);
    char conversion = 0;
    if (rest.starts_with("!")) {
      check(rest.size() >= 2 && (rest.size() == 2 || rest[2] == ':'), "expected ':' after conversion specifier");
      conversion = rest[1];
      rest = rest.substr(2);
    }
    std::string spec(rest.empty() ? rest : rest.substr(1));
    const size_t first_end = std::min(name.find_first_of(".["), name.size());
    const std::string first(name.substr(0, first_end));
    std::string_view path = name.substr(first_end);
    Value value;
    if (first.find_first_not_of("0123456789") == std::string::npos) {
      check(first.size() < 10, "Too many decimal digits in format string");
      size_t index = 0;
      if (first.empty()) {
        check(automatic >= 0, "cannot switch from manual field specification to automatic field numbering");
        index = static_cast<size_t>(automatic++);
      } else {
        check(automatic <= 0, "cannot switch from automatic field numbering to manual field specification");
        automatic = -1;
        index = std::stoul(first);
      }
      check(index < arguments.positional.size(), "Replacement index {} out of range for positional args tuple", index);
      value = arguments.positional[index];
    } else {
      const Value* found = nullptr;
      for (const auto& [key, v] : arguments.keyword)
        if (key == first) found = &v;
      check(found != nullptr, "the format names '{}', which is not given", first);
      value = *found;
    }
    while (!path.empty()) {
      if (path[0] == '.') {
        const size_t stop = std::min(path.find_first_of(".[", 1), path.size());
        check(stop > 1, "Empty attribute in format string");
        value = attribute(run, value, std::string(path.substr(1, stop - 1)));
        path = path.substr(stop);
      } else {
        check(path[0] == '[', "Only '.' or '[' may follow ']' in format field specifier");
        const size_t stop = path.find(']');
        check(stop != std::string_view::npos && stop > 1, "Missing ']' in format string");
        const std::string key(path.substr(1, stop - 1));
        const bool digits = key.find_first_not_of("0123456789") == std::string::npos && key.size() < 18;
        value = item(run, value, digits ? Value(static_cast<int64_t>(std::stoll(key))) : Value(key));
        path = path.substr(stop + 1);
      }
    }
    if (conversion == 'r' || conversion == 'a') value = Value(to_repr(run, value));
    if (conversion == 's') value = Value(to_text(run, value));
    check(conversion == 0 || conversion == 'r' || conversion == 's' || conversion == 'a',
          "Unknown conversion specifier {}", conversion);
    if (spec.find('{') != std::string::npos) spec = brace(run, spec, arguments, automatic, depth + 1);
    out += with_spec(run, value, spec);
  }
  return out;
}

}  // namespace

std::string brace_format(Run& run, const std::string& format, const Arguments& arguments) {
  int64_t automatic = 0;
  return brace(run, format, arguments, automatic, 0);
}

}  // namespace moiety::jinja
