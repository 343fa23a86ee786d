#include "moiety/io/safetensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <regex>
#include <unordered_set>

#include "moiety/base/atomic_file.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr uint64_t kMaxHeader = 100'000'000;  // what the format's own library accepts
constexpr size_t kMaxRank = 64;               // more than any tensor library handles

/// One entry of the header as it stands there, before it is checked against the file.
struct Entry {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::vector<uint64_t> offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

/// Reads the header without building a document: what does not belong there is refused as it comes.
class HeaderReader final : public nlohmann::json_sax<json> {
 public:
  explicit HeaderReader(const std::string& where) : where_(where) {}

  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

  bool start_object(size_t) override {
    switch (state_) {
      case State::Start:
        state_ = State::Names;
        return true;
      case State::Entry:
        state_ = State::Fields;
        return true;
      case State::Metadata:
        state_ = State::MetadataKeys;
        return true;
      default:
        unexpected("an object");
    }
  }
  bool end_object() override {
    switch (state_) {
      case State::Names:
        state_ = State::End;
        return true;
      case State::MetadataKeys:
        state_ = State::Names;
        return true;
      case State::Fields: {
        const Entry& e = entries.back();
        check(e.has_dtype && e.has_shape && e.has_offsets, "{}: tensor {} has no {}", where_, shown(e.name),
              !e.has_dtype   ? "dtype"
              : !e.has_shape ? "shape"
                             : "data_offsets");
        state_ = State::Names;
        return true;
      }
      default:
        unexpected("the end of an object");
    }
  }
  bool key(std::string& name) override {
    key_ = name;
    if (state_ == State::Names) {
      check(names_.insert(name).second, "{}: the name {} occurs twice in the header", where_, shown(name));
      if (name == "__metadata__") {
        state_ = State::Metadata;
      } else {
        state_ = State::Entry;
        entries.emplace_back().name = name;
      }
    } else if (state_ == State::MetadataKeys) {
      check(metadata.emplace(name, "").second, "{}: the metadata key {} occurs twice", where_, shown(name));
    } else {
      Entry& e = entries.back();
      bool* seen = name == "dtype"          ? &e.has_dtype
                   : name == "shape"        ? &e.has_shape
                   : name == "data_offsets" ? &e.has_offsets
                                            : nullptr;
      check(seen != nullptr, "{}: tensor {} has an unknown field {} (dtype, shape and data_offsets are known)", where_,
            shown(e.name), shown(name));
      check(!*seen, "{}: tensor {} has the field {} twice", where_, shown(e.name), name);
      *seen = true;
    }
    return true;
  }
  bool start_array(size_t) override {
    if (state_ != State::Fields || key_ == "dtype" || in_array_) unexpected("an array");
    in_array_ = true;
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    return true;
  }
  bool string(std::string& text) override {
    if (state_ == State::MetadataKeys) {
      metadata[key_] = text;
    } else if (state_ == State::Fields && key_ == "dtype" && !in_array_) {
      entries.back().dtype = text;
    } else {
      unexpected("a string");
    }
    return true;
  }
  bool number_unsigned(uint64_t value) override {
    if (!in_array_) unexpected("a number");
    Entry& e = entries.back();
    if (key_ == "shape") {
      check(value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()), "{}: tensor {} has the dimension {}",
            where_, shown(e.name), value);
      check(e.shape.size() < kMaxRank, "{}: tensor {} has more than {} dimensions", where_, shown(e.name), kMaxRank);
      e.shape.push_back(static_cast<int64_t>(value));
    } else {
      check(e.offsets.size() < 2, "{}: tensor {} has more than two data_offsets", where_, shown(e.name));
      e.offsets.push_back(value);
    }
    return true;
  }
  bool number_integer(int64_t value) override {
    fail("{}: tensor {} has the number {} in {}: it must not be negative", where_,
         entries.empty() ? "" : shown(entries.back().name), value, shown(key_));
  }
  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("true or false"); }
  bool number_float(double, const std::string&) override { unexpected("a fraction"); }
  bool binary(json::binary_t&) override { unexpected("binary data"); }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    fail("{}: the header is not valid JSON at byte {}", where_, 8 + position);
  }

 private:
  enum class State { Start, Names, Entry, Fields, Metadata, MetadataKeys, End };

  [[noreturn]] void unexpected(const char* what) const {
    switch (state_) {
      case State::Start:
        fail("{}: the header is {}; it must be a JSON object", where_, what);
      case State::Metadata:
        fail("{}: __metadata__ is {}; it must be an object of strings", where_, what);
      case State::MetadataKeys:
        fail("{}: the metadata key {} has {} as value; it must be a string", where_, shown(key_), what);
      case State::Entry:
        fail("{}: the header entry {} is {}; it must be an object with dtype, shape and data_offsets", where_,
             shown(key_), what);
      default:
        fail("{}: tensor {} has {} in {}; dtype must be a string, shape and data_offsets arrays of whole numbers",
             where_, entries.empty() ? "" : shown(entries.back().name), what, shown(key_));
    }
  }

  const std::string& where_;
  State state_ = State::Start;
  bool in_array_ = false;
  std::string key_;
  std::unordered_set<std::string> names_;
};

/// Fills in format and shape and returns the size that they ask for.
uint64_t checked_bytes(const Entry& entry, const std::string& where, TensorInfo& tensor) {
  const FormatInfo* format = find_format(entry.dtype);
  check(
      format != nullptr && format->block == 1 && format->name == entry.dtype,
      "{}: tensor {} has the dtype {}, which is not supported (F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I8 to I64, U8 to "
      "U64 and BOOL are)",
      where, shown(entry.name), shown(entry.dtype));
  tensor.name = entry.name;
  tensor.format = format->format;
  tensor.shape = entry.shape;
  // Zeros count as ones first: rows() and the like must not overflow either.
  uint64_t bytes = static_cast<uint64_t>(format->bytes);
  bool empty = false;
  for (int64_t size : entry.shape) {
    empty = empty || size == 0;
    check(!__builtin_mul_overflow(bytes, static_cast<uint64_t>(std::max<int64_t>(size, 1)), &bytes) && bytes >> 63 == 0,
          "{}: tensor {} has the shape [{}], whose size overflows 64 bits", where, shown(entry.name),
          fmt::join(entry.shape, ", "));
  }
  return empty ? 0 : bytes;
}

/// JSON text of one tensor's entry, with its name.
std::string entry_text(const TensorInfo& tensor, int64_t begin, int64_t bytes) {
  const json body = {
      {"dtype", info(tensor.format).name}, {"shape", tensor.shape}, {"data_offsets", {begin, begin + bytes}}};
  return json(tensor.name).dump() + ":" + body.dump();
}

/// The 8 bytes of length and the header, padded with spaces so that the data starts at a multiple of 8, or after
/// `reserved` bytes.
std::string header_text(const std::vector<std::string>& entries, const std::map<std::string, std::string>& metadata,
                        size_t reserved = 0) {
  std::string text = "{";
  if (!metadata.empty()) text += "\"__metadata__\":" + json(metadata).dump();
  for (const std::string& entry : entries) {
    if (text.size() > 1) text += ',';
    text += entry;
  }
  text += '}';
  const size_t length = std::max((text.size() + 7) / 8 * 8, reserved == 0 ? 0 : reserved - 8);
  text.resize(length, ' ');
  std::string prefix(8, '\0');
  const auto value = static_cast<uint64_t>(length);
  std::memcpy(prefix.data(), &value, 8);
  return prefix + text;
}

void check_writable(const TensorInfo& tensor, const std::string& where) {
  check(!is_block(tensor.format), "{}: tensor {} is in {}, which safetensors cannot hold; dequantize it or write GGUF",
        where, shown(tensor.name), info(tensor.format).name);
  check(tensor.name != "__metadata__", "{}: a tensor cannot be named __metadata__", where);
  check(tensor.shape.size() <= kMaxRank, "{}: tensor {} has more than {} dimensions", where, shown(tensor.name),
        kMaxRank);
  try {
    json(tensor.name).dump();
  } catch (const json::exception&) {
    fail("{}: the tensor name {} is not valid UTF-8", where, shown(tensor.name));
  }
}

bool keeps_alignment(int64_t bytes) {
  return bytes % 8 == 0;
}

int64_t element_bytes(const TensorInfo& tensor) {
  return info(tensor.format).bytes;
}

}  // namespace

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const fs::path& path) {
  auto file = MappedFile::open(path);
  return parse(file->bytes(), path.string(), file);
}

std::shared_ptr<const SafetensorsFile> SafetensorsFile::parse(std::span<const std::byte> bytes, std::string where,
                                                              std::shared_ptr<const void> owner) {
  check(bytes.size() >= 8,
        "{}: {} bytes are too few for a safetensors file, which starts with the 8-byte length of its header", where,
        bytes.size());
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  check(length <= bytes.size() - 8,
        "{}: the header is said to have {} bytes, but the file has only {} after the length", where, length,
        bytes.size() - 8);
  check(length <= kMaxHeader, "{}: a header of {} bytes is longer than the {} allowed", where, length, kMaxHeader);
  const char* header = reinterpret_cast<const char*>(bytes.data()) + 8;
  check(length >= 2 && header[0] == '{',
        "{}: the header at byte 8 does not start with '{{'; this is not a safetensors file", where);

  HeaderReader reader(where);
  json::sax_parse(header, header + length, &reader);

  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->where_ = std::move(where);
  file->owner_ = std::move(owner);
  file->data_ = bytes.subspan(8 + length);
  file->metadata_ = std::move(reader.metadata);
  const std::string& at = file->where_;

  std::vector<Entry>& entries = reader.entries;
  for (const Entry& e : entries)
    check(e.offsets.size() == 2 && e.offsets[0] <= e.offsets[1],
          "{}: tensor {} has data_offsets that are not [begin, end]", at, shown(e.name));
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return a.offsets < b.offsets; });
  uint64_t end = 0;
  file->tensors_.reserve(entries.size());
  file->offsets_.reserve(entries.size());
  file->index_.reserve(entries.size());
  for (const Entry& e : entries) {
    const uint64_t asked = checked_bytes(e, at, file->tensors_.emplace_back());
    check(asked == e.offsets[1] - e.offsets[0], "{}: tensor {} ({} [{}]) needs {} bytes, but its data_offsets hold {}",
          at, shown(e.name), e.dtype, fmt::join(e.shape, ", "), asked, e.offsets[1] - e.offsets[0]);
    check(e.offsets[0] == end, "{}: tensor {} starts at data byte {}, but the one before it ends at {}: {} bytes {}",
          at, shown(e.name), e.offsets[0], end, e.offsets[0] > end ? e.offsets[0] - end : end - e.offsets[0],
          e.offsets[0] > end ? "belong to no tensor" : "overlap");
    end = e.offsets[1];
    check(end <= file->data_.size(), "{}: tensor {} ends at data byte {}, past the end of the file's {} bytes of data",
          at, shown(e.name), end, file->data_.size());
    file->offsets_.push_back(e.offsets[0]);
    file->index_.emplace(e.name, file->tensors_.size() - 1);
  }
  check(end == file->data_.size(), "{}: {} bytes after the last tensor belong to no tensor", at,
        file->data_.size() - end);
  return file;
}

TensorView SafetensorsFile::get(const std::string& name) const {
  const auto found = index_.find(name);
  check(found != index_.end(), "{}: there is no tensor {}", where_, shown(name));
  const size_t i = found->second;
  TensorView view;
  static_cast<TensorInfo&>(view) = tensors_[i];
  view.data = data_.subspan(offsets_[i], (i + 1 < offsets_.size() ? offsets_[i + 1] : data_.size()) - offsets_[i]);
  view.owner = owner_;
  return view;
}

// ---- writing --------------------------------------------------------------------------------------------------------

struct SafetensorsWriter::Impl {
  AtomicFile file;
  std::string where;
  std::vector<TensorInfo> tensors;
  std::vector<int64_t> sizes;
  std::vector<std::vector<std::byte>> held;  ///< data of tensors whose place is at the end
  std::vector<size_t> layout;                ///< tensor numbers in the order of the file
  std::vector<bool> hold;
  size_t current = 0;
  int64_t written = 0;  ///< of the current tensor
  bool finished = false;

  explicit Impl(fs::path path) : file(path), where(path.string()) {}

  void skip_complete() {
    while (current < tensors.size() && written == sizes[current]) ++current, written = 0;
  }
};

SafetensorsWriter::SafetensorsWriter(fs::path path, std::vector<TensorInfo> tensors,
                                     std::map<std::string, std::string> metadata)
    : impl_(std::make_unique<Impl>(std::move(path))) {
  Impl& w = *impl_;
  w.tensors = std::move(tensors);
  const size_t n = w.tensors.size();
  std::unordered_set<std::string_view> names;
  bool aligned = true;
  int64_t total = 0;
  for (const TensorInfo& t : w.tensors) {
    check_writable(t, w.where);
    check(names.insert(t.name).second, "{}: the tensor {} is declared twice", w.where, shown(t.name));
    w.sizes.push_back(t.bytes());
    aligned = aligned && total % element_bytes(t) == 0;
    check(!__builtin_add_overflow(total, w.sizes.back(), &total), "{}: the size of all tensors overflows 64 bits",
          w.where);
  }
  // Readers view the data in place, so every tensor must start at a multiple of its element size. Where the given order
  // would break that, tensors of odd sizes go to the end, larger elements first.
  w.layout.resize(n);
  std::iota(w.layout.begin(), w.layout.end(), size_t{0});
  w.hold.assign(n, false);
  w.held.resize(n);
  if (!aligned) {
    for (size_t i = 0; i < n; ++i) w.hold[i] = !keeps_alignment(w.sizes[i]);
    std::stable_sort(w.layout.begin(), w.layout.end(), [&](size_t a, size_t b) {
      if (w.hold[a] != w.hold[b]) return !w.hold[a];
      return w.hold[a] && element_bytes(w.tensors[a]) > element_bytes(w.tensors[b]);
    });
  }
  std::vector<std::string> entries;
  int64_t at = 0;
  for (size_t i : w.layout) {
    entries.push_back(entry_text(w.tensors[i], at, w.sizes[i]));
    at += w.sizes[i];
  }
  const std::string header = header_text(entries, metadata);
  check(header.size() - 8 <= kMaxHeader, "{}: the header of {} tensors is longer than the {} bytes that readers accept",
        w.where, n, kMaxHeader);
  w.file.write(header);
  w.skip_complete();
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const std::string& name, std::span<const std::byte> bytes) {
  Impl& w = *impl_;
  if (bytes.empty()) return;
  check(w.current < w.tensors.size(), "{}: {} is written after all declared tensors are complete", w.where,
        shown(name));
  const TensorInfo& t = w.tensors[w.current];
  check(t.name == name, "{}: tensor {} is written out of order: {} comes next", w.where, shown(name), shown(t.name));
  const int64_t left = w.sizes[w.current] - w.written;
  check(static_cast<int64_t>(bytes.size()) <= left, "{}: {} bytes for tensor {}, which lacks only {}", w.where,
        bytes.size(), shown(name), left);
  if (w.hold[w.current]) {
    auto& held = w.held[w.current];
    held.insert(held.end(), bytes.begin(), bytes.end());
  } else {
    w.file.write(bytes);
  }
  w.written += static_cast<int64_t>(bytes.size());
  w.skip_complete();
}

void SafetensorsWriter::finish() {
  Impl& w = *impl_;
  if (w.finished) return;
  if (w.current < w.tensors.size())
    fail("{}: tensor {} is not complete: {} of {} bytes are written", w.where, shown(w.tensors[w.current].name),
         w.written, w.sizes[w.current]);
  for (size_t i : w.layout)
    if (w.hold[i]) w.file.write(w.held[i]);
  w.file.commit();
  w.finished = true;
}

namespace {

// A shard's header is written last, into space kept free before the data. Small shards are gathered in memory and get a
// header of the exact size; a shard whose header would outgrow its space ends there.
constexpr size_t kReserved = size_t{1} << 20;
constexpr size_t kInMemory = size_t{16} << 20;

struct Shard {
  std::unique_ptr<AtomicFile> file;  ///< null while everything is in `early`
  std::vector<std::byte> early;
  std::vector<std::string> entries;
  size_t entry_bytes = 0;
  int64_t size = 0;  ///< data bytes, held ones included
  struct Held {
    TensorInfo tensor;
    std::vector<std::byte> bytes;
  };
  std::vector<Held> held;  ///< tensors of odd size, written at the end, larger elements first
  size_t held_bytes = 0;
  std::vector<std::string> names;
  int64_t at = 0;
};

}  // namespace

struct ShardedWriter::Impl {
  fs::path folder;
  int64_t shard_bytes;
  Shard shard;
  std::vector<std::unique_ptr<AtomicFile>> done;
  std::vector<std::vector<std::string>> names;
  std::unordered_set<std::string> seen;
  int64_t total = 0;
  bool finished = false;
  const std::map<std::string, std::string> metadata{{"format", "pt"}};  // transformers asks for it

  // The placeholder is never a file's name: the shards get theirs when their number is known.
  std::unique_ptr<AtomicFile> temporary() const {
    return std::make_unique<AtomicFile>(folder / fmt::format("model-shard-{}", done.size() + 1));
  }

  void append(const TensorInfo& tensor, std::span<const std::byte> bytes) {
    Shard& s = shard;
    s.entries.push_back(entry_text(tensor, s.at, static_cast<int64_t>(bytes.size())));
    s.at += static_cast<int64_t>(bytes.size());
    if (s.file == nullptr && s.early.size() + bytes.size() <= kInMemory) {
      s.early.insert(s.early.end(), bytes.begin(), bytes.end());
      return;
    }
    if (s.file == nullptr) {
      s.file = temporary();
      s.file->write(std::string(kReserved, ' '));
      s.file->write(s.early);
      s.early = {};
    }
    s.file->write(bytes);
  }

  void close_shard() {
    Shard& s = shard;
    if (s.names.empty()) return;
    std::stable_sort(s.held.begin(), s.held.end(), [](const Shard::Held& a, const Shard::Held& b) {
      return element_bytes(a.tensor) > element_bytes(b.tensor);
    });
    for (const Shard::Held& h : s.held) append(h.tensor, h.bytes);
    if (s.file == nullptr) {
      s.file = temporary();
      s.file->write(header_text(s.entries, metadata));
      s.file->write(s.early);
    } else {
      const std::string header = header_text(s.entries, metadata, kReserved);
      s.file->write_at(0, std::as_bytes(std::span(header)));
    }
    s.file->close();
    done.push_back(std::move(s.file));
    names.push_back(std::move(s.names));
    shard = Shard{};
  }
};

ShardedWriter::ShardedWriter(fs::path folder, int64_t shard_bytes) : impl_(std::make_unique<Impl>()) {
  check(shard_bytes > 0, "shards of {} bytes: the size must be positive", shard_bytes);
  impl_->folder = folder.empty() ? fs::path(".") : std::move(folder);
  impl_->shard_bytes = shard_bytes;
  std::error_code error;
  fs::create_directories(impl_->folder, error);
  check(fs::is_directory(impl_->folder), "cannot create the folder {}: {}", impl_->folder.string(), error.message());
}

ShardedWriter::~ShardedWriter() = default;

void ShardedWriter::add(const TensorInfo& tensor, std::span<const std::byte> bytes) {
  Impl& w = *impl_;
  const std::string where = w.folder.string();
  check(!w.finished, "{}: tensor {} comes after finish()", where, shown(tensor.name));
  check_writable(tensor, where);
  const auto size = static_cast<int64_t>(bytes.size());
  check(size == tensor.bytes(), "{}: tensor {} ({} [{}]) has {} bytes, not {}", where, shown(tensor.name),
        info(tensor.format).name, fmt::join(tensor.shape, ", "), tensor.bytes(), size);
  check(w.seen.insert(tensor.name).second, "{}: the tensor {} is added twice", where, shown(tensor.name));
  // The largest offsets have 19 digits.
  const size_t entry = entry_text(tensor, 0, 0).size() + 48;
  Shard& s = w.shard;
  if (!s.names.empty() && (s.size + size > w.shard_bytes || s.entry_bytes + entry > kReserved - 4096)) w.close_shard();
  check(entry < kReserved - 4096, "{}: the name of a tensor is too long: {}", where, shown(tensor.name));
  s.size += size;
  s.entry_bytes += entry;
  s.names.push_back(tensor.name);
  w.total += size;
  if (keeps_alignment(size)) {
    w.append(tensor, bytes);
    return;
  }
  s.held.push_back({tensor, {bytes.begin(), bytes.end()}});
  s.held_bytes += bytes.size();
  if (s.held_bytes > kInMemory) w.close_shard();
}

void ShardedWriter::finish() {
  Impl& w = *impl_;
  if (w.finished) return;
  w.close_shard();
  if (w.done.empty()) {  // a checkpoint without tensors is still a readable file
    w.done.push_back(w.temporary());
    w.done.back()->write(header_text({}, w.metadata));
    w.names.emplace_back();
  }
  const size_t n = w.done.size();
  std::unordered_set<std::string> kept;
  json weight_map = json::object();
  for (size_t i = 0; i < n; ++i) {
    const std::string name = n == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, n);
    w.done[i]->commit(w.folder / name);
    kept.insert(name);
    for (const std::string& tensor : w.names[i]) weight_map[tensor] = name;
  }
  if (n > 1) {
    const json index = {{"metadata", {{"total_size", w.total}}}, {"weight_map", std::move(weight_map)}};
    AtomicFile file(w.folder / "model.safetensors.index.json");
    file.write(index.dump(2) + "\n");
    file.commit();
    kept.insert("model.safetensors.index.json");
  }
  w.finished = true;
  // An older checkpoint in the same folder must not be mixed with this one.
  static const std::regex ours(R"(model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?)");
  std::error_code error;
  for (const auto& each : fs::directory_iterator(w.folder, error)) {
    const std::string name = each.path().filename().string();
    if (kept.count(name) == 0 && std::regex_match(name, ours)) fs::remove(each.path(), error);
  }
}

}  // namespace moiety
