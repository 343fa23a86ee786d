#include "moiety/io/gguf.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <limits>
#include <regex>
#include <unordered_set>

#include "moiety/base/atomic_file.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/unicode.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxKey = 65535, kMaxName = 63, kMaxDims = 4;

enum Type : int32_t { U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64, TypeCount };
constexpr size_t kTypeBytes[TypeCount] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};  // least size in the file
constexpr const char* kTypeNames[TypeCount] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                               "bool",  "string", "array",  "uint64", "int64",  "float64"};

/// Names of the tensor types that are known but not supported, for the refusal.
std::string tensor_type_name(int32_t id) {
  switch (id) {
    case 9:
      return "Q8_1, which is for activations and never stored";
    case 15:
      return "Q8_K, which is for activations and never stored";
    case 10:
      return "Q2_K";
    case 11:
      return "Q3_K";
    case 16:
      return "IQ2_XXS";
    case 17:
      return "IQ2_XS";
    case 18:
      return "IQ3_XXS";
    case 19:
      return "IQ1_S";
    case 20:
      return "IQ4_NL";
    case 21:
      return "IQ3_S";
    case 22:
      return "IQ2_S";
    case 23:
      return "IQ4_XS";
    case 24:
      return "I8";
    case 25:
      return "I16";
    case 26:
      return "I32";
    case 27:
      return "I64";
    case 28:
      return "F64";
    case 29:
      return "IQ1_M";
    case 40:
      return "NVFP4";
    case 4:
    case 5:
    case 31:
    case 32:
    case 33:
    case 36:
    case 37:
    case 38:
      return "a type that was removed from the format";
    default:
      return "an unknown type";
  }
}

const FormatInfo* format_by_gguf_id(int32_t id) {
  if (id >= 0)
    for (const FormatInfo& each : formats())
      if (each.gguf_id == id) return &each;
  return nullptr;
}

std::string supported_formats() {
  std::vector<std::string> names;
  for (const FormatInfo& each : formats())
    if (each.gguf_id >= 0) names.emplace_back(each.name);
  return list_of(names, "and");
}

bool valid_alignment(uint64_t value) {
  return std::has_single_bit(value) && value <= (uint64_t{1} << 31);
}

/// Reads forward over the bytes; every read is checked against what is left.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  size_t at() const { return at_; }
  size_t left() const { return bytes_.size() - at_; }

  const std::byte* take(size_t n, const char* what) {
    check(n <= left(), "{}: the file ends inside {} at byte {}: {} bytes are needed, {} are left", where_, what, at_, n,
          left());
    const std::byte* p = bytes_.data() + at_;
    at_ += n;
    return p;
  }
  template <class T>
  T number(const char* what) {
    T value;
    std::memcpy(&value, take(sizeof value, what), sizeof value);
    return value;
  }
  std::string_view string(const char* what) {
    const auto length = number<uint64_t>(what);
    check(length <= left(), "{}: {} at byte {} is said to have {} bytes, but only {} are left", where_, what, at_ - 8,
          length, left());
    const std::byte* p = take(static_cast<size_t>(length), what);
    return {reinterpret_cast<const char*>(p), static_cast<size_t>(length)};
  }

 private:
  std::span<const std::byte> bytes_;
  const std::string& where_;
  size_t at_ = 0;
};

template <class Stored, class Kept>
std::vector<Kept> read_numbers(Cursor& in, size_t count) {
  std::vector<Kept> values(count);
  const std::byte* p = in.take(count * sizeof(Stored), "an array");
  for (size_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, p + i * sizeof value, sizeof value);
    values[i] = static_cast<Kept>(value);
  }
  return values;
}

}  // namespace

struct GgufParser {
  GgufFile& file;
  std::span<const std::byte> bytes;
  const std::string& where;
  Cursor in;

  GgufParser(GgufFile& file, std::span<const std::byte> bytes, const std::string& where)
      : file(file), bytes(bytes), where(where), in(bytes, where) {}

  bool read_bool(std::string_view key) {
    const auto value = in.number<uint8_t>("a bool");
    check(value <= 1, "{}: key {} has the byte {} at {} as a bool; it must be 0 or 1", where, shown(key), value,
          in.at() - 1);
    return value == 1;
  }

  GgufArray array(std::string_view key, int32_t type) {
    const size_t begin = in.at();
    const auto count64 = in.number<uint64_t>("an array's count");
    check(type >= 0 && type < TypeCount && type != Array, "{}: key {} is an array of {}", where, shown(key),
          type == Array ? "arrays, which the format does not use" : fmt::format("the unknown type {}", type));
    check(count64 <= in.left() / kTypeBytes[type],
          "{}: key {} at byte {} is said to be an array of {} elements, but {} bytes are left", where, shown(key),
          begin, count64, in.left());
    const auto count = static_cast<size_t>(count64);
    switch (type) {
      case U8:
        return read_numbers<uint8_t, uint8_t>(in, count);
      case I8:
        return read_numbers<int8_t, int64_t>(in, count);
      case U16:
        return read_numbers<uint16_t, uint64_t>(in, count);
      case I16:
        return read_numbers<int16_t, int64_t>(in, count);
      case U32:
        return read_numbers<uint32_t, uint64_t>(in, count);
      case I32:
        return read_numbers<int32_t, int64_t>(in, count);
      case F32:
        return read_numbers<float, double>(in, count);
      case U64:
        return read_numbers<uint64_t, uint64_t>(in, count);
      case I64:
        return read_numbers<int64_t, int64_t>(in, count);
      case F64:
        return read_numbers<double, double>(in, count);
      case Bool: {
        std::vector<uint8_t> values(count);
        for (uint8_t& value : values) value = read_bool(key);
        return values;
      }
      default: {
        std::vector<std::string_view> values(count);
        for (std::string_view& value : values) value = in.string("a string of an array");
        return values;
      }
    }
  }

  GgufValue value(std::string_view key) {
    GgufValue v;
    const size_t at = in.at();
    v.type = in.number<int32_t>("a value type");
    switch (v.type) {
      case U8:
        v.value = uint64_t{in.number<uint8_t>("a value")};
        break;
      case I8:
        v.value = int64_t{in.number<int8_t>("a value")};
        break;
      case U16:
        v.value = uint64_t{in.number<uint16_t>("a value")};
        break;
      case I16:
        v.value = int64_t{in.number<int16_t>("a value")};
        break;
      case U32:
        v.value = uint64_t{in.number<uint32_t>("a value")};
        break;
      case I32:
        v.value = int64_t{in.number<int32_t>("a value")};
        break;
      case F32:
        v.value = static_cast<double>(in.number<float>("a value"));
        break;
      case Bool:
        v.value = read_bool(key);
        break;
      case String:
        v.value = std::string(in.string("a string"));
        break;
      case Array:
        v.element_type = in.number<int32_t>("an array's element type");
        v.value = array(key, v.element_type);
        break;
      case U64:
        v.value = in.number<uint64_t>("a value");
        break;
      case I64:
        v.value = in.number<int64_t>("a value");
        break;
      case F64:
        v.value = in.number<double>("a value");
        break;
      default:
        fail("{}: key {} has the unknown value type {} at byte {} (0 to {} are known)", where, shown(key), v.type, at,
             TypeCount - 1);
    }
    return v;
  }

  /// Reads everything but the tensors' data.
  void run() {
    check(in.left() >= 4 && std::memcmp(bytes.data(), "GGUF", 4) == 0,
          "{}: this is not a GGUF file: it does not start with GGUF", where);
    in.take(4, "the magic");
    file.version_ = in.number<uint32_t>("the version");
    check(file.version_ == 2 || file.version_ == 3, "{}: GGUF version {} is not supported (2 and 3 are){}", where,
          file.version_, (file.version_ & 0xffff) == 0 ? "; the file may be big-endian" : "");
    const auto tensor_count = in.number<int64_t>("the tensor count");
    const auto key_count = in.number<int64_t>("the key count");
    // A key takes 13 bytes at least, a tensor 32.
    check(key_count >= 0 && static_cast<uint64_t>(key_count) <= in.left() / 13,
          "{}: the file is said to have {} keys at byte 16, but has room for {} at most", where, key_count,
          in.left() / 13);
    check(tensor_count >= 0 && static_cast<uint64_t>(tensor_count) <= in.left() / 32,
          "{}: the file is said to have {} tensors at byte 8, but has room for {} at most", where, tensor_count,
          in.left() / 32);
    keys(static_cast<size_t>(key_count));
    tensors(static_cast<size_t>(tensor_count));
  }

  void keys(size_t count) {
    file.metadata_.reserve(count);
    file.keys_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const size_t at = in.at();
      const std::string_view key = in.string("a key");
      check(key.size() <= kMaxKey, "{}: the key at byte {} has {} bytes; {} are allowed", where, at, key.size(),
            kMaxKey);
      check(unicode::valid(key), "{}: the key {} at byte {} is not valid UTF-8", where, shown(key), at);
      check(file.keys_.emplace(std::string(key), i).second, "{}: the key {} at byte {} occurs twice", where, shown(key),
            at);
      file.metadata_.emplace_back(std::string(key), value(key));
    }
  }

  uint64_t alignment() const {
    const GgufValue* v = file.find("general.alignment");
    if (v == nullptr) return 32;
    check(v->type == U32, "{}: general.alignment has the type {}; it must be uint32", where, kTypeNames[v->type]);
    const uint64_t value = std::get<uint64_t>(v->value);
    check(valid_alignment(value), "{}: general.alignment is {}; it must be a power of two", where, value);
    return value;
  }

  void tensors(size_t count) {
    const uint64_t align = alignment();
    file.tensors_.reserve(count);
    file.data_.reserve(count);
    file.index_.reserve(count);
    std::vector<uint64_t> offsets(count), sizes(count);
    for (size_t i = 0; i < count; ++i) {
      const size_t at = in.at();
      const std::string_view name = in.string("a tensor name");
      check(name.size() <= kMaxName, "{}: the tensor name at byte {} has {} bytes; {} are allowed", where, at,
            name.size(), kMaxName);
      check(unicode::valid(name), "{}: the tensor name {} at byte {} is not valid UTF-8", where, shown(name), at);
      TensorInfo& t = file.tensors_.emplace_back();
      t.name = name;
      check(file.index_.emplace(t.name, i).second, "{}: the tensor {} at byte {} occurs twice", where, shown(name), at);
      const auto dims = in.number<uint32_t>("a tensor's dimension count");
      check(dims >= 1 && dims <= kMaxDims, "{}: tensor {} has {} dimensions; 1 to {} are possible", where, shown(name),
            dims, kMaxDims);
      t.shape.resize(dims);
      for (uint32_t d = 0; d < dims; ++d) {
        const auto size = in.number<int64_t>("a tensor's size");
        check(size > 0, "{}: tensor {} has the size {} in dimension {}; it must be positive", where, shown(name), size,
              d);
        t.shape[dims - 1 - d] = size;
      }
      const auto type = in.number<int32_t>("a tensor's type");
      const FormatInfo* format = format_by_gguf_id(type);
      check(format != nullptr, "{}: tensor {} has the type {} ({}); supported are {}", where, shown(name), type,
            tensor_type_name(type), supported_formats());
      t.format = format->format;
      check(t.cols() % format->block == 0,
            "{}: tensor {} has rows of {} elements, not a multiple of the {}-element blocks of {}", where, shown(name),
            t.cols(), format->block, format->name);
      offsets[i] = in.number<uint64_t>("a tensor's offset");
      check(offsets[i] % align == 0, "{}: tensor {} has the offset {}, which is not a multiple of the alignment {}",
            where, shown(name), offsets[i], align);
      // cols / block * bytes <= 8 * cols: the product of all sizes times 8 bounds every product below.
      int64_t product = 8;
      bool fits = true;
      for (int64_t size : t.shape) fits = fits && !__builtin_mul_overflow(product, size, &product);
      check(fits, "{}: tensor {} has the shape [{}], whose size overflows 64 bits", where, shown(name),
            fmt::join(t.shape, ", "));
      sizes[i] = static_cast<uint64_t>(t.bytes());
    }
    file.data_.resize(count);
    if (count == 0) return;
    uint64_t start = 0;
    check(!__builtin_add_overflow(static_cast<uint64_t>(in.at()), align - 1, &start),
          "{}: the alignment {} is too large", where, align);
    start = start / align * align;
    for (size_t i = 0; i < count; ++i) {
      uint64_t begin = 0, end = 0;
      check(!__builtin_add_overflow(start, offsets[i], &begin) && !__builtin_add_overflow(begin, sizes[i], &end) &&
                end <= bytes.size(),
            "{}: tensor {} ({} bytes at offset {} of the data, which starts at byte {}) reaches past the end of the "
            "file ({} bytes)",
            where, shown(file.tensors_[i].name), sizes[i], offsets[i], start, bytes.size());
      file.data_[i] = bytes.subspan(static_cast<size_t>(begin), static_cast<size_t>(sizes[i]));
    }
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return offsets[a] < offsets[b]; });
    for (size_t i = 1; i < count; ++i)
      check(offsets[order[i - 1]] + sizes[order[i - 1]] <= offsets[order[i]], "{}: the tensors {} and {} overlap",
            where, shown(file.tensors_[order[i - 1]].name), shown(file.tensors_[order[i]].name));
  }

  /// Joins the parts of a split model, which were read from files whose names differ in the part's number only.
  static std::shared_ptr<const GgufFile> join(const fs::path& path, std::shared_ptr<GgufFile> given) {
    const std::string where = path.string();
    const auto parts = given->integer("split.count").value_or(1);
    if (parts <= 1) return given;
    static const std::regex pattern(R"((.*)-(\d{5})-of-(\d{5})\.gguf)");
    std::smatch match;
    const std::string name = path.filename().string();
    check(std::regex_match(name, match, pattern),
          "{}: split.count is {}: a part of a split model must be named like NAME-00001-of-{:05}.gguf", where, parts,
          parts);
    check(std::stoll(match[3]) == parts, "{}: split.count is {}, but the file's name says {}", where, parts,
          match[3].str());
    const auto given_number = std::stoll(match[2]);
    std::shared_ptr<GgufFile> whole(new GgufFile);
    whole->where_ = where;
    std::optional<int64_t> total;
    for (int64_t i = 0; i < parts; ++i) {
      std::shared_ptr<GgufFile> part = given;
      if (i + 1 != given_number) {
        const fs::path other = path.parent_path() / fmt::format("{}-{:05}-of-{:05}.gguf", match[1].str(), i + 1, parts);
        check(fs::exists(other), "{}: part {} of {} is missing: {}", where, i + 1, parts, other.string());
        part = open_one(other);
      }
      const std::string& at = part->where_;
      check(part->integer("split.count") == parts, "{}: split.count differs from the {} of {}", at, parts, where);
      check(part->integer("split.no") == i, "{}: split.no is {}, but the file's name says {}", at,
            part->integer("split.no").value_or(-1), i);
      if (const auto count = part->integer("split.tensors.count")) {
        check(!total || total == count, "{}: split.tensors.count is {}, but {} in another part", at, *count,
              total.value_or(0));
        total = count;
      }
      if (i == 0) {
        whole->version_ = part->version_;
        for (const auto& [key, value] : part->metadata_)
          if (!key.starts_with("split.")) {
            whole->keys_.emplace(key, whole->metadata_.size());
            whole->metadata_.emplace_back(key, value);
          }
      }
      for (size_t k = 0; k < part->tensors_.size(); ++k) {
        const TensorInfo& t = part->tensors_[k];
        check(whole->index_.emplace(t.name, whole->tensors_.size()).second, "{}: tensor {} is in another part too", at,
              shown(t.name));
        whole->tensors_.push_back(t);
        whole->data_.push_back(part->data_[k]);
        whole->owner_of_.push_back(whole->owners_.size());
      }
      whole->owners_.push_back(part->owners_.front());
    }
    check(!total || *total == static_cast<int64_t>(whole->tensors_.size()),
          "{}: the parts hold {} tensors, but split.tensors.count is {}", where, whole->tensors_.size(), *total);
    return whole;
  }

  static std::shared_ptr<GgufFile> parse_one(std::span<const std::byte> bytes, std::string where,
                                             std::shared_ptr<const void> owner) {
    std::shared_ptr<GgufFile> file(new GgufFile);
    file->where_ = std::move(where);
    file->owners_.push_back(std::move(owner));
    GgufParser(*file, bytes, file->where_).run();
    file->owner_of_.assign(file->tensors_.size(), 0);
    return file;
  }

  static std::shared_ptr<GgufFile> open_one(const fs::path& path) {
    auto mapped = MappedFile::open(path);
    return parse_one(mapped->bytes(), path.string(), mapped);
  }
};

std::shared_ptr<const GgufFile> GgufFile::open(const fs::path& path) {
  return GgufParser::join(path, GgufParser::open_one(path));
}

std::shared_ptr<const GgufFile> GgufFile::parse(std::span<const std::byte> bytes, std::string where,
                                                std::shared_ptr<const void> owner) {
  return GgufParser::parse_one(bytes, std::move(where), std::move(owner));
}

TensorView GgufFile::get(const std::string& name) const {
  const auto found = index_.find(name);
  check(found != index_.end(), "{}: there is no tensor {}", where_, shown(name));
  TensorView view;
  static_cast<TensorInfo&>(view) = tensors_[found->second];
  view.data = data_[found->second];
  view.owner = owners_[owner_of_[found->second]];
  return view;
}

const GgufValue* GgufFile::find(std::string_view key) const {
  const auto found = keys_.find(std::string(key));
  return found == keys_.end() ? nullptr : &metadata_[found->second].second;
}

namespace {

[[noreturn]] void wrong_kind(const std::string& where, std::string_view key, const GgufValue& value,
                             const char* wanted) {
  std::string kind = value.type >= 0 && value.type < TypeCount ? kTypeNames[value.type] : "unknown";
  if (value.type == Array && value.element_type >= 0 && value.element_type < TypeCount)
    kind = fmt::format("array of {}", kTypeNames[value.element_type]);
  fail("{}: key {} is {} {}; it must be {}", where, shown(key),
       std::string_view("ai").find(kind[0]) == std::string_view::npos ? "a" : "an", kind, wanted);
}

}  // namespace

std::optional<std::string> GgufFile::string(std::string_view key) const {
  const GgufValue* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (const auto* text = std::get_if<std::string>(&v->value)) return *text;
  wrong_kind(where_, key, *v, "a string");
}

std::optional<int64_t> GgufFile::integer(std::string_view key) const {
  const GgufValue* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (const auto* value = std::get_if<int64_t>(&v->value)) return *value;
  if (const auto* value = std::get_if<uint64_t>(&v->value)) {
    check(*value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
          "{}: key {} is {}, too large for 64 signed bits", where_, shown(key), *value);
    return static_cast<int64_t>(*value);
  }
  wrong_kind(where_, key, *v, "an integer");
}

std::optional<double> GgufFile::number(std::string_view key) const {
  const GgufValue* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (const auto* value = std::get_if<double>(&v->value)) return *value;
  if (const auto* value = std::get_if<int64_t>(&v->value)) return static_cast<double>(*value);
  if (const auto* value = std::get_if<uint64_t>(&v->value)) return static_cast<double>(*value);
  wrong_kind(where_, key, *v, "a number");
}

std::optional<bool> GgufFile::boolean(std::string_view key) const {
  const GgufValue* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (const auto* value = std::get_if<bool>(&v->value)) return *value;
  wrong_kind(where_, key, *v, "a bool");
}

const std::vector<std::string_view>* GgufFile::strings(std::string_view key) const {
  const GgufValue* v = find(key);
  if (v == nullptr) return nullptr;
  if (const auto* array = std::get_if<GgufArray>(&v->value))
    if (const auto* values = std::get_if<std::vector<std::string_view>>(array)) return values;
  wrong_kind(where_, key, *v, "an array of strings");
}

std::vector<double> GgufFile::numbers(std::string_view key) const {
  const GgufValue* v = find(key);
  if (v == nullptr) return {};
  if (const auto* array = std::get_if<GgufArray>(&v->value))
    return std::visit(
        [&](const auto& values) -> std::vector<double> {
          if constexpr (std::is_same_v<std::decay_t<decltype(values)>, std::vector<std::string_view>>) {
            wrong_kind(where_, key, *v, "a number or an array of numbers");
          } else {
            return {values.begin(), values.end()};
          }
        },
        *array);
  if (std::holds_alternative<std::string>(v->value) || std::holds_alternative<bool>(v->value))
    wrong_kind(where_, key, *v, "a number or an array of numbers");
  return {*number(key)};
}

// ---- writing --------------------------------------------------------------------------------------------------------

namespace {

void put(std::string& out, const void* data, size_t size) {
  out.append(static_cast<const char*>(data), size);
}
template <class T>
void put_number(std::string& out, T value) {
  put(out, &value, sizeof value);
}
void put_string(std::string& out, std::string_view text) {
  put_number(out, static_cast<uint64_t>(text.size()));
  put(out, text.data(), text.size());
}

/// Appends `value` as the stored type; false when it does not fit or is of another kind.
template <class Stored, class Value>
bool put_as(std::string& out, Value value) {
  if constexpr (std::is_floating_point_v<Stored> != std::is_floating_point_v<Value>) {
    return false;
  } else if constexpr (std::is_integral_v<Stored>) {
    if (!std::in_range<Stored>(value)) return false;
    put_number(out, static_cast<Stored>(value));
    return true;
  } else {
    put_number(out, static_cast<Stored>(value));
    return true;
  }
}

template <class Value>
bool put_typed(std::string& out, int32_t type, Value value) {
  switch (type) {
    case U8:
      return put_as<uint8_t>(out, value);
    case I8:
      return put_as<int8_t>(out, value);
    case U16:
      return put_as<uint16_t>(out, value);
    case I16:
      return put_as<int16_t>(out, value);
    case U32:
      return put_as<uint32_t>(out, value);
    case I32:
      return put_as<int32_t>(out, value);
    case U64:
      return put_as<uint64_t>(out, value);
    case I64:
      return put_as<int64_t>(out, value);
    case F32:
      return put_as<float>(out, value);
    case F64:
      return put_as<double>(out, value);
    default:
      return false;
  }
}

/// The value with its type in front, as the file holds it.
std::string encoded(const std::string& key, const GgufValue& v) {
  std::string out;
  put_number(out, v.type);
  bool good = false;
  if (const auto* array = std::get_if<GgufArray>(&v.value)) {
    good = v.type == Array;
    put_number(out, v.element_type);
    std::visit(
        [&](const auto& values) {
          using Element = typename std::decay_t<decltype(values)>::value_type;
          put_number(out, static_cast<uint64_t>(values.size()));
          for (const Element& value : values) {
            if constexpr (std::is_same_v<Element, std::string_view>) {
              good = good && v.element_type == String;
              put_string(out, value);
            } else if (std::is_same_v<Element, uint8_t> && v.element_type == Bool) {
              put_number(out, static_cast<uint8_t>(value != Element{}));
            } else {
              good = good && put_typed(out, v.element_type, value);
            }
          }
        },
        *array);
  } else if (const auto* text = std::get_if<std::string>(&v.value)) {
    good = v.type == String;
    put_string(out, *text);
  } else if (const auto* flag = std::get_if<bool>(&v.value)) {
    good = v.type == Bool;
    put_number(out, static_cast<uint8_t>(*flag));
  } else if (const auto* real = std::get_if<double>(&v.value)) {
    good = put_typed(out, v.type, *real);
  } else if (const auto* whole = std::get_if<int64_t>(&v.value)) {
    good = put_typed(out, v.type, *whole);
  } else {
    good = put_typed(out, v.type, std::get<uint64_t>(v.value));
  }
  check(good, "the value of the key {} does not fit its type {} (element type {})", shown(key), v.type, v.element_type);
  return out;
}

}  // namespace

struct GgufWriter::Impl {
  AtomicFile file;
  std::string where;
  uint64_t alignment;
  std::vector<std::pair<std::string, std::string>> keys;  ///< with the encoded value
  std::unordered_map<std::string, size_t> key_index;
  std::vector<TensorInfo> tensors;
  std::vector<int64_t> sizes;
  std::unordered_set<std::string> names;
  bool header_written = false, finished = false;
  size_t current = 0;
  int64_t written = 0;  ///< of the current tensor

  Impl(fs::path path, uint32_t alignment) : file(path), where(path.string()), alignment(alignment) {}

  void put_key(const std::string& key, std::string value) {
    check(!header_written, "{}: the key {} is set after the first tensor was written", where, shown(key));
    check(!key.empty() && key.size() <= kMaxKey && unicode::valid(key),
          "{}: the key {} is empty, longer than {} bytes or not UTF-8", where, shown(key), kMaxKey);
    const auto [found, fresh] = key_index.emplace(key, keys.size());
    if (fresh)
      keys.emplace_back(key, std::move(value));
    else
      keys[found->second].second = std::move(value);
  }

  void pad() {
    const auto over = static_cast<uint64_t>(file.size()) % alignment;
    if (over != 0) file.write(std::string(static_cast<size_t>(alignment - over), '\0'));
  }

  void write_header() {
    if (header_written) return;
    if (alignment != 32 || key_index.count("general.alignment") != 0) {
      GgufValue v;
      v.type = U32;
      v.value = alignment;
      put_key("general.alignment", encoded("general.alignment", v));
    }
    header_written = true;
    std::string out = "GGUF";
    put_number(out, uint32_t{3});
    put_number(out, static_cast<int64_t>(tensors.size()));
    put_number(out, static_cast<int64_t>(keys.size()));
    for (const auto& [key, value] : keys) {
      put_string(out, key);
      out += value;
    }
    uint64_t offset = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const TensorInfo& t = tensors[i];
      put_string(out, t.name);
      const std::vector<int64_t> shape = t.shape.empty() ? std::vector<int64_t>{1} : t.shape;
      put_number(out, static_cast<uint32_t>(shape.size()));
      for (auto size = shape.rbegin(); size != shape.rend(); ++size) put_number(out, *size);
      put_number(out, static_cast<int32_t>(info(t.format).gguf_id));
      put_number(out, offset);
      const uint64_t padded = (static_cast<uint64_t>(sizes[i]) + alignment - 1) / alignment * alignment;
      check(!__builtin_add_overflow(offset, padded, &offset) && offset >> 63 == 0,
            "{}: the size of all tensors overflows 64 bits", where);
    }
    file.write(out);
    pad();
  }
};

GgufWriter::GgufWriter(fs::path path, uint32_t alignment) {
  check(valid_alignment(alignment), "{}: the alignment {} must be a power of two", path.string(), alignment);
  impl_ = std::make_unique<Impl>(std::move(path), alignment);
}

GgufWriter::~GgufWriter() = default;

void GgufWriter::set(const std::string& key, const GgufValue& value) {
  if (key == "general.alignment") {
    const auto* number = std::get_if<uint64_t>(&value.value);
    check(value.type == U32 && number != nullptr && valid_alignment(*number),
          "{}: general.alignment must be a uint32 power of two", impl_->where);
    check(!impl_->header_written, "{}: the key {} is set after the first tensor was written", impl_->where, key);
    impl_->alignment = *number;
  }
  impl_->put_key(key, encoded(key, value));
}

namespace {

GgufValue scalar(int32_t type, auto value) {
  GgufValue v;
  v.type = type;
  v.value = std::move(value);
  return v;
}

GgufValue array_of(int32_t type, GgufArray values) {
  GgufValue v;
  v.type = Array;
  v.element_type = type;
  v.value = std::move(values);
  return v;
}

}  // namespace

void GgufWriter::set(const std::string& key, std::string value) {
  set(key, scalar(String, std::move(value)));
}
void GgufWriter::set_u32(const std::string& key, uint32_t value) {
  set(key, scalar(U32, uint64_t{value}));
}
void GgufWriter::set_f32(const std::string& key, float value) {
  set(key, scalar(F32, static_cast<double>(value)));
}
void GgufWriter::set_bool(const std::string& key, bool value) {
  set(key, scalar(Bool, value));
}
void GgufWriter::set_array(const std::string& key, const std::vector<std::string>& values) {
  set(key, array_of(String, std::vector<std::string_view>(values.begin(), values.end())));
}
void GgufWriter::set_array_f32(const std::string& key, const std::vector<float>& values) {
  set(key, array_of(F32, std::vector<double>(values.begin(), values.end())));
}
void GgufWriter::set_array_i32(const std::string& key, const std::vector<int32_t>& values) {
  set(key, array_of(I32, std::vector<int64_t>(values.begin(), values.end())));
}

void GgufWriter::declare(const TensorInfo& tensor) {
  Impl& w = *impl_;
  const std::string name = shown(tensor.name);
  check(!w.header_written, "{}: tensor {} is declared after the first tensor was written", w.where, name);
  check(tensor.name.size() <= kMaxName && unicode::valid(tensor.name),
        "{}: the tensor name {} is longer than {} bytes or not UTF-8", w.where, name, kMaxName);
  check(info(tensor.format).gguf_id >= 0, "{}: tensor {} is in {}, which GGUF cannot hold here (it can: {})", w.where,
        name, info(tensor.format).name, supported_formats());
  check(tensor.shape.size() <= kMaxDims, "{}: tensor {} has {} dimensions; GGUF holds {} at most", w.where, name,
        tensor.shape.size(), kMaxDims);
  for (int64_t size : tensor.shape)
    check(size > 0, "{}: tensor {} has the shape [{}]; GGUF holds no empty tensors", w.where, name,
          fmt::join(tensor.shape, ", "));
  const FormatInfo& format = info(tensor.format);
  check(tensor.cols() % format.block == 0,
        "{}: tensor {} has rows of {} elements, not a multiple of the {}-element blocks of {}", w.where, name,
        tensor.cols(), format.block, format.name);
  const int64_t bytes = tensor.bytes();
  check(w.names.insert(tensor.name).second, "{}: the tensor {} is declared twice", w.where, name);
  w.tensors.push_back(tensor);
  w.sizes.push_back(bytes);
}

void GgufWriter::write(const std::string& name, std::span<const std::byte> bytes) {
  Impl& w = *impl_;
  check(w.current < w.tensors.size(), "{}: tensor {} is written after all declared tensors are complete", w.where,
        shown(name));
  const TensorInfo& t = w.tensors[w.current];
  check(t.name == name, "{}: tensor {} is written out of order: {} comes next", w.where, shown(name), shown(t.name));
  const int64_t size = w.sizes[w.current];
  check(static_cast<int64_t>(bytes.size()) <= size - w.written, "{}: {} bytes for tensor {}, which lacks only {}",
        w.where, bytes.size(), shown(name), size - w.written);
  w.write_header();
  w.file.write(bytes);
  w.written += static_cast<int64_t>(bytes.size());
  if (w.written == size) {
    w.pad();
    ++w.current;
    w.written = 0;
  }
}

void GgufWriter::finish() {
  Impl& w = *impl_;
  if (w.finished) return;
  if (w.current < w.tensors.size())
    fail("{}: tensor {} is not complete: {} of {} bytes are written", w.where, shown(w.tensors[w.current].name),
         w.written, w.sizes[w.current]);
  w.write_header();
  w.file.commit();
  w.finished = true;
}

}  // namespace moiety
