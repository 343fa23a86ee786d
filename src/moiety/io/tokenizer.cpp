#include "moiety/io/tokenizer.h"

#include <algorithm>

#include "moiety/io/tokenizer_files.h"
#include "moiety/io/tokenizer_pipeline.h"
#include "moiety/io/unicode.h"

namespace moiety {
namespace tokenizer {

// ---- Field ----

void Field::expected(std::string_view what) const {
  std::string shown;
  // A huge value would make a huge message.
  if (value_->is_primitive())
    shown = value_->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).substr(0, 60);
  fail("{}: expected {}, found {}{}{}.", where_, what, value_->type_name(), shown.empty() ? "" : " ", shown);
}
Field Field::at(const char* key) const {
  if (!value_->is_object()) expected("an object");
  const auto it = value_->find(key);
  check(it != value_->end(), "{}: the key \"{}\" is missing.", where_, key);
  return Field(*it, where_.ends_with(':') ? where_ + " " + key : where_ + "." + key);
}
Field Field::at(size_t index) const {
  return Field(array().at(index), fmt::format("{}[{}]", where_, index));
}
std::string Field::string() const {
  if (!value_->is_string()) expected("a string");
  return value_->get_ref<const std::string&>();
}
bool Field::boolean() const {
  if (!value_->is_boolean()) expected("true or false");
  return value_->get<bool>();
}
int64_t Field::integer() const {
  if (!value_->is_number_integer()) expected("an integer");
  if (value_->is_number_unsigned() && value_->get<uint64_t>() > INT64_MAX) expected("an integer below 2^63");
  return value_->get<int64_t>();
}
double Field::number() const {
  if (!value_->is_number()) expected("a number");
  return value_->get<double>();
}
char32_t Field::character(const char* key) const {
  const Field field = at(key);
  const std::string s = field.string();
  if (s.empty() || unicode::well_formed(s, 0) != static_cast<int>(s.size())) field.expected("one character");
  size_t i = 0;
  return unicode::next(s, i);
}
const nlohmann::json::array_t& Field::array() const {
  if (!value_->is_array()) expected("a list");
  return value_->get_ref<const nlohmann::json::array_t&>();
}
const nlohmann::json::object_t& Field::object() const {
  if (!value_->is_object()) expected("an object");
  return value_->get_ref<const nlohmann::json::object_t&>();
}

// ---- Pipeline ----

std::string_view Pipeline::text_of(int64_t id) const {
  if (const auto it = added_by_id_.find(id); it != added_by_id_.end()) return added_[it->second].shown;
  return vocabulary_.has(id) ? vocabulary_.pieces[static_cast<size_t>(id)] : std::string_view();
}

std::string Pipeline::piece(int64_t id) const {
  const auto text = text_of(id);
  check(text.data() != nullptr, "{}: no token has the id {}; ids go from 0 to {}.", where_, id, size_ - 1);
  return std::string(text);
}

std::optional<int64_t> Pipeline::id(std::string_view piece) const {
  if (const auto it = added_by_content_.find(std::string(piece)); it != added_by_content_.end())
    return added_[it->second].id;
  const int32_t id = vocabulary_.ids.find(piece);
  return id >= 0 ? std::optional<int64_t>(id) : std::nullopt;
}

void Pipeline::add(std::vector<AddedToken> tokens) {
  // New ids follow the number of pieces (not the largest id), or the largest id of an added token.
  const auto pieces = static_cast<int64_t>(vocabulary_.ids.size());
  int64_t next = pieces;
  for (const auto& t : added_)
    if (t.id >= pieces || pieces == 0) next = std::max(next, t.id + 1);
  for (auto& token : tokens) {
    if (token.content.empty()) continue;
    const auto known = id(token.content);
    token.id = known ? *known : next++;
    token.shown = token.content;
    if (token.normalized && normalizer_) {
      Chunk chunk{token.content, 0, false, -1};
      normalizer_->apply(chunk);
      token.shown = std::move(chunk.text);
    }
    size_t index = added_.size();
    if (const auto it = added_by_content_.find(token.content); it != added_by_content_.end()) index = it->second;
    added_by_content_[token.content] = index;
    added_by_id_[token.id] = index;
    if (index == added_.size())
      added_.push_back(std::move(token));
    else
      added_[index] = std::move(token);
  }
}

void Pipeline::finish() {
  size_ = static_cast<int64_t>(vocabulary_.pieces.size());
  std::vector<std::pair<std::string_view, int32_t>> raw, normalized;
  std::unordered_map<std::string_view, bool> special;
  for (size_t i = 0; i < added_.size(); ++i) {
    const auto& t = added_[i];
    size_ = std::max(size_, t.id + 1);
    if (t.special) special[t.content] = true;
    auto& to = t.normalized ? normalized : raw;
    if (const std::string_view text = t.normalized ? t.shown : t.content; !text.empty())
      to.emplace_back(text, static_cast<int32_t>(i));
  }
  // Of equal texts the first token wins.
  std::reverse(raw.begin(), raw.end());
  std::reverse(normalized.begin(), normalized.end());
  raw_.build(std::move(raw));
  normalized_.build(std::move(normalized));
  // What counts when special tokens are skipped is the text of an id, as in the tokenizers package.
  skip_.assign(static_cast<size_t>(size_), false);
  for (const auto& [content, yes] : special)
    if (const int32_t v = vocabulary_.ids.find(content); v >= 0) skip_[static_cast<size_t>(v)] = true;
  for (const auto& t : added_) skip_[static_cast<size_t>(t.id)] = special.count(t.shown) != 0;
  for (const auto& t : templates_)
    for (const int64_t id : t)
      check(id == kSequence || text_of(id).data() != nullptr,
            "{}: the post-processor adds the id {}, which no token has; ids go from 0 to {}.", where_, id, size_ - 1);
}

void Pipeline::split_added(std::vector<Chunk>& chunks, const Trie& trie, bool parse_special) const {
  const bool none = trie.empty();
  std::vector<Chunk> out;
  out.reserve(chunks.size());
  for (Chunk& chunk : chunks) {
    if (chunk.token >= 0) {
      out.push_back(std::move(chunk));
      continue;
    }
    if (chunk.text.empty()) continue;
    const std::string_view text = chunk.text;
    const auto cut = [&](size_t begin, size_t end, int64_t token) {
      if (begin >= end) return;
      Chunk& c = out.emplace_back();
      c.token = token;
      if (token >= 0) return;
      c.text = text.substr(begin, end - begin);
      c.zero = begin < chunk.zero ? std::min(chunk.zero, end) - begin : 0;
      c.first = c.zero > 0;
    };
    size_t done = 0;
    bool any = false;
    for (size_t at = 0; !none && at < text.size();) {
      // The longest token that starts here.
      uint32_t node = 0;
      int32_t found = -1;
      size_t stop = at;
      for (size_t end = at; end < text.size();) {
        node = trie.child(node, static_cast<unsigned char>(text[end]));
        if (node == 0) break;
        ++end;
        if (trie.value(node) >= 0) {
          found = trie.value(node);
          stop = end;
        }
      }
      if (found < 0) {
        ++at;
        continue;
      }
      size_t start = at;
      at = stop;
      const AddedToken& token = added_[static_cast<size_t>(found)];
      if (!parse_special && token.special) continue;
      if (token.single_word) {
        size_t behind = stop;
        if (start > 0 && unicode::is_word(unicode::previous(text, start))) continue;
        if (stop < text.size() && unicode::is_word(unicode::next(text, behind))) continue;
      }
      if (token.lstrip) {
        while (start > done) {
          if (!unicode::is_white_space(unicode::previous(text, start))) break;
          do --start;
          while ((static_cast<unsigned char>(text[start]) & 0xC0) == 0x80);
        }
        start = std::max(start, done);
      }
      if (token.rstrip)
        for (size_t end = stop; end < text.size(); stop = end)
          if (!unicode::is_white_space(unicode::next(text, end))) break;
      cut(done, start, -1);
      cut(start, stop, token.id);
      done = stop;
      any = true;
    }
    if (any) {
      cut(done, text.size(), -1);
    } else {
      chunk.first = chunk.zero > 0;
      out.push_back(std::move(chunk));
    }
  }
  chunks.swap(out);
}

std::unique_ptr<Scratch> Pipeline::take_scratch() const {
  const std::lock_guard lock(mutex_);
  if (scratch_.empty()) return std::make_unique<Scratch>();
  auto scratch = std::move(scratch_.back());
  scratch_.pop_back();
  return scratch;
}
void Pipeline::give_scratch(std::unique_ptr<Scratch> scratch) const {
  // A long word leaves large buffers behind: they are not kept.
  if (scratch->symbols.capacity() > 1 << 16) scratch->symbols = {};
  if (scratch->heap.capacity() > 1 << 16) scratch->heap = {};
  if (scratch->scored.capacity() > 1 << 16) scratch->scored = {};
  const std::lock_guard lock(mutex_);
  scratch_.push_back(std::move(scratch));
}

std::vector<int64_t> Pipeline::encode(std::string_view text, bool add_special, bool parse_special) const {
  std::vector<int64_t> ids;
  std::vector<Chunk> chunks(1);
  chunks[0].text = unicode::sanitize(text);
  if (!chunks[0].text.empty()) chunks[0].zero = unicode::char_length(static_cast<unsigned char>(chunks[0].text[0]));
  chunks[0].first = true;
  split_added(chunks, raw_, parse_special);
  if (normalizer_)
    for (Chunk& c : chunks)
      if (c.token < 0) normalizer_->apply(c);
  split_added(chunks, normalized_, parse_special);
  if (pre_tokenizer_) pre_tokenizer_->apply(chunks);
  auto scratch = take_scratch();
  for (const Chunk& c : chunks) {
    if (c.token >= 0)
      ids.push_back(c.token);
    else if (!c.text.empty())
      model_->tokenize(c.text, *scratch, ids);
  }
  give_scratch(std::move(scratch));
  if (add_special)
    for (const Template& t : templates_) {
      std::vector<int64_t> out;
      out.reserve(ids.size() + t.size());
      for (const int64_t id : t) {
        if (id == kSequence)
          out.insert(out.end(), ids.begin(), ids.end());
        else
          out.push_back(id);
      }
      ids = std::move(out);
    }
  return ids;
}

namespace {

class Sink : public Stage {
 public:
  void push(std::string_view token, bool) override { text += token; }
  void finish() override {}
  std::string text;
};

/// Without a decoder the tokens are set apart by spaces.
class SpaceStage : public Stage {
 public:
  void push(std::string_view token, bool joined) override {
    if (!first_ && !joined) next->push(" ", true);
    first_ = false;
    next->push(token, true);
  }

 private:
  bool first_ = true;
};

class PipelineDecoding : public Tokenizer::Decoding {
 public:
  PipelineDecoding(const Pipeline& pipeline, bool skip_special) : pipeline_(pipeline), skip_special_(skip_special) {
    if (pipeline.decoder_)
      pipeline.decoder_->stages(stages_);
    else
      stages_.push_back(std::make_unique<SpaceStage>());
    for (size_t i = 0; i < stages_.size(); ++i)
      stages_[i]->next = i + 1 < stages_.size() ? stages_[i + 1].get() : &sink_;
    first_ = stages_.empty() ? &sink_ : stages_[0].get();
  }
  void feed(int64_t id) {
    const auto text = pipeline_.text_of(id);
    if (text.data() == nullptr || (skip_special_ && pipeline_.is_special(id))) return;
    first_->push(text, false);
  }
  std::string push(int64_t id) override {
    feed(id);
    return std::exchange(sink_.text, "");
  }
  std::string flush() override {
    first_->finish();
    return std::exchange(sink_.text, "");
  }

 private:
  const Pipeline& pipeline_;
  bool skip_special_;
  std::vector<std::unique_ptr<Stage>> stages_;
  Sink sink_;
  Stage* first_;
};

}  // namespace

std::unique_ptr<Tokenizer::Decoding> Pipeline::decoding(bool skip_special) const {
  return std::make_unique<PipelineDecoding>(*this, skip_special);
}

std::string Pipeline::decode(std::span<const int64_t> ids, bool skip_special) const {
  PipelineDecoding decoding(*this, skip_special);
  for (const int64_t id : ids) decoding.feed(id);
  return decoding.flush();
}

// ---- tokenizer.json ----

namespace {

AddedToken added_token(const Field& field) {
  AddedToken t;
  t.content = field.string("content");
  t.special = field.boolean("special", false);
  t.single_word = field.boolean("single_word", false);
  t.lstrip = field.boolean("lstrip", false);
  t.rstrip = field.boolean("rstrip", false);
  t.normalized = field.boolean("normalized", !t.special);
  if (field.has("id")) {
    const Field id = field.at("id");
    if (id.integer() < 0 || id.integer() > INT32_MAX) id.expected("an id from 0 to 2147483647");
  }
  return t;
}

void read_vocabulary(const Field& field, Vocabulary& vocabulary) {
  std::vector<std::pair<std::string_view, int64_t>> entries;
  const auto& object = field.object();
  entries.reserve(object.size());
  for (const auto& [piece, id] : object) {
    if (!id.is_number_integer())
      Field(id, field.where() + "[\"" + piece.substr(0, 60) + "\"]").expected("an integer id");
    entries.emplace_back(piece, Field(id, field.where()).integer());
  }
  vocabulary.assign(entries, field.where());
}

std::string optional_string(const Field& field, const char* key) {
  return field.has(key) ? field.string(key) : "";
}

void read_bpe(const Field& model, Pipeline& p) {
  read_vocabulary(model.at("vocab"), p.vocabulary_);
  BpeOptions options;
  options.unk = optional_string(model, "unk_token");
  options.prefix = optional_string(model, "continuing_subword_prefix");
  options.suffix = optional_string(model, "end_of_word_suffix");
  options.fuse_unk = model.boolean("fuse_unk", false);
  options.byte_fallback = model.boolean("byte_fallback", false);
  options.ignore_merges = model.boolean("ignore_merges", false);
  const Field list = model.at("merges");
  Merges merges;
  merges.reserve(list.array().size());
  for (size_t i = 0; i < list.array().size(); ++i) {
    const auto& merge = list.array()[i];
    if (merge.is_string()) {
      const std::string_view s = merge.get_ref<const std::string&>();
      if (s.starts_with("#version")) continue;
      const size_t space = s.find(' ');
      if (space == std::string_view::npos || s.find(' ', space + 1) != std::string_view::npos)
        list.at(i).expected("two pieces with one space between");
      merges.emplace_back(s.substr(0, space), s.substr(space + 1));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      merges.emplace_back(merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>());
    } else {
      list.at(i).expected("\"left right\" or [\"left\", \"right\"]");
    }
  }
  if (const auto unk = p.vocabulary_.ids.find(options.unk); unk >= 0 && !options.unk.empty()) p.unk_ = unk;
  p.kind_ = options.byte_fallback ? "BPE (byte fallback)" : "BPE";
  p.model_ = make_bpe(p.vocabulary_, merges, std::move(options), list.where());
}

void read_unigram(const Field& model, Pipeline& p) {
  const Field list = model.at("vocab");
  std::vector<std::pair<std::string_view, int64_t>> entries;
  std::vector<double> scores;
  entries.reserve(list.array().size());
  scores.reserve(list.array().size());
  for (const auto& entry : list.array()) {
    if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number())
      list.at(entries.size()).expected("[\"piece\", score]");
    entries.emplace_back(entry[0].get_ref<const std::string&>(), static_cast<int64_t>(entries.size()));
    scores.push_back(entry[1].get<double>());
  }
  p.vocabulary_.assign(entries, list.where());
  if (model.has("unk_id")) p.unk_ = model.at("unk_id").integer();
  p.kind_ = "Unigram";
  p.model_ =
      make_unigram(p.vocabulary_, std::move(scores), p.unk_, model.boolean("byte_fallback", false), model.where());
}

void read_model(const Field& model, Pipeline& p) {
  std::string type;
  if (model.has("type"))
    type = model.string("type");
  else if (model.has("merges"))
    type = "BPE";
  else if (model.has("vocab") && model.at("vocab").json().is_array())
    type = "Unigram";
  else if (model.has("max_input_chars_per_word"))
    type = "WordPiece";
  else
    type = "WordLevel";
  if (type == "BPE") return read_bpe(model, p);
  if (type == "Unigram") return read_unigram(model, p);
  if (type == "WordPiece" || type == "WordLevel") {
    read_vocabulary(model.at("vocab"), p.vocabulary_);
    const std::string unk = model.string("unk_token", type == "WordPiece" ? "[UNK]" : "<unk>");
    if (const auto id = p.vocabulary_.ids.find(unk); id >= 0) p.unk_ = id;
    p.kind_ = type;
    if (type == "WordLevel") {
      p.model_ = make_wordlevel(p.vocabulary_, unk, model.where());
      return;
    }
    const int64_t longest = model.integer("max_input_chars_per_word", 100);
    check(longest >= 0, "{}: max_input_chars_per_word is {}; it must not be negative.", model.where(), longest);
    p.model_ = make_wordpiece(p.vocabulary_, unk, model.string("continuing_subword_prefix", "##"),
                              static_cast<size_t>(longest), model.where());
    return;
  }
  model.at("type").expected("BPE, Unigram, WordPiece or WordLevel");
}

Template read_template(const Field& field) {
  Template out;
  const Field single = field.at("single");
  const auto special = [&](const std::string& name, const Field& place) {
    const Field tokens = field.at("special_tokens");
    if (!tokens.has(name.c_str())) place.expected("the name of an entry of special_tokens");
    const Field ids = tokens.at(name.c_str()).at("ids");
    for (size_t i = 0; i < ids.array().size(); ++i) {
      const int64_t id = ids.at(i).integer();
      if (id < 0) ids.at(i).expected("an id, 0 or more");
      out.push_back(id);
    }
  };
  const auto short_form = [&](std::string s, const Field& place) {
    s = s.substr(0, s.find(':'));
    if (!s.starts_with('$')) return special(s, place);
    if (s == "$B" || s == "$b") place.expected("$A: a single sequence has no $B");
    out.push_back(kSequence);
  };
  if (single.json().is_string()) {
    std::istringstream words(single.string());
    for (std::string w; words >> w;) short_form(w, single);
    return out;
  }
  for (size_t i = 0; i < single.array().size(); ++i) {
    const Field part = single.at(i);
    if (part.json().is_string()) {
      short_form(part.string(), part);
    } else if (part.has("Sequence")) {
      const Field id = part.at("Sequence").at("id");
      if (id.string() != "A") id.expected("\"A\": a single sequence has no other");
      out.push_back(kSequence);
    } else {
      const Field id = part.at("SpecialToken").at("id");
      special(id.string(), id);
    }
  }
  return out;
}

void read_post_processor(const Field& field, Pipeline& p, int depth) {
  check(depth < kMaxDepth, "{}: sequences are nested more than {} deep.", field.where(), kMaxDepth);
  if (field.json().is_null()) return;
  const std::string type = field.string("type");
  if (type == "Sequence") {
    const Field list = field.at("processors");
    for (size_t i = 0; i < list.array().size(); ++i) read_post_processor(list.at(i), p, depth + 1);
  } else if (type == "TemplateProcessing") {
    p.templates_.push_back(read_template(field));
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    const auto id = [&](const char* key) {
      const Field pair = field.at(key);
      if (pair.array().size() != 2) pair.expected("[\"token\", id]");
      const int64_t value = pair.at(1).integer();
      if (value < 0) pair.at(1).expected("an id, 0 or more");
      return value;
    };
    p.templates_.push_back({id("cls"), kSequence, id("sep")});
  } else if (type != "ByteLevel") {
    field.at("type").expected("Sequence, TemplateProcessing, BertProcessing, RobertaProcessing or ByteLevel");
  }
}

bool mentions_byte_level(const nlohmann::json& part, int depth = 0) {
  if (depth >= kMaxDepth || !part.is_object()) return false;
  if (part.value("type", nlohmann::json()) == "ByteLevel") return true;
  for (const char* key : {"normalizers", "pretokenizers"})
    if (part.contains(key) && part[key].is_array())
      for (const auto& inner : part[key])
        if (mentions_byte_level(inner, depth + 1)) return true;
  return false;
}

/// "<s>" or {"content": "<s>", ...}; "" for null.
std::string token_text(const Field& field) {
  if (field.json().is_null()) return "";
  if (field.json().is_object()) return field.string("content");
  return field.string();
}

}  // namespace

void apply_config(Pipeline& p, const nlohmann::json& config, const std::string& where) {
  if (config.is_null()) return;
  const Field field(config, where);
  field.object();
  if (field.has("added_tokens_decoder")) {
    const Field list = field.at("added_tokens_decoder");
    std::vector<std::pair<int64_t, AddedToken>> tokens;
    for (const auto& [key, value] : list.object()) {
      check(!key.empty() && key.size() < 10 &&
                std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; }),
            "{}: \"{}\" is not a token id.", list.where(), key.substr(0, 60));
      tokens.emplace_back(std::stoll(key), added_token(Field(value, list.where() + "[\"" + key + "\"]")));
    }
    std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<AddedToken> in_order;
    for (auto& [id, token] : tokens) in_order.push_back(std::move(token));
    p.add(std::move(in_order));
  }
  const auto special = [&](const char* key, std::optional<int64_t>& slot) {
    if (!field.has(key)) return;
    const std::string text = token_text(field.at(key));
    if (const auto id = p.id(text)) slot = id;
  };
  special("bos_token", p.bos_);
  special("eos_token", p.eos_);
  special("pad_token", p.pad_);
  special("unk_token", p.unk_);
  const bool adds =
      std::any_of(p.templates_.begin(), p.templates_.end(), [](const Template& t) { return t.size() > 1; });
  const auto wanted = [&](const char* key) {
    return field.has(key) && field.at(key).json().is_boolean() && field.boolean(key, false);
  };
  const bool bos = wanted("add_bos_token") && p.bos_, eos = wanted("add_eos_token") && p.eos_;
  if (!adds && (bos || eos)) {
    Template t;
    if (bos) t.push_back(*p.bos_);
    t.push_back(kSequence);
    if (eos) t.push_back(*p.eos_);
    p.templates_.push_back(std::move(t));
  }
  if (field.has("chat_template")) {
    const Field chat = field.at("chat_template");
    if (chat.json().is_string()) {
      p.chat_template_ = chat.string();
    } else {
      // Several templates by name: the one called default counts, else the first.
      for (size_t i = 0; i < chat.array().size(); ++i) {
        const Field entry = chat.at(i);
        if (i == 0 || entry.string("name") == "default") p.chat_template_ = entry.string("template");
      }
    }
  }
}

namespace {

std::shared_ptr<const Tokenizer> build(const nlohmann::json& tokenizer, const nlohmann::json& config,
                                       const std::string& where, const std::string& chat_template) {
  auto p = std::make_shared<Pipeline>();
  p->where_ = where;
  const Field file(tokenizer, where + ":");
  file.object();
  check(file.has("model"), "{}: there is no \"model\"; a Hugging Face tokenizer.json has one.", where);
  const nlohmann::json null;
  const auto part = [&](const char* key) { return file.has(key) ? file.at(key) : Field(null, where); };
  read_model(file.at("model"), *p);
  p->normalizer_ = make_normalizer(part("normalizer"));
  p->pre_tokenizer_ = make_pre_tokenizer(part("pre_tokenizer"));
  p->decoder_ = make_decoder(part("decoder"));
  read_post_processor(part("post_processor"), *p, 0);
  if (p->kind_ == "BPE")
    p->kind_ = mentions_byte_level(part("pre_tokenizer").json()) || mentions_byte_level(part("normalizer").json())
                   ? "BPE (byte-level)"
                   : "BPE";
  if (file.has("added_tokens")) {
    const Field list = file.at("added_tokens");
    std::vector<AddedToken> tokens;
    for (size_t i = 0; i < list.array().size(); ++i) tokens.push_back(added_token(list.at(i)));
    p->add(std::move(tokens));
  }
  apply_config(*p, config, "tokenizer_config.json:");
  if (!chat_template.empty()) p->chat_template_ = chat_template;
  p->finish();
  return p;
}

std::shared_ptr<const Tokenizer> of_files(const HfTokenizer& files, const std::filesystem::path& where) {
  return build(files.tokenizer, files.config, where.string(), files.chat_template);
}

/// nullptr when the folder has none.
std::shared_ptr<const Tokenizer> of_folder(const std::filesystem::path& folder) {
  const auto files = read_tokenizer_files(folder);
  if (!files) return nullptr;
  const auto json = folder / "tokenizer.json";
  std::error_code error;
  return of_files(*files, std::filesystem::exists(json, error) ? json : folder);
}

}  // namespace
}  // namespace tokenizer

std::shared_ptr<const Tokenizer> Tokenizer::from_json(const nlohmann::json& tokenizer, const nlohmann::json& config,
                                                      const std::string& where) {
  return tokenizer::build(tokenizer, config, where, "");
}

std::shared_ptr<const Tokenizer> Tokenizer::load(const Checkpoint& checkpoint) {
  if (const auto file = checkpoint.gguf()) return from_gguf(*file);
  std::error_code error;
  auto folder = checkpoint.path();
  if (!std::filesystem::is_directory(folder, error)) folder = folder.parent_path();
  if (auto found = tokenizer::of_folder(folder)) return found;
  fail("{}: there is no tokenizer: looked for {}, for vocab.json with merges.txt, for vocab.txt and for GGUF metadata.",
       checkpoint.path().string(), (folder / "tokenizer.json").string());
}

std::shared_ptr<const Tokenizer> Tokenizer::open(const std::string& location) {
  const auto path = resolve_model(location);
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    if (auto found = tokenizer::of_folder(path)) return found;
  const bool file = std::filesystem::is_regular_file(path, error);
  if (file && path.extension() == ".json") return tokenizer::of_files(read_tokenizer_json(path), path);
  if (file && path.extension() == ".gguf") return from_gguf(*GgufFile::open(path));
  return load(*Checkpoint::open(location));
}

}  // namespace moiety
