#include "moiety/io/task_vector.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kVersion = 1;
constexpr int64_t kMostEntries = int64_t{1} << 48;
constexpr const char *kBits = "signs.golomb", *kPositive = "signs.positive", *kNegative = "signs.negative",
                     *kValues = "values", *kScale = "scale";
const std::set<std::string> kOwn = {kBits, kPositive, kNegative, kValues, kScale};

// Numbers of the metadata, all of which is text.
template <class T>
T number(const std::map<std::string, std::string>& metadata, const char* key, const std::string& where) {
  const auto it = metadata.find(key);
  check(it != metadata.end(), "{}: its header has no `{}`", where, key);
  T value{};
  const char *begin = it->second.data(), *end = begin + it->second.size();
  const auto [rest, error] = std::from_chars(begin, end, value);
  check(begin != end && error == std::errc() && rest == end, "{}: `{}` is '{}', which is no number that it can be",
        where, key, shown(it->second));
  return value;
}

std::string text(const std::map<std::string, std::string>& metadata, const char* key, const std::string& where) {
  const auto it = metadata.find(key);
  check(it != metadata.end(), "{}: its header has no `{}`", where, key);
  return it->second;
}

json table(const std::map<std::string, std::string>& metadata, const char* key, const std::string& where) {
  return parse_json(text(metadata, key, where), fmt::format("{}: `{}`", where, key));
}

std::map<std::string, std::string> texts(const std::map<std::string, std::string>& metadata, const char* key,
                                         const std::string& where) {
  std::map<std::string, std::string> out;
  if (metadata.count(key) == 0) return out;
  const json all = table(metadata, key, where);
  check(all.is_object(), "{}: `{}` holds no names and texts", where, key);
  for (const auto& [name, value] : all.items()) {
    check(value.is_string(), "{}: `{}` of '{}' is no text", where, key, shown(name));
    out[name] = value.get<std::string>();
  }
  return out;
}

std::vector<TaskVectorEntry> entries_of(const std::map<std::string, std::string>& metadata, const std::string& where) {
  const json names = table(metadata, "names", where), shapes = table(metadata, "shapes", where);
  check(names.is_array() && shapes.is_array() && names.size() == shapes.size(),
        "{}: `names` and `shapes` are no lists of one length", where);
  std::vector<TaskVectorEntry> out;
  for (size_t i = 0; i < names.size(); ++i) {
    check(names[i].is_string() && shapes[i].is_array(), "{}: entry {} of `names` or `shapes` is neither", where, i);
    TaskVectorEntry e;
    e.name = names[i].get<std::string>();
    for (const json& size : shapes[i]) {
      check(size.is_number_integer() && size.get<int64_t>() >= 0,
            "{}: the shape of '{}' holds something else than sizes", where, shown(e.name));
      e.shape.push_back(size.get<int64_t>());
    }
    out.push_back(std::move(e));
  }
  return out;
}

void check_tensor(const SafetensorsFile& file, const char* name, Format format, int64_t elements,
                  const std::string& where) {
  check(file.has(name), "{}: there is no tensor '{}' in it", where, name);
  const TensorView v = file.get(name);
  check(v.format == format && v.elements() == elements, "{}: '{}' holds {} elements of {}; {} of {} were expected",
        where, name, v.elements(), info(v.format).name, elements, info(format).name);
}

int64_t words(int64_t d) {
  return d / 64 + (d % 64 != 0 ? 1 : 0);
}

std::vector<uint64_t> words_of(const TensorView& v) {
  std::vector<uint64_t> out(v.data.size() / 8);
  if (!out.empty()) std::memcpy(out.data(), v.data.data(), out.size() * 8);
  return out;
}

// What a header may say, whoever says it.
void check_header(const TaskVectorHeader& h, const std::string& where) {
  check(h.kind == "full" || h.kind == "lora" || h.kind == "ia3", "{}: unknown kind `{}`; known are full, lora and ia3",
        where, shown(h.kind));
  check(h.form == "golomb" || h.form == "masks" || h.form == "prune" || h.form == "dense",
        "{}: unknown form `{}`; known are golomb, masks, prune and dense", where, shown(h.form));
  check(h.density > 0.0 && h.density <= 1.0, "{}: the density is {}; it lies above 0 and is at most 1", where,
        h.density);
  check(std::isfinite(h.alpha) && h.alpha > 0.0, "{}: alpha is {}; it is above 0", where, h.alpha);
  check(std::isfinite(h.scale) && h.scale >= 0.0f, "{}: the scale is {}; it is 0 or above", where, h.scale);
  check(h.kept >= 0 && h.kept <= h.d, "{}: {} of {} entries cannot be kept", where, h.kept, h.d);
  std::set<std::string> names;
  for (const auto& e : h.entries) names.insert(e.name);
  for (const auto& [name, of] : h.aliases)
    check(names.count(name) == 0 && names.count(of) != 0, "{}: '{}' cannot stand for '{}'", where, shown(name),
          shown(of));
}

}  // namespace

int64_t lay_out(std::vector<TaskVectorEntry>& entries, const std::string& where) {
  int64_t at = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    TaskVectorEntry& e = entries[i];
    check(i == 0 || entries[i - 1].name < e.name, "{}: '{}' does not follow '{}': names ascend", where, shown(e.name),
          shown(i == 0 ? std::string() : entries[i - 1].name));
    int64_t size = 1;
    for (const int64_t n : e.shape)
      check(n >= 0 && !__builtin_mul_overflow(size, n, &size), "{}: the shape of '{}' is negative or too large", where,
            shown(e.name));
    check(size <= kMostEntries - at, "{}: it has more than {} entries", where, kMostEntries);
    e.begin = at;
    e.end = at += size;
  }
  return at;
}

std::shared_ptr<const TaskVectorFile> TaskVectorFile::open(const fs::path& path) {
  auto mapped = MappedFile::open(path);
  const auto bytes = mapped->bytes();
  return parse(bytes, path.string(), std::move(mapped));
}

std::shared_ptr<const TaskVectorFile> TaskVectorFile::parse(std::span<const std::byte> bytes, const std::string& where,
                                                            std::shared_ptr<const void> owner) {
  auto out = std::make_shared<TaskVectorFile>();
  out->where_ = where;
  out->bytes_ = static_cast<int64_t>(bytes.size());
  out->file_ = SafetensorsFile::parse(bytes, where, std::move(owner));
  const auto& metadata = out->file_->metadata();
  check(metadata.count("task_vector") != 0,
        "{}: no compressed task vector: `moiety compress --method compeft` writes those", where);
  const auto version = number<int64_t>(metadata, "task_vector", where);
  check(version == kVersion, "{}: its version is {}; this program reads version {}", where, version, kVersion);
  TaskVectorHeader& h = out->header_;
  h.kind = text(metadata, "kind", where);
  h.form = text(metadata, "form", where);
  h.density = number<double>(metadata, "density", where);
  h.alpha = number<double>(metadata, "alpha", where);
  h.kept = number<int64_t>(metadata, "nnz", where);
  h.b = number<int64_t>(metadata, "b", where);
  h.aliases = texts(metadata, "aliases", where);
  h.notes = texts(metadata, "notes", where);
  h.entries = entries_of(metadata, where);
  h.d = lay_out(h.entries, where);
  const auto stated = number<int64_t>(metadata, "d", where);
  check(stated == h.d, "{}: the tensors have {} entries, and `d` says {}", where, h.d, stated);
  const SafetensorsFile& f = *out->file_;
  check_tensor(f, kScale, Format::F32, 1, where);
  std::memcpy(&h.scale, f.get(kScale).data.data(), sizeof h.scale);
  check_header(h, where);
  check(h.form == "prune" || h.form == "dense" || h.scale > 0.0f || h.kept == 0,
        "{}: the scale is 0, and {} entries are kept", where, h.kept);
  if (h.form == "golomb" || h.form == "prune") {
    check(f.has(kBits), "{}: there is no tensor '{}' in it", where, kBits);
    check_tensor(f, kBits, Format::U8, f.get(kBits).elements(), where);
    // Checks counts against d.
    GolombReader(f.get(kBits).data, h.d, h.kept, h.b, h.form == "golomb", where);
  }
  if (h.form == "masks")
    for (const char* name : {kPositive, kNegative}) check_tensor(f, name, Format::U64, words(h.d), where);
  if (h.form == "prune") check_tensor(f, kValues, Format::F16, h.kept, where);
  if (h.form == "dense") check_tensor(f, kValues, Format::F32, h.d, where);
  for (const TensorInfo& t : f.tensors())
    if (kOwn.count(t.name) == 0) out->others_.push_back(t);
  return out;
}

TernaryMasks TaskVectorFile::masks() const {
  const TaskVectorHeader& h = header_;
  check(h.form != "dense", "{}: it holds all values, and no signs", where_);
  if (h.form != "masks") return golomb_decode(file_->get(kBits).data, h.d, h.kept, h.b, h.form == "golomb", where_);
  TernaryMasks out;
  out.d = h.d;
  out.positive = words_of(file_->get(kPositive));
  out.negative = words_of(file_->get(kNegative));
  for (size_t i = 0; i < out.positive.size(); ++i)
    check((out.positive[i] & out.negative[i]) == 0, "{}: word {} of the masks holds entries of both signs", where_, i);
  if (h.d % 64 != 0)
    check((out.positive.back() | out.negative.back()) >> h.d % 64 == 0, "{}: the masks go on behind entry {}", where_,
          h.d);
  check(out.kept() == h.kept, "{}: the masks keep {} entries, and `nnz` says {}", where_, out.kept(), h.kept);
  return out;
}

std::vector<float> TaskVectorFile::values() const {
  check(header_.form == "prune" || header_.form == "dense", "{}: it holds signs, and no values", where_);
  std::vector<float> out = file_->get(kValues).to_float();
  for (size_t i = 0; i < out.size(); ++i) check(std::isfinite(out[i]), "{}: value {} is {}", where_, i, out[i]);
  return out;
}

TensorView TaskVectorFile::other(const std::string& name) const {
  check(kOwn.count(name) == 0, "{}: '{}' is a tensor of the format", where_, name);
  return file_->get(name);
}

bool is_task_vector(const fs::path& path) {
  if (!fs::is_regular_file(path)) return false;
  try {
    return SafetensorsFile::open(path)->metadata().count("task_vector") != 0;
  } catch (const Error&) {
    return false;
  }
}

namespace {

struct Writing {
  TensorInfo info;
  std::span<const std::byte> bytes;
};

std::map<std::string, std::string> metadata_of(const TaskVectorHeader& h) {
  json names = json::array(), shapes = json::array();
  for (const auto& e : h.entries) {
    names.push_back(e.name);
    shapes.push_back(e.shape);
  }
  std::map<std::string, std::string> out = {{"task_vector", fmt::format("{}", kVersion)},
                                            {"kind", h.kind},
                                            {"form", h.form},
                                            {"density", fmt::format("{}", h.density)},
                                            {"alpha", fmt::format("{}", h.alpha)},
                                            {"d", fmt::format("{}", h.d)},
                                            {"nnz", fmt::format("{}", h.kept)},
                                            {"b", fmt::format("{}", h.b)},
                                            {"names", names.dump()},
                                            {"shapes", shapes.dump()}};
  if (!h.aliases.empty()) out["aliases"] = json(h.aliases).dump();
  if (!h.notes.empty()) out["notes"] = json(h.notes).dump();
  return out;
}

std::vector<std::byte> halves_of(std::span<const float> values, const std::string& where) {
  std::vector<std::byte> out(values.size() * 2);
  try {
    quantize_row(Format::F16, values.data(), out.data(), static_cast<int64_t>(values.size()));
  } catch (const Error& e) {
    fail("{}: a kept value does not fit into half precision ({})", where, e.what());
  }
  return out;
}

}  // namespace

int64_t write_task_vector(const fs::path& path, TaskVectorHeader h, const TernaryMasks& masks,
                          std::span<const float> values, const std::vector<TensorView>& others) {
  const std::string where = path.string();
  h.d = lay_out(h.entries, where);
  const bool dense = h.form == "dense", prune = h.form == "prune";
  check(dense || masks.d == h.d, "{}: signs of {} entries for tensors of {}", where, masks.d, h.d);
  // Where the scale is 0 the signs say nothing.
  const bool silent = !dense && !prune && h.scale == 0.0f;
  const TernaryMasks none(silent ? h.d : 0);
  const TernaryMasks& kept = silent ? none : masks;
  h.kept = dense ? h.d : kept.kept();
  check(static_cast<int64_t>(values.size()) == (dense   ? h.d
                                                : prune ? h.kept
                                                        : 0),
        "{}: {} values for the form {} of {} entries, {} kept", where, values.size(), h.form, h.d, h.kept);
  h.b = dense ? 0 : golomb_low_bits(h.kept, h.d);
  check_header(h, where);
  std::vector<Writing> all;
  GolombCode code;
  std::vector<std::byte> halves;
  if (h.form == "golomb" || prune) {
    code = golomb_encode(kept, h.b, !prune);
    all.push_back({{kBits, Format::U8, {static_cast<int64_t>(code.bytes.size())}}, code.bytes});
  }
  if (h.form == "masks") {
    all.push_back({{kPositive, Format::U64, {words(h.d)}}, std::as_bytes(std::span(kept.positive))});
    all.push_back({{kNegative, Format::U64, {words(h.d)}}, std::as_bytes(std::span(kept.negative))});
  }
  if (prune) {
    halves = halves_of(values, where);
    all.push_back({{kValues, Format::F16, {h.kept}}, halves});
  }
  if (dense) all.push_back({{kValues, Format::F32, {h.d}}, std::as_bytes(values)});
  all.push_back({{kScale, Format::F32, {}}, std::as_bytes(std::span(&h.scale, 1))});
  for (const TensorView& v : others) {
    check(kOwn.count(v.name) == 0, "{}: the tensor '{}' has the name of one of the format", where, v.name);
    all.push_back({v, v.data});
  }
  std::vector<TensorInfo> infos;
  for (const Writing& w : all) infos.push_back(w.info);
  SafetensorsWriter writer(path, infos, metadata_of(h));
  for (const Writing& w : all) writer.write(w.info.name, w.bytes);
  writer.finish();
  return static_cast<int64_t>(fs::file_size(path));
}

}  // namespace moiety
