#include "moiety/io/dataset.h"

#include <glob.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"
#include "moiety/io/mapped_file.h"
#include "moiety/io/unicode.h"

namespace moiety {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

constexpr int max_json_depth = 100;

std::string_view view(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Where the text begins: behind a byte order mark. UTF-16 and UTF-32 are refused, their text would be noise.
size_t text_begin(std::string_view text, const std::string& where) {
  check(!text.starts_with("\xFF\xFE") && !text.starts_with("\xFE\xFF"), "{} is UTF-16 or UTF-32: save it as UTF-8",
        where);
  return text.starts_with("\xEF\xBB\xBF") ? 3 : 0;
}

std::string lower_extension(const fs::path& path) {
  std::string e = path.extension().string();
  std::transform(e.begin(), e.end(), e.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return e;
}

bool is_image_name(const fs::path& path) {
  const std::string e = lower_extension(path);
  return e == ".png" || e == ".jpg" || e == ".jpeg";
}

// One sample's place in its file.
struct Place {
  uint64_t offset = 0, length = 0;
  uint32_t file = 0, line = 1;
};

// Finds the lines of a text, without their ends (LF or CRLF).
template <class Each>
void for_lines(std::string_view text, size_t begin, const Each& each) {
  uint32_t line = 1;
  for (size_t at = begin; at < text.size(); ++line) {
    size_t end = text.find('\n', at);
    const size_t next = end == std::string_view::npos ? text.size() : end + 1;
    if (end == std::string_view::npos) end = text.size();
    if (end > at && text[end - 1] == '\r') --end;
    each(at, end, line);
    at = next;
  }
}

bool blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n\f\v") == std::string_view::npos;
}

class Files {
 public:
  explicit Files(std::vector<fs::path> paths) : paths_(std::move(paths)) {
    if (paths_.size() > max_mapped) return;
    for (const auto& path : paths_) mapped_.push_back(MappedFile::open(path));
  }
  const std::vector<fs::path>& paths() const { return paths_; }
  std::shared_ptr<const MappedFile> open(uint32_t file) const {
    return mapped_.empty() ? MappedFile::open(paths_[file]) : mapped_[file];
  }
  std::string where(const Place& p) const { return fmt::format("{}:{}", paths_[p.file].string(), p.line); }
  template <class Use>
  auto read(const Place& p, const Use& use) const {
    const auto file = open(p.file);
    // A file that was cut has no bytes any more where they are mapped.
    std::error_code error;
    const bool whole = fs::file_size(paths_[p.file], error) >= file->bytes().size() && !error;
    check(whole && p.offset <= file->bytes().size() && p.length <= file->bytes().size() - p.offset,
          "{} has changed since it was indexed", paths_[p.file].string());
    return use(view(file->bytes()).substr(p.offset, p.length));
  }

 private:
  // A process may map some ten thousand files: those of a larger folder are mapped for the call only.
  static constexpr size_t max_mapped = 1000;
  std::vector<fs::path> paths_;
  std::vector<std::shared_ptr<const MappedFile>> mapped_;
};

void check_index(int64_t i, int64_t size) {
  check(i >= 0 && i < size, "sample {} is asked for, but the data has {}", i, size);
}

// --- Text
// ------------------------------------------------------------------------------------------------------------------

class TextData : public Dataset {
 public:
  TextData(std::vector<fs::path> paths, const std::string& document) : files_(std::move(paths)) {
    for (uint32_t f = 0; f < files_.paths().size(); ++f) {
      const auto file = files_.open(f);
      index(view(file->bytes()), f, document);
    }
  }
  int64_t size() const override { return static_cast<int64_t>(places_.size()); }
  SampleKind kind() const override { return SampleKind::text; }
  Sample get(int64_t i) const override {
    check_index(i, size());
    const Place& p = places_[static_cast<size_t>(i)];
    Sample sample;
    sample.where = files_.where(p);
    sample.text = files_.read(p, [](std::string_view text) { return unicode::sanitize(text); });
    return sample;
  }

 private:
  void add(std::string_view text, size_t begin, size_t end, uint32_t file, uint32_t line) {
    if (!blank(text.substr(begin, end - begin))) places_.push_back({begin, end - begin, file, line});
  }
  void index(std::string_view text, uint32_t file, const std::string& document) {
    const size_t start = text_begin(text, files_.paths()[file].string());
    if (document == "file") {
      add(text, start, text.size(), file, 1);
    } else if (document == "line") {
      for_lines(text, start, [&](size_t begin, size_t end, uint32_t line) { add(text, begin, end, file, line); });
    } else if (document == "paragraph") {
      size_t first = 0, last = 0;
      uint32_t first_line = 0;
      for_lines(text, start, [&](size_t begin, size_t end, uint32_t line) {
        if (blank(text.substr(begin, end - begin))) {
          if (first_line) add(text, first, last, file, first_line);
          first_line = 0;
        } else {
          if (!first_line) first = begin, first_line = line;
          last = end;
        }
      });
      if (first_line) add(text, first, last, file, first_line);
    } else {
      uint32_t line = 1;
      for (size_t at = start; at <= text.size();) {
        const size_t end = std::min(text.find(document, at), text.size());
        add(text, at, end, file, line);
        const size_t next = end + document.size();
        line += static_cast<uint32_t>(
            std::count(text.begin() + static_cast<std::ptrdiff_t>(at),
                       text.begin() + static_cast<std::ptrdiff_t>(std::min(next, text.size())), '\n'));
        at = next;
      }
    }
  }
  Files files_;
  std::vector<Place> places_;
};

// --- Records
// ---------------------------------------------------------------------------------------------------------------

Json parse_json(std::string_view text, const std::string& where) {
  try {
    return Json::parse(text, [&](int depth, Json::parse_event_t, Json&) {
      check(depth <= max_json_depth, "{}: the JSON nests more than {} deep", where, max_json_depth);
      return true;
    });
  } catch (const Json::exception& e) {
    // Behind the last "] " is what nlohmann says in words.
    const std::string_view what = e.what();
    const size_t colon = what.find("parse error");
    fail("{}: malformed JSON: {}", where, shown(colon == std::string_view::npos ? what : what.substr(colon), 200));
  }
}

class JsonLines : public Dataset {
 public:
  JsonLines(std::vector<fs::path> paths, DataOptions options) : files_(std::move(paths)), options_(std::move(options)) {
    for (uint32_t f = 0; f < files_.paths().size(); ++f) {
      const auto file = files_.open(f);
      const auto text = view(file->bytes());
      for_lines(text, text_begin(text, files_.paths()[f].string()), [&](size_t begin, size_t end, uint32_t line) {
        if (!blank(text.substr(begin, end - begin))) places_.push_back({begin, end - begin, f, line});
      });
    }
    if (!places_.empty()) options_.kind = to_string(kind_ = get(0).kind);
  }
  int64_t size() const override { return static_cast<int64_t>(places_.size()); }
  SampleKind kind() const override { return kind_; }
  Sample get(int64_t i) const override {
    check_index(i, size());
    const Place& p = places_[static_cast<size_t>(i)];
    const std::string where = files_.where(p);
    return sample_from_json(files_.read(p, [&](std::string_view text) { return parse_json(text, where); }), options_,
                            where);
  }

 private:
  Files files_;
  DataOptions options_;
  std::vector<Place> places_;
  SampleKind kind_ = SampleKind::text;
};

// A JSON file that is one list of records is read whole.
class JsonList : public Dataset {
 public:
  JsonList(const std::vector<fs::path>& paths, DataOptions options) : options_(std::move(options)) {
    for (const auto& path : paths) {
      const auto file = MappedFile::open(path);
      const auto text = view(file->bytes());
      check(text.size() <= size_t{1} << 30,
            "{} is larger than 1 GiB: write it as JSONL, one record a line, which is not read whole", path.string());
      Json json = parse_json(text.substr(text_begin(text, path.string())), path.string());
      if (json.is_object() && json.contains("data") && json["data"].is_array()) json = Json(json["data"]);
      check(json.is_array(), "{} must be a JSON list of records", path.string());
      for (size_t i = 0; i < json.size(); ++i) {
        where_.push_back(fmt::format("{}, record {}", path.string(), i + 1));
        records_.push_back(std::move(json[i]));
      }
    }
    if (!records_.empty()) options_.kind = to_string(kind_ = get(0).kind);
  }
  int64_t size() const override { return static_cast<int64_t>(records_.size()); }
  SampleKind kind() const override { return kind_; }
  Sample get(int64_t i) const override {
    check_index(i, size());
    return sample_from_json(records_[static_cast<size_t>(i)], options_, where_[static_cast<size_t>(i)]);
  }

 private:
  DataOptions options_;
  std::vector<Json> records_;
  std::vector<std::string> where_;
  SampleKind kind_ = SampleKind::text;
};

// One row of RFC 4180 at `at`, which moves behind its end. With `fields`, splits it. Quoted fields may hold separators,
// quotes (doubled) and line ends.
void csv_row(std::string_view text, size_t& at, char separator, std::vector<std::string>* fields,
             const std::string& where) {
  while (true) {
    std::string field;
    if (at < text.size() && text[at] == '"') {
      ++at;
      while (true) {
        const size_t quote = text.find('"', at);
        check(quote != std::string_view::npos, "{}: a quoted field is not closed", where);
        if (fields) field.append(text, at, quote - at);
        at = quote + 1;
        if (at >= text.size() || text[at] != '"') break;
        if (fields) field += '"';
        ++at;
      }
      check(at >= text.size() || text[at] == separator || text[at] == '\n' || text[at] == '\r',
            "{}: text follows a closing quote: a quote inside of a quoted field is written twice", where);
    } else {
      const char stops[] = {separator, '\n', '\r', 0};
      const size_t end = std::min(text.find_first_of(stops, at), text.size());
      if (fields) field = text.substr(at, end - at);
      at = end;
    }
    if (fields) fields->push_back(unicode::sanitize(field));
    if (at >= text.size()) return;
    const char c = text[at++];
    if (c == separator) continue;
    if (c == '\r' && at < text.size() && text[at] == '\n') ++at;
    return;
  }
}

class Csv : public Dataset {
 public:
  Csv(std::vector<fs::path> paths, DataOptions options, char separator)
      : files_(std::move(paths)), options_(std::move(options)), separator_(separator) {
    for (uint32_t f = 0; f < files_.paths().size(); ++f) {
      const auto file = files_.open(f);
      const auto text = view(file->bytes());
      const std::string name = files_.paths()[f].string();
      size_t at = text_begin(text, name);
      uint32_t line = 1;
      bool first = true;
      while (at < text.size()) {
        const size_t begin = at;
        const std::string where = fmt::format("{}:{}", name, line);
        std::vector<std::string> fields;
        csv_row(text, at, separator, first ? &fields : nullptr, where);
        const uint32_t row_line = line;
        line += static_cast<uint32_t>(std::count(text.begin() + static_cast<std::ptrdiff_t>(begin),
                                                 text.begin() + static_cast<std::ptrdiff_t>(at), '\n'));
        if (blank(text.substr(begin, at - begin))) continue;
        if (first) {
          first = false;
          if (!options_.header) {
            for (size_t i = 0; i < fields.size(); ++i) fields[i] = std::to_string(i);
          }
          for (size_t i = 0; i < fields.size(); ++i)
            check(std::count(fields.begin(), fields.end(), fields[i]) == 1, "{}: the column '{}' is named twice", where,
                  shown(fields[i]));
          if (f == 0) {
            names_ = fields;
          } else {
            check(fields == names_, "{}: its columns differ from those of {}", where, files_.paths()[0].string());
          }
          if (options_.header) continue;
        }
        places_.push_back({begin, at - begin, f, row_line});
      }
    }
    for (const auto& [role, column] : options_.columns)
      check(std::find(names_.begin(), names_.end(), column) != names_.end() || names_.empty() || role == "choices",
            "{} has no column '{}'; it has {}{}", files_.paths()[0].string(), column, list_of(names_, "and"),
            did_you_mean(column, names_));
    // One column without a usual name can only be the text.
    if (names_.size() == 1 && options_.columns.empty()) options_.columns["text"] = names_[0];
    if (!places_.empty()) options_.kind = to_string(kind_ = get(0).kind);
  }
  int64_t size() const override { return static_cast<int64_t>(places_.size()); }
  SampleKind kind() const override { return kind_; }
  Sample get(int64_t i) const override {
    check_index(i, size());
    const Place& p = places_[static_cast<size_t>(i)];
    const std::string where = files_.where(p);
    std::vector<std::string> fields;
    files_.read(p, [&](std::string_view text) {
      size_t at = 0;
      csv_row(text, at, separator_, &fields, where);
      return 0;
    });
    check(fields.size() == names_.size(), "{}: {} fields, but there are {} columns", where, fields.size(),
          names_.size());
    Json record = Json::object();
    for (size_t k = 0; k < fields.size(); ++k) record[names_[k]] = std::move(fields[k]);
    return sample_from_json(record, options_, where);
  }

 private:
  Files files_;
  DataOptions options_;
  char separator_;
  std::vector<std::string> names_;
  std::vector<Place> places_;
  SampleKind kind_ = SampleKind::text;
};

// --- Keys of records
// -------------------------------------------------------------------------------------------------------

using Names = std::initializer_list<const char*>;

// The value under the chosen column, or under the first usual name that is there.
const Json* find(const Json& record, const DataOptions& options, const char* role, Names names) {
  if (const auto chosen = options.columns.find(role); chosen != options.columns.end()) {
    const auto found = record.find(chosen->second);
    return found == record.end() ? nullptr : &*found;
  }
  for (const char* name : names) {
    const auto found = record.find(name);
    if (found != record.end() && !found->is_null()) return &*found;
  }
  return nullptr;
}

const Json* text_of(const Json& r, const DataOptions& o) {
  return find(r, o, "text", {"text", "content", "document", "body", "sentence"});
}
const Json* prompt_of(const Json& r, const DataOptions& o) {
  return find(r, o, "prompt", {"prompt", "instruction", "question", "query", "input", "source"});
}
const Json* completion_of(const Json& r, const DataOptions& o) {
  return find(r, o, "completion", {"completion", "response", "output", "answer", "target"});
}
const Json* messages_of(const Json& r, const DataOptions& o) {
  return find(r, o, "messages", {"messages", "conversations", "conversation", "chat", "dialog"});
}
const Json* question_of(const Json& r, const DataOptions& o) {
  return find(r, o, "question",
              {"question", "ctx", "query", "goal", "context", "prompt", "premise", "sentence", "stem"});
}
const Json* answer_of(const Json& r, const DataOptions& o) {
  return find(r, o, "answer",
              {"answer", "label", "gold", "answerKey", "answer_index", "answer_idx", "correct", "target"});
}
const Json* label_of(const Json& r, const DataOptions& o) {
  return find(r, o, "label", {"label", "labels", "class", "category"});
}

struct Choices {
  std::vector<std::string> texts, names;
  bool from_one = false;  ///< their keys count from 1, and so does the answer
};

std::optional<Choices> choices_of(const Json& record, const DataOptions& options, const std::string& where) {
  Choices out;
  const auto text = [&](const Json& j) {
    check(j.is_string(), "{}: a choice must be text, not {}", where, j.type_name());
    return j.get<std::string>();
  };
  // Columns of a CSV, or keys of their own.
  const auto spread = [&](const std::vector<std::string>& keys) {
    for (const auto& key : keys) {
      const auto found = record.find(key);
      if (found == record.end() || found->is_null()) break;
      out.texts.push_back(text(*found));
    }
    return !out.texts.empty();
  };
  if (const auto chosen = options.columns.find("choices");
      chosen != options.columns.end() && chosen->second.find(',') != std::string::npos) {
    std::vector<std::string> keys;
    for (size_t at = 0; at <= chosen->second.size();) {
      const size_t comma = std::min(chosen->second.find(',', at), chosen->second.size());
      keys.push_back(chosen->second.substr(at, comma - at));
      at = comma + 1;
    }
    spread(keys);
    check(out.texts.size() == keys.size(), "{}: not all of the columns {} are there", where, chosen->second);
    return out;
  }
  const Json* found = find(record, options, "choices", {"choices", "endings", "options", "answers"});
  if (!found) {
    if (spread({"A", "B", "C", "D", "E", "F", "G", "H"}) && out.texts.size() > 1) return out;
    out.texts.clear();
    if (spread({"sol1", "sol2"}) && out.texts.size() == 2) return out;
    for (const char* stem : {"option", "choice", "ending"}) {
      for (const int base : {0, 1}) {
        out.texts.clear();
        std::vector<std::string> keys;
        for (int i = base; i < 10; ++i) keys.push_back(stem + std::to_string(i));
        if (spread(keys) && out.texts.size() > 1) {
          out.from_one = base == 1;
          return out;
        }
      }
    }
    return std::nullopt;
  }
  Json unpacked;
  if (found->is_string() && found->get_ref<const std::string&>().starts_with("["))
    found = &(unpacked = parse_json(found->get_ref<const std::string&>(), where));
  if (found->is_object()) {
    // {"text": [...], "label": ["A", ...]}, or {"A": "...", "B": "..."}.
    if (found->contains("text") && (*found)["text"].is_array()) {
      for (const auto& t : (*found)["text"]) out.texts.push_back(text(t));
      if (found->contains("label") && (*found)["label"].is_array())
        for (const auto& n : (*found)["label"]) out.names.push_back(text(n));
    } else {
      for (const auto& [name, value] : found->items()) {
        out.names.push_back(name);
        out.texts.push_back(text(value));
      }
    }
  } else {
    check(found->is_array(), "{}: the choices must be a list, not {}", where, found->type_name());
    for (const auto& c : *found) {
      if (c.is_object() && c.contains("text")) {
        out.texts.push_back(text(c["text"]));
        if (c.contains("label") && c["label"].is_string()) out.names.push_back(c["label"].get<std::string>());
      } else {
        out.texts.push_back(text(c));
      }
    }
  }
  check(!out.texts.empty(), "{}: the list of choices is empty", where);
  check(out.names.empty() || out.names.size() == out.texts.size(), "{}: {} choices but {} labels of choices", where,
        out.texts.size(), out.names.size());
  return out;
}

std::optional<int64_t> whole_number(const Json& j) {
  if (j.is_number_unsigned()) {
    const auto v = j.get<uint64_t>();
    return v <= static_cast<uint64_t>(INT64_MAX) ? std::optional<int64_t>(static_cast<int64_t>(v)) : std::nullopt;
  }
  if (j.is_number_integer()) return j.get<int64_t>();
  if (j.is_number_float()) {
    const double d = j.get<double>();
    return d == std::floor(d) && std::fabs(d) < 9e15 ? std::optional<int64_t>(static_cast<int64_t>(d)) : std::nullopt;
  }
  if (j.is_string()) {
    const auto& s = j.get_ref<const std::string&>();
    const size_t digits = s.starts_with("-") ? 1 : 0;
    if (s.size() > digits && s.size() < 18 && s.find_first_not_of("0123456789", digits) == std::string::npos)
      return std::stoll(s);
  }
  return std::nullopt;
}

int64_t answer_index(const Json& answer, const Choices& choices, const std::string& where) {
  const auto count = static_cast<int64_t>(choices.texts.size());
  const auto among = [&](const std::vector<std::string>& list, const std::string& s) -> int64_t {
    const auto found = std::find(list.begin(), list.end(), s);
    return found == list.end() ? -1 : found - list.begin();
  };
  if (answer.is_string()) {
    const auto& s = answer.get_ref<const std::string&>();
    if (s.empty()) return -1;  // test sets without answers
    if (const int64_t i = among(choices.names, s); i >= 0) return i;
    if (const int64_t i = among(choices.texts, s); i >= 0 && !whole_number(answer)) return i;
    if (s.size() == 1 && s[0] >= 'A' && s[0] < 'A' + count) return s[0] - 'A';
    if (s.size() == 1 && s[0] >= 'a' && s[0] < 'a' + count) return s[0] - 'a';
  }
  if (const auto number = whole_number(answer)) {
    if (*number == -1 && !choices.from_one) return -1;
    const int64_t index = *number - choices.from_one;
    check(index >= 0 && index < count, "{}: the answer {} is none of the {} choices, which count from {}", where,
          *number, count, choices.from_one ? 1 : 0);
    return index;
  }
  fail("{}: the answer {} is neither the number, the letter nor the text of one of the {} choices", where,
       shown(answer.dump(-1, ' ', false, Json::error_handler_t::replace)), count);
}

Json chat_messages(const Json& found, const std::string& where) {
  Json unpacked;
  const Json* list = &found;
  if (found.is_string()) list = &(unpacked = parse_json(found.get_ref<const std::string&>(), where));
  check(list->is_array(), "{}: the messages must be a list like [{{\"role\": \"user\", \"content\": \"...\"}}], not {}",
        where, list->type_name());
  check(!list->empty(), "{}: the list of messages is empty", where);
  Json out = Json::array();
  for (size_t i = 0; i < list->size(); ++i) {
    const Json& m = (*list)[i];
    check(m.is_object(), "{}: message {} is no object like {{\"role\": \"user\", \"content\": \"...\"}}", where, i + 1);
    Json message = m;
    if (!m.contains("role") && m.contains("from") && m.contains("value") && m["from"].is_string()) {
      const std::string from = m["from"].get<std::string>();
      message.erase("from");
      message.erase("value");
      message["role"] = from == "human"                                     ? "user"
                        : from == "gpt" || from == "bot" || from == "model" ? "assistant"
                                                                            : from;
      message["content"] = m["value"];
    }
    check(message.contains("role") && message["role"].is_string(), "{}: message {} has no \"role\" that is text", where,
          i + 1);
    check(message.contains("content") || message.contains("tool_calls"), "{}: message {} has no \"content\"", where,
          i + 1);
    out.push_back(std::move(message));
  }
  return out;
}

std::string text_value(const Json& j, const char* what, const std::string& where) {
  check(j.is_string(), "{}: the {} must be text, not {}", where, what, j.type_name());
  return unicode::sanitize(j.get_ref<const std::string&>());
}

}  // namespace

std::string to_string(SampleKind kind) {
  switch (kind) {
    case SampleKind::text:
      return "text";
    case SampleKind::completion:
      return "completion";
    case SampleKind::chat:
      return "chat";
    case SampleKind::choice:
      return "choice";
    case SampleKind::image:
      return "image";
  }
  return "text";
}

Sample sample_from_json(const Json& record, const DataOptions& options, const std::string& where) {
  Sample sample;
  sample.where = where;
  if (record.is_string()) {
    check(options.kind == "auto" || options.kind == "text", "{}: a record of kind {} must be an object, not text",
          where, options.kind);
    sample.text = text_value(record, "text", where);
    return sample;
  }
  if (record.is_array() && (options.kind == "auto" || options.kind == "chat")) {
    sample.kind = SampleKind::chat;
    sample.messages = chat_messages(record, where);
    return sample;
  }
  check(record.is_object(), "{}: a record must be a JSON object, not {}", where, record.type_name());
  std::vector<std::string> keys;
  for (const auto& [key, value] : record.items()) keys.push_back(shown(key, 40));
  if (keys.size() > 12) keys.resize(12);
  const auto missing = [&](const char* what, const char* usual) {
    fail("{}: no {}: a record of this kind has {}, this one has {}", where, what, usual,
         keys.empty() ? "no keys" : list_of(keys, "and"));
  };

  const auto is = [&](const char* kind) { return options.kind == kind; };
  check(is("auto") || is("text") || is("completion") || is("chat") || is("choice"),
        "unknown kind of records '{}': it must be auto, text, completion, chat or choice", options.kind);

  if (is("chat") || (is("auto") && messages_of(record, options))) {
    const Json* messages = messages_of(record, options);
    if (!messages) missing("messages", "`messages`");
    sample.kind = SampleKind::chat;
    sample.messages = chat_messages(*messages, where);
    if (const Json* tools = find(record, options, "tools", {"tools"})) {
      sample.tools = tools->is_string() ? parse_json(tools->get_ref<const std::string&>(), where) : *tools;
      check(sample.tools.is_array() || sample.tools.is_null(), "{}: the tools must be a list", where);
    }
    return sample;
  }
  if (is("choice") || is("auto")) {
    const auto choices =
        question_of(record, options) || is("choice") ? choices_of(record, options, where) : std::nullopt;
    if (choices && question_of(record, options)) {
      sample.kind = SampleKind::choice;
      sample.prompt = text_value(*question_of(record, options), "question", where);
      sample.choices = choices->texts;
      for (auto& c : sample.choices) c = unicode::sanitize(c);
      if (const Json* answer = answer_of(record, options)) sample.answer = answer_index(*answer, *choices, where);
      return sample;
    }
    if (is("choice"))
      missing("question with choices", "`question` (or `ctx`), `choices` (or `endings`) and `answer` (or `label`)");
  }
  const Json *prompt = prompt_of(record, options), *completion = completion_of(record, options);
  if (is("completion") || (is("auto") && prompt && completion)) {
    if (!prompt || !completion) missing("prompt with completion", "`prompt` and `completion`");
    sample.kind = SampleKind::completion;
    sample.prompt = text_value(*prompt, "prompt", where);
    // Instructions may come with an input of their own.
    if (record.contains("instruction") && prompt == &record["instruction"] && record.contains("input") &&
        record["input"].is_string() && !record["input"].get_ref<const std::string&>().empty())
      sample.prompt += "\n\n" + text_value(record["input"], "input", where);
    sample.completion = text_value(*completion, "completion", where);
    return sample;
  }
  const Json* text = text_of(record, options);
  if (!text) missing("text", "`text`, or `prompt` and `completion`, or `messages`, or `question` and `choices`");
  sample.text = text_value(*text, "text", where);
  if (const Json* label = label_of(record, options)) {
    const auto number = whole_number(*label);
    check(number || label->is_string(), "{}: the label {} is neither a whole number nor text", where,
          shown(label->dump(-1, ' ', false, Json::error_handler_t::replace)));
    if (number) {
      sample.label = *number;
    } else {
      sample.label_name = text_value(*label, "label", where);
    }
  }
  return sample;
}

// --- Images
// ----------------------------------------------------------------------------------------------------------------

namespace {

class IdxData : public Dataset {
 public:
  IdxData(const fs::path& path, const DataOptions& options) : path_(path.string()), images_(read_idx(path)) {
    check(images_.shape.size() == 3 || images_.shape.size() == 4,
          "{}: images need 3 dimensions (number, height, width) or 4 (and channels), it has {}", path_,
          images_.shape.size());
    std::string labels = options.labels;
    if (labels.empty()) {
      std::string name = path.filename().string();
      const size_t at = name.find("images-idx3");
      if (at != std::string::npos) {
        name.replace(at, 11, "labels-idx1");
        for (const auto& candidate :
             {path.parent_path() / name,
              path.parent_path() / (name.ends_with(".gz") ? name.substr(0, name.size() - 3) : name + ".gz")})
          if (labels.empty() && fs::exists(candidate)) labels = candidate.string();
      }
    }
    if (labels.empty()) return;
    labels_ = read_idx(labels);
    check(labels_.shape.size() == 1 && labels_.shape[0] == images_.shape[0], "{} has {} labels for the {} images of {}",
          labels, labels_.shape[0], images_.shape[0], path_);
  }
  int64_t size() const override { return images_.shape[0]; }
  SampleKind kind() const override { return SampleKind::image; }
  Sample get(int64_t i) const override {
    check_index(i, size());
    Sample sample;
    sample.kind = SampleKind::image;
    sample.where = fmt::format("{}, image {}", path_, i);
    sample.image.height = images_.shape[1];
    sample.image.width = images_.shape[2];
    sample.image.channels = images_.shape.size() == 4 ? images_.shape[3] : 1;
    const auto bytes = static_cast<size_t>(sample.image.height * sample.image.width * sample.image.channels);
    const auto part = images_.data.subspan(static_cast<size_t>(i) * bytes, bytes);
    sample.image.pixels.assign(part.begin(), part.end());
    if (!labels_.shape.empty()) sample.label = labels_.data[static_cast<size_t>(i)];
    return sample;
  }

 private:
  std::string path_;
  IdxArray images_, labels_;
};

class ImageFiles : public Dataset {
 public:
  ImageFiles(std::vector<std::pair<fs::path, int64_t>> files, std::vector<std::string> classes, int channels)
      : files_(std::move(files)), classes_(std::move(classes)), channels_(channels) {}
  int64_t size() const override { return static_cast<int64_t>(files_.size()); }
  SampleKind kind() const override { return SampleKind::image; }
  std::vector<std::string> classes() const override { return classes_; }
  Sample get(int64_t i) const override {
    check_index(i, size());
    const auto& [path, label] = files_[static_cast<size_t>(i)];
    Sample sample;
    sample.kind = SampleKind::image;
    sample.where = path.string();
    sample.image = read_image(path, channels_);
    sample.label = label;
    if (label >= 0) sample.label_name = classes_[static_cast<size_t>(label)];
    return sample;
  }

 private:
  std::vector<std::pair<fs::path, int64_t>> files_;
  std::vector<std::string> classes_;
  int channels_;
};

std::vector<fs::path> sorted_entries(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    if (!it->path().filename().string().starts_with(".")) out.push_back(it->path());
  check(!error, "cannot list {}: {}", folder.string(), error.message());
  std::sort(out.begin(), out.end());
  return out;
}

// Files below a folder in the order of their paths. Links to folders are not followed: they may lead in circles.
void walk(const fs::path& folder, int depth, std::vector<fs::path>& out) {
  check(depth < 64, "{} lies more than 64 folders deep", folder.string());
  for (const auto& p : sorted_entries(folder)) {
    std::error_code error;
    if (fs::is_directory(fs::symlink_status(p, error))) {
      walk(p, depth + 1, out);
    } else if (fs::is_regular_file(p, error)) {
      out.push_back(p);
    }
  }
}

std::shared_ptr<const Dataset> image_folder(const fs::path& folder, const DataOptions& options) {
  std::vector<std::pair<fs::path, int64_t>> files;
  std::vector<std::string> classes;
  for (const auto& p : sorted_entries(folder)) {
    std::error_code error;
    if (!fs::is_directory(p, error)) continue;
    std::vector<fs::path> inside;
    walk(p, 1, inside);
    const size_t before = files.size();
    for (const auto& f : inside)
      if (is_image_name(f)) files.emplace_back(f, static_cast<int64_t>(classes.size()));
    if (files.size() > before) classes.push_back(p.filename().string());
  }
  std::vector<std::pair<fs::path, int64_t>> loose;
  for (const auto& p : sorted_entries(folder))
    if (fs::is_regular_file(p) && is_image_name(p)) loose.emplace_back(p, -1);
  check(files.empty() || loose.empty(),
        "{} has images both beside and inside of its class folders ({} and {}): it is unclear which class the former "
        "have",
        folder.string(), loose.empty() ? "" : loose[0].first.filename().string(), classes.empty() ? "" : classes[0]);
  if (files.empty()) files = std::move(loose);
  check(!files.empty(), "{} has no PNG or JPEG images", folder.string());
  return std::make_shared<ImageFiles>(std::move(files), std::move(classes), options.channels);
}

std::string format_of(const fs::path& path) {
  const std::string e = lower_extension(path);
  const std::string name = path.filename().string();
  if (e == ".jsonl" || e == ".ndjson") return "jsonl";
  if (e == ".json") return "json";
  if (e == ".csv") return "csv";
  if (e == ".tsv") return "tsv";
  if (is_image_name(path)) return "images";
  if (name.find("-idx") != std::string::npos || name.find(".idx") != std::string::npos) return "idx";
  check(e != ".gz" && e != ".zip" && e != ".xz" && e != ".bz2" && e != ".zst" && e != ".parquet" && e != ".arrow",
        "{}: {} files are not read: unpack or convert it to text, JSONL or CSV", path.string(), e);
  return "text";
}

std::vector<fs::path> expand(const std::string& pattern) {
  glob_t found{};
  const int state = ::glob(pattern.c_str(), 0, nullptr, &found);
  std::vector<fs::path> out;
  for (size_t i = 0; state == 0 && i < found.gl_pathc; ++i)
    if (fs::is_regular_file(found.gl_pathv[i])) out.emplace_back(found.gl_pathv[i]);
  ::globfree(&found);
  check(!out.empty(), "no file matches {}", pattern);
  return out;
}

}  // namespace

std::shared_ptr<const Dataset> Dataset::open(const std::string& location, const DataOptions& options) {
  static const std::vector<std::string> formats = {"auto", "text", "jsonl", "json", "csv", "tsv", "idx", "images"};
  check(std::find(formats.begin(), formats.end(), options.format) != formats.end(),
        "unknown data format '{}': it must be {}{}", options.format, list_of(formats),
        did_you_mean(options.format, formats));
  static const std::vector<std::string> roles = {"text",     "prompt",  "completion", "messages", "tools",
                                                 "question", "choices", "answer",     "label"};
  for (const auto& [role, column] : options.columns)
    check(std::find(roles.begin(), roles.end(), role) != roles.end(), "no column is needed for '{}', only for {}{}",
          role, list_of(roles), did_you_mean(role, roles));
  check(!options.document.empty(),
        "what separates documents is empty: it must be file, line, paragraph or a separator");
  std::error_code error;
  std::vector<fs::path> paths;
  std::string format = options.format;
  if (fs::is_directory(location, error)) {
    if (format == "images") return image_folder(location, options);
    std::vector<fs::path> all;
    walk(location, 0, all);
    check(!all.empty(), "the folder {} is empty", location);
    if (format == "auto") {
      const auto images = static_cast<size_t>(std::count_if(all.begin(), all.end(), is_image_name));
      if (images * 2 > all.size()) return image_folder(location, options);
      format = format_of(all[0]);
      for (const auto& p : all)
        check(format_of(p) == format,
              "{} holds files of several kinds ({} is {}, {} is {}): name a pattern such as '{}/*.txt', or a format",
              location, all[0].filename().string(), format, p.filename().string(), format_of(p), location);
    }
    paths = std::move(all);
  } else if (fs::exists(location, error)) {
    paths = {location};
  } else if (location.find_first_of("*?[") != std::string::npos) {
    paths = expand(location);
  } else {
    std::vector<std::string> near;
    const fs::path parent = fs::path(location).has_parent_path() ? fs::path(location).parent_path() : fs::path(".");
    if (fs::is_directory(parent, error))
      for (const auto& p : sorted_entries(parent)) near.push_back(p.filename().string());
    fail("there is no file or folder {}{}", location, did_you_mean(fs::path(location).filename().string(), near));
  }
  if (format == "auto") {
    format = format_of(paths[0]);
    for (const auto& p : paths)
      check(format_of(p) == format, "{} and {} are of different formats: name one", paths[0].string(), p.string());
  }
  if (format == "text") return std::make_shared<TextData>(std::move(paths), options.document);
  if (format == "jsonl") return std::make_shared<JsonLines>(std::move(paths), options);
  if (format == "json") return std::make_shared<JsonList>(paths, options);
  if (format == "csv" || format == "tsv")
    return std::make_shared<Csv>(std::move(paths), options, format == "csv" ? ',' : '\t');
  if (format == "idx") {
    check(paths.size() == 1, "{} is {} files: name the one with the images", location, paths.size());
    return std::make_shared<IdxData>(paths[0], options);
  }
  std::vector<std::pair<fs::path, int64_t>> files;
  for (auto& p : paths) files.emplace_back(std::move(p), -1);
  return std::make_shared<ImageFiles>(std::move(files), std::vector<std::string>(), options.channels);
}

// --- Views
// -----------------------------------------------------------------------------------------------------------------

namespace {

class Subset : public Dataset {
 public:
  Subset(DatasetPtr data, std::vector<int64_t> indices) : data_(std::move(data)), indices_(std::move(indices)) {
    for (const int64_t i : indices_) check_index(i, data_->size());
  }
  int64_t size() const override { return static_cast<int64_t>(indices_.size()); }
  SampleKind kind() const override { return data_->kind(); }
  std::vector<std::string> classes() const override { return data_->classes(); }
  Sample get(int64_t i) const override {
    check_index(i, size());
    return data_->get(indices_[static_cast<size_t>(i)]);
  }

 private:
  DatasetPtr data_;
  std::vector<int64_t> indices_;
};

class Joined : public Dataset {
 public:
  explicit Joined(std::vector<DatasetPtr> parts) : parts_(std::move(parts)) {
    check(!parts_.empty(), "nothing to put together");
    for (const auto& p : parts_) {
      check(p->kind() == parts_[0]->kind() || p->size() == 0, "data of kinds {} and {} cannot be put together",
            to_string(parts_[0]->kind()), to_string(p->kind()));
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) + p->size());
    }
  }
  int64_t size() const override { return ends_.back(); }
  SampleKind kind() const override { return parts_[0]->kind(); }
  std::vector<std::string> classes() const override { return parts_[0]->classes(); }
  Sample get(int64_t i) const override {
    check_index(i, size());
    const auto part = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), i) - ends_.begin());
    return parts_[part]->get(i - (part ? ends_[part - 1] : 0));
  }

 private:
  std::vector<DatasetPtr> parts_;
  std::vector<int64_t> ends_;
};

}  // namespace

DatasetPtr subset(DatasetPtr data, std::vector<int64_t> indices) {
  return std::make_shared<Subset>(std::move(data), std::move(indices));
}

DatasetPtr shuffled(DatasetPtr data, uint64_t seed) {
  RandomStream stream(seed, "data.shuffle");
  auto order = stream.permutation(data->size());
  return subset(std::move(data), std::move(order));
}

std::pair<DatasetPtr, DatasetPtr> split(DatasetPtr data, double fraction, uint64_t seed) {
  check(fraction >= 0 && fraction <= 1, "the held-out fraction {} is not between 0 and 1", fraction);
  const int64_t size = data->size();
  auto held = static_cast<int64_t>(std::llround(fraction * static_cast<double>(size)));
  if (size >= 2 && fraction > 0 && fraction < 1) held = std::clamp<int64_t>(held, 1, size - 1);
  RandomStream stream(seed, "data.split");
  auto order = stream.permutation(size);
  std::vector<int64_t> out(order.begin(), order.begin() + held), rest(order.begin() + held, order.end());
  std::sort(out.begin(), out.end());
  std::sort(rest.begin(), rest.end());
  return {subset(data, std::move(rest)), subset(data, std::move(out))};
}

DatasetPtr concatenate(std::vector<DatasetPtr> parts) {
  return std::make_shared<Joined>(std::move(parts));
}

}  // namespace moiety
