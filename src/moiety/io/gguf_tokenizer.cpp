#include "moiety/io/gguf_tokenizer.h"

#include <algorithm>
#include <optional>
#include <unordered_map>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/pre_tokenizers.h"

using nlohmann::json;

namespace moiety {
namespace {

enum TokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };
constexpr const char* kMetaspace = "\xe2\x96\x81";  // U+2581

// ---- tokenizer.json -> GGUF ----

/// "<s>", or {"content": "<s>", ...}; "" for anything else.
std::string token_text(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string())
    return value["content"].get<std::string>();
  return "";
}

bool is_byte_token(const std::string& t) {
  return t.size() == 6 && t.starts_with("<0x") && t[5] == '>' && std::isxdigit(static_cast<unsigned char>(t[3])) &&
         std::isxdigit(static_cast<unsigned char>(t[4]));
}

const json& member(const json& object, const char* key) {
  static const json null;
  if (!object.is_object()) return null;
  const auto it = object.find(key);
  return it == object.end() ? null : *it;
}

/// Visits every step of nested Sequences.
template <class F>
void each_step(const json& node, const char* list, const F& visit) {
  if (!node.is_object()) return;
  if (member(node, list).is_array()) {
    for (const auto& step : node[list])
      if (step.is_object()) visit(step);
  } else {
    visit(node);
  }
}

std::pair<std::string, std::string> merge_of(const json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  check(merge.is_string(), "tokenizer.json: model.merges must hold pairs of strings");
  const std::string text = merge.get<std::string>();
  const size_t space = text.find(' ');
  check(space != std::string::npos && space > 0 && space + 1 < text.size(),
        "tokenizer.json: merge '{}' is not two pieces", shown(text));
  return {text.substr(0, space), text.substr(space + 1)};
}

struct Tokens {
  std::vector<std::string> text;
  std::vector<float> scores;
  std::vector<int32_t> types;
  std::unordered_map<std::string, int64_t> ids;

  void put(int64_t id, const std::string& token, int32_t type, float score) {
    check(id >= 0 && id < (int64_t{1} << 24), "tokenizer.json: token '{}' has id {}, which cannot be", shown(token),
          id);
    if (id >= static_cast<int64_t>(text.size())) {
      text.resize(static_cast<size_t>(id) + 1);
      scores.resize(text.size(), -10000.0f);
      types.resize(text.size(), kUnused);
    }
    const auto at = static_cast<size_t>(id);
    text[at] = token, types[at] = type, scores[at] = score;
    ids[token] = id;
  }
};

}  // namespace

std::vector<std::string> write_gguf_tokenizer(GgufWriter& writer, const HfTokenizer& hf, const json& model_config,
                                              int64_t vocabulary) {
  std::vector<std::string> warnings;
  const json& model = member(hf.tokenizer, "model");
  check(model.is_object(), "tokenizer.json: an object 'model' was expected");
  std::string kind = token_text(member(model, "type"));
  const json& vocab = member(model, "vocab");
  if (kind.empty()) kind = vocab.is_array() ? "Unigram" : model.contains("merges") ? "BPE" : "WordPiece";
  check(kind == "BPE" || kind == "WordPiece" || kind == "Unigram",
        "tokenizer.json: model.type '{}' cannot be held by GGUF; it has BPE, WordPiece and Unigram", shown(kind));

  bool byte_level = false;
  each_step(member(hf.tokenizer, "pre_tokenizer"), "pretokenizers",
            [&](const json& s) { byte_level |= member(s, "type") == "ByteLevel"; });
  each_step(member(hf.tokenizer, "decoder"), "decoders",
            [&](const json& s) { byte_level |= member(s, "type") == "ByteLevel"; });
  const bool sentencepiece = kind == "BPE" && !byte_level;

  Tokens tokens;
  std::unordered_map<std::string, float> score_of;  // of sentencepiece BPE: the earlier the merge, the higher
  std::vector<std::string> merges;
  if (kind == "BPE") {
    const json& list = member(model, "merges");
    check(list.is_array(), "tokenizer.json: model.merges must be an array");
    float rank = 0;
    for (const auto& m : list) {
      const auto [left, right] = merge_of(m);
      if (sentencepiece)
        score_of.emplace(left + right, -rank);
      else
        merges.push_back(left + " " + right);
      rank += 1;
    }
  }
  const std::string unknown = token_text(member(model, "unk_token"));
  if (kind == "Unigram") {
    check(vocab.is_array(), "tokenizer.json: model.vocab of Unigram must be an array");
    int64_t id = 0;
    const json& unk = member(model, "unk_id");
    for (const auto& entry : vocab) {
      check(entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_number(),
            "tokenizer.json: entry {} of model.vocab is not [piece, score]", id);
      const std::string text = entry[0].get<std::string>();
      const int32_t type = unk.is_number_integer() && unk.get<int64_t>() == id ? kUnknown
                           : is_byte_token(text)                               ? kByte
                                                                               : kNormal;
      tokens.put(id++, text, type, entry[1].get<float>());
    }
  } else {
    check(vocab.is_object(), "tokenizer.json: model.vocab must be an object");
    const auto lowest = -static_cast<float>(score_of.size());
    for (const auto& [text, id] : vocab.items()) {
      check(id.is_number_integer(), "tokenizer.json: the id of token '{}' is not an integer", shown(text));
      int32_t type = kNormal;
      if (sentencepiece && is_byte_token(text)) type = kByte;
      if (text == unknown && !byte_level) type = kind == "WordPiece" ? kControl : kUnknown;
      const auto score = score_of.find(text);
      tokens.put(id.get<int64_t>(), text, type,
                 score != score_of.end() ? score->second
                 : type == kNormal       ? lowest
                                         : 0.0f);
    }
  }
  for (const auto& added : member(hf.tokenizer, "added_tokens")) {
    const std::string text = token_text(added);
    check(added.is_object() && member(added, "id").is_number_integer(), "tokenizer.json: an added token without id");
    const bool special = member(added, "special") == true;
    const int32_t type =
        special ? (text == unknown && !byte_level && kind != "WordPiece" ? kUnknown : kControl) : kUserDefined;
    tokens.put(added["id"].get<int64_t>(), text, type, sentencepiece || kind == "Unigram" ? -1000.0f : 0.0f);
  }
  const auto named = static_cast<int64_t>(tokens.text.size());
  for (int64_t id = 0; id < std::max(named, vocabulary); ++id)
    if (id >= named ||
        (tokens.types[static_cast<size_t>(id)] == kUnused && tokens.text[static_cast<size_t>(id)].empty()))
      tokens.put(id, fmt::format("[PAD{}]", id), kUnused, -10000.0f);
  if (vocabulary > 0 && named > vocabulary) {
    warnings.push_back(
        fmt::format("the tokenizer has {} tokens but the embedding only {} rows: the last {} are left out", named,
                    vocabulary, named - vocabulary));
    tokens.text.resize(static_cast<size_t>(vocabulary));
    tokens.scores.resize(tokens.text.size());
    tokens.types.resize(tokens.text.size());
  }

  // Kind.
  std::string pre = "default";
  if (kind == "BPE" && byte_level) {
    if (const auto name = pre_tokenizer_name(hf.tokenizer)) {
      pre = *name;
    } else {
      warnings.push_back(
          "GGUF has no name that moiety knows for this tokenizer's pre_tokenizer: 'default' is written, and "
          "tokenizer.json is "
          "kept in the key tokenizer.huggingface.json");
      writer.set("tokenizer.huggingface.json", hf.tokenizer.dump(-1, ' ', false, json::error_handler_t::replace));
    }
  }
  writer.set("tokenizer.ggml.model", kind == "WordPiece" ? "bert"
                                     : kind == "Unigram" ? "t5"
                                     : byte_level        ? "gpt2"
                                                         : "llama");
  writer.set("tokenizer.ggml.pre", pre);
  if (kind == "WordPiece") {
    // Word starts carry the mark here, continuations nothing.
    const std::string prefix =
        model.contains("continuing_subword_prefix") ? token_text(model["continuing_subword_prefix"]) : "##";
    for (size_t i = 0; i < tokens.text.size(); ++i) {
      if (tokens.types[i] == kControl || tokens.types[i] == kUnused) continue;
      std::string& t = tokens.text[i];
      t = !prefix.empty() && t.starts_with(prefix) ? t.substr(prefix.size()) : kMetaspace + t;
    }
  }
  writer.set_array("tokenizer.ggml.tokens", tokens.text);
  if (sentencepiece || kind == "Unigram") writer.set_array_f32("tokenizer.ggml.scores", tokens.scores);
  writer.set_array_i32("tokenizer.ggml.token_type", tokens.types);
  // An empty list, too: readers ask for it.
  if (kind == "BPE" && !sentencepiece) writer.set_array("tokenizer.ggml.merges", merges);
  if (kind == "WordPiece")
    writer.set_u32("tokenizer.ggml.token_type_count", static_cast<uint32_t>(std::max<int64_t>(1, [&] {
                     const json& n = member(model_config, "type_vocab_size");
                     return n.is_number_integer() ? n.get<int64_t>() : int64_t{1};
                   }())));

  // Special tokens: by the tokenizer's own names, else by the ids of config.json.
  auto id_of = [&](const char* role, const char* config_key) -> std::optional<int64_t> {
    for (const json* source : {&hf.config, &hf.special_tokens})
      if (const std::string text = token_text(member(*source, role)); !text.empty())
        if (const auto it = tokens.ids.find(text); it != tokens.ids.end()) return it->second;
    const json* id = &member(model_config, config_key);
    if (id->is_array() && !id->empty()) id = &(*id)[0];
    if (id->is_number_integer() && id->get<int64_t>() >= 0 &&
        id->get<int64_t>() < static_cast<int64_t>(tokens.text.size()))
      return id->get<int64_t>();
    return std::nullopt;
  };
  const auto bos = id_of(kind == "WordPiece" ? "cls_token" : "bos_token", "bos_token_id");
  const auto eos = id_of(kind == "WordPiece" ? "sep_token" : "eos_token", "eos_token_id");
  auto set_id = [&](const char* key, std::optional<int64_t> id) {
    if (id && *id < static_cast<int64_t>(tokens.text.size())) writer.set_u32(key, static_cast<uint32_t>(*id));
  };
  set_id("tokenizer.ggml.bos_token_id", bos);
  set_id("tokenizer.ggml.eos_token_id", eos);
  std::optional<int64_t> unk = id_of("unk_token", "unk_token_id");
  if (!unk && !unknown.empty() && tokens.ids.count(unknown)) unk = tokens.ids[unknown];
  if (!unk && member(model, "unk_id").is_number_integer()) unk = model["unk_id"].get<int64_t>();
  set_id("tokenizer.ggml.unknown_token_id", unk);
  set_id("tokenizer.ggml.padding_token_id", id_of("pad_token", "pad_token_id"));
  set_id("tokenizer.ggml.seperator_token_id", id_of("sep_token", "sep_token_id"));  // the key is spelled so
  set_id("tokenizer.ggml.mask_token_id", id_of("mask_token", "mask_token_id"));

  // What the post-processor puts around a text.
  bool add_bos = false, add_eos = false, stated = false;
  each_step(member(hf.tokenizer, "post_processor"), "processors", [&](const json& step) {
    const std::string type = token_text(member(step, "type"));
    if (type == "TemplateProcessing" && member(step, "single").is_array()) {
      stated = true;
      bool seen = false;
      for (const auto& piece : step["single"]) {
        if (piece.contains("Sequence")) seen = true;
        if (piece.contains("SpecialToken")) (seen ? add_eos : add_bos) = true;
      }
    } else if (type == "BertProcessing" || type == "RobertaProcessing") {
      stated = add_bos = add_eos = true;
    }
  });
  if (!stated && member(hf.tokenizer, "post_processor").is_null()) {
    add_bos = member(hf.config, "add_bos_token") == true;
    add_eos = member(hf.config, "add_eos_token") == true;
  }
  writer.set_bool("tokenizer.ggml.add_bos_token", add_bos);
  writer.set_bool("tokenizer.ggml.add_eos_token", add_eos);
  bool prefix_space = false;
  each_step(member(hf.tokenizer, "normalizer"), "normalizers",
            [&](const json& s) { prefix_space |= member(s, "type") == "Prepend"; });
  each_step(member(hf.tokenizer, "pre_tokenizer"), "pretokenizers", [&](const json& s) {
    if (member(s, "type") == "Metaspace")
      prefix_space |= member(s, "prepend_scheme").is_string() ? s["prepend_scheme"] != "never"
                                                              : member(s, "add_prefix_space") != false;
    if (member(s, "type") == "ByteLevel") prefix_space |= member(s, "add_prefix_space") == true;
  });
  writer.set_bool("tokenizer.ggml.add_space_prefix", prefix_space);
  if (kind == "Unigram") {
    bool squeeze = false;
    std::optional<std::string> charsmap;
    each_step(member(hf.tokenizer, "normalizer"), "normalizers", [&](const json& s) {
      squeeze |= member(s, "type") == "Replace" || member(s, "type") == "Strip";
      if (member(s, "type") == "Precompiled") charsmap = token_text(member(s, "precompiled_charsmap"));
    });
    writer.set_bool("tokenizer.ggml.remove_extra_whitespaces", squeeze);
    if (charsmap && !charsmap->empty()) {
      GgufValue bytes;
      bytes.type = 9, bytes.element_type = 0;
      std::vector<uint8_t> data;
      uint32_t bits = 0;
      int held = 0;
      for (const char c : *charsmap) {
        static constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        const size_t value = digits.find(c);
        if (value == std::string_view::npos) break;
        bits = bits << 6 | static_cast<uint32_t>(value);
        if ((held += 6) >= 8) data.push_back(static_cast<uint8_t>(bits >> (held -= 8)));
      }
      bytes.value = GgufArray(std::move(data));
      writer.set("tokenizer.ggml.precompiled_charsmap", bytes);
    }
  }
  if (!hf.chat_template.empty()) writer.set("tokenizer.chat_template", hf.chat_template);
  return warnings;
}

// ---- GGUF -> tokenizer.json ----

namespace {

json added_token(int64_t id, const std::string& text, bool special) {
  return {{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

json template_processing(std::optional<std::pair<int64_t, std::string>> before,
                         std::optional<std::pair<int64_t, std::string>> after, bool types) {
  json single = json::array(), pair = json::array(), special = json::object();
  auto sequence = [](const char* id, int type) { return json{{"Sequence", {{"id", id}, {"type_id", type}}}}; };
  auto token = [&](const std::pair<int64_t, std::string>& t, int type) {
    special[t.second] = {{"id", t.second}, {"ids", {t.first}}, {"tokens", {t.second}}};
    return json{{"SpecialToken", {{"id", t.second}, {"type_id", type}}}};
  };
  if (before) single.push_back(token(*before, 0)), pair.push_back(token(*before, 0));
  single.push_back(sequence("A", 0)), pair.push_back(sequence("A", 0));
  if (after) single.push_back(token(*after, 0)), pair.push_back(token(*after, 0));
  if (before && !types) pair.push_back(token(*before, 1));
  pair.push_back(sequence("B", 1));
  if (after) pair.push_back(token(*after, 1));
  return {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", special}};
}

/// Merges of a SentencePiece vocabulary: every way to cut a piece in two pieces, best score first.
json merges_from_scores(const std::vector<std::string>& text, const std::vector<double>& scores,
                        const std::vector<double>& types) {
  std::unordered_map<std::string_view, size_t> ids;
  for (size_t i = 0; i < text.size(); ++i) ids.emplace(text[i], i);
  struct Merge {
    double score;
    size_t left, right, cut;
    size_t piece;
  };
  std::vector<Merge> all;
  for (size_t i = 0; i < text.size(); ++i) {
    // Normal (1) and user-defined (4) pieces.
    if (types.size() == text.size() && types[i] != 1.0 && types[i] != 4.0) continue;
    const std::string_view piece = text[i];
    if (piece.size() > 512) continue;
    for (size_t cut = 1; cut < piece.size(); ++cut) {
      if ((static_cast<unsigned char>(piece[cut]) & 0xC0) == 0x80) continue;  // inside a character
      const auto left = ids.find(piece.substr(0, cut)), right = ids.find(piece.substr(cut));
      if (left != ids.end() && right != ids.end())
        all.push_back({i < scores.size() ? scores[i] : 0.0, left->second, right->second, cut, i});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Merge& a, const Merge& b) {
    if (a.score != b.score) return a.score > b.score;
    if (a.piece != b.piece) return a.piece < b.piece;
    return std::pair(a.left, a.right) < std::pair(b.left, b.right);
  });
  json out = json::array();
  for (const auto& m : all) out.push_back(json::array({text[m.left], text[m.right]}));
  return out;
}

std::string base64(const std::vector<double>& bytes) {
  static constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    for (size_t k = 0; k < 3; ++k)
      group = group << 8 | (k < n ? static_cast<uint32_t>(static_cast<uint8_t>(
                                        static_cast<int64_t>(std::clamp(bytes[i + k], -128.0, 255.0))))
                                  : 0u);
    for (size_t k = 0; k < 4; ++k) out += k <= n ? digits[group >> (18 - 6 * k) & 63] : '=';
  }
  return out;
}

}  // namespace

HfTokenizer hf_tokenizer(const GgufFile& file) {
  const std::string kind = file.string("tokenizer.ggml.model").value_or("");
  check(kind == "gpt2" || kind == "llama" || kind == "bert" || kind == "t5",
        "{}: tokenizer.ggml.model is '{}'; gpt2, llama, bert and t5 can be written as tokenizer.json", file.where(),
        shown(kind));
  const auto* raw = file.strings("tokenizer.ggml.tokens");
  check(raw && !raw->empty(), "{}: key 'tokenizer.ggml.tokens' is missing", file.where());
  std::vector<std::string> text(raw->begin(), raw->end());
  const std::vector<double> types = file.numbers("tokenizer.ggml.token_type"),
                            scores = file.numbers("tokenizer.ggml.scores");
  const std::string pre_name = file.string("tokenizer.ggml.pre").value_or("default");
  auto type_of = [&](size_t i) {
    return i < types.size() && types[i] >= 1 && types[i] <= 6 ? static_cast<int32_t>(types[i]) : int32_t{kNormal};
  };
  using Named = std::pair<int64_t, std::string>;
  auto special = [&](const char* key) -> std::optional<Named> {
    const auto id = file.integer(fmt::format("tokenizer.ggml.{}_token_id", key));
    if (!id || *id < 0 || *id >= static_cast<int64_t>(text.size())) return std::nullopt;
    return Named{*id, text[static_cast<size_t>(*id)]};
  };

  HfTokenizer out;
  if (kind == "bert") {
    for (size_t i = 0; i < text.size(); ++i) {
      if (type_of(i) == kControl || type_of(i) == kUnused) continue;
      text[i] = text[i].starts_with(kMetaspace) ? text[i].substr(3) : "##" + text[i];
    }
  }
  const auto bos = special("bos"), eos = special("eos"), unk = special("unknown"), pad = special("padding"),
             mask = special("mask");
  auto sep = special("seperator");
  auto cls = special("cls");
  if (kind == "bert") {
    if (!cls) cls = bos;
    if (!sep) sep = eos;
  }

  json t = {
      {"version", "1.0"},      {"truncation", nullptr},    {"padding", nullptr},        {"added_tokens", json::array()},
      {"normalizer", nullptr}, {"pre_tokenizer", nullptr}, {"post_processor", nullptr}, {"decoder", nullptr}};
  for (size_t i = 0; i < text.size(); ++i) {
    const int32_t type = type_of(i);
    const bool is_unknown = unk && unk->first == static_cast<int64_t>(i) && type != kNormal;
    if (type == kControl || type == kUserDefined || type == kUnknown || is_unknown)
      t["added_tokens"].push_back(added_token(static_cast<int64_t>(i), text[i], type != kUserDefined));
  }

  const bool add_bos = file.boolean("tokenizer.ggml.add_bos_token")
                           .value_or(kind == "llama" || kind == "bert" || pre_name == "llama-bpe");
  const bool add_eos = file.boolean("tokenizer.ggml.add_eos_token").value_or(kind == "t5" || kind == "bert");
  const bool space_prefix = file.boolean("tokenizer.ggml.add_space_prefix").value_or(kind == "llama" || kind == "t5");
  auto vocabulary = [&] {
    json v = json::object();
    for (size_t i = 0; i < text.size(); ++i)
      if (type_of(i) != kUnused || !text[i].starts_with("[PAD")) v[text[i]] = i;
    return v;
  };

  if (kind == "gpt2") {
    PreTokenizer pre = pre_tokenizer("gpt-2").value();
    const auto known = pre_tokenizer(pre_name);
    check(known.has_value(), "{}: tokenizer.ggml.pre '{}' is not a pre-tokenizer that moiety knows", file.where(),
          shown(pre_name));
    pre = *known;
    json merges = json::array();
    if (const auto* list = file.strings("tokenizer.ggml.merges"))
      for (const auto m : *list) {
        const size_t space = m.find(' ', 1);
        check(space != std::string_view::npos && space + 1 < m.size(),
              "{}: tokenizer.ggml.merges holds '{}', which is not two pieces", file.where(), shown(m));
        merges.push_back(json::array({std::string(m.substr(0, space)), std::string(m.substr(space + 1))}));
      }
    t["model"] = {{"type", "BPE"},
                  {"dropout", nullptr},
                  {"unk_token", nullptr},
                  {"continuing_subword_prefix", nullptr},
                  {"end_of_word_suffix", nullptr},
                  {"fuse_unk", false},
                  {"byte_fallback", false},
                  {"ignore_merges", pre.ignore_merges},
                  {"vocab", vocabulary()},
                  {"merges", std::move(merges)}};
    t["pre_tokenizer"] = pre.rules;
    const json byte_level = {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
    t["decoder"] = byte_level;
    if (pre.nfc) t["normalizer"] = {{"type", "NFC"}};
    const bool around = (add_bos && bos) || (add_eos && eos);
    t["post_processor"] = around ? json{{"type", "Sequence"},
                                        {"processors",
                                         {byte_level, template_processing(add_bos ? bos : std::nullopt,
                                                                          add_eos ? eos : std::nullopt, false)}}}
                                 : byte_level;
  } else if (kind == "llama") {
    t["model"] = {{"type", "BPE"},
                  {"dropout", nullptr},
                  {"unk_token", unk ? json(unk->second) : json(nullptr)},
                  {"continuing_subword_prefix", nullptr},
                  {"end_of_word_suffix", nullptr},
                  {"fuse_unk", true},
                  {"byte_fallback", std::any_of(text.begin(), text.end(), is_byte_token)},
                  {"ignore_merges", false},
                  {"vocab", vocabulary()},
                  {"merges", merges_from_scores(text, scores, types)}};
    const json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kMetaspace}};
    json decoders = {{{"type", "Replace"}, {"pattern", {{"String", kMetaspace}}}, {"content", " "}},
                     {{"type", "ByteFallback"}},
                     {{"type", "Fuse"}}};
    if (space_prefix) {
      t["normalizer"] = {{"type", "Sequence"},
                         {"normalizers", {{{"type", "Prepend"}, {"prepend", kMetaspace}}, replace}}};
      decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    } else {
      t["normalizer"] = replace;
      t["pre_tokenizer"] = {
          {"type", "Split"}, {"pattern", {{"String", " "}}}, {"behavior", "MergedWithPrevious"}, {"invert", false}};
    }
    t["decoder"] = {{"type", "Sequence"}, {"decoders", decoders}};
    t["post_processor"] = template_processing(add_bos ? bos : std::nullopt, add_eos ? eos : std::nullopt, false);
  } else if (kind == "bert") {
    const bool cased = std::any_of(raw->begin(), raw->end(), [&](std::string_view s) {
      return !s.starts_with("[") && std::any_of(s.begin(), s.end(), [](char c) { return c >= 'A' && c <= 'Z'; });
    });
    t["model"] = {{"type", "WordPiece"},
                  {"unk_token", unk ? unk->second : "[UNK]"},
                  {"continuing_subword_prefix", "##"},
                  {"max_input_chars_per_word", 100},
                  {"vocab", vocabulary()}};
    t["normalizer"] = {{"type", "BertNormalizer"},
                       {"clean_text", true},
                       {"handle_chinese_chars", true},
                       {"strip_accents", nullptr},
                       {"lowercase", !cased}};
    t["pre_tokenizer"] = {{"type", "BertPreTokenizer"}};
    t["decoder"] = {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}};
    t["post_processor"] = template_processing(add_bos ? cls : std::nullopt, add_eos ? sep : std::nullopt, true);
  } else {
    json entries = json::array();
    for (size_t i = 0; i < text.size(); ++i)
      entries.push_back(json::array({text[i], i < scores.size() ? scores[i] : 0.0}));
    t["model"] = {{"type", "Unigram"},
                  {"unk_id", unk ? json(unk->first) : json(nullptr)},
                  {"vocab", std::move(entries)},
                  {"byte_fallback", std::any_of(text.begin(), text.end(), is_byte_token)}};
    json steps = json::array();
    if (const auto charsmap = file.numbers("tokenizer.ggml.precompiled_charsmap"); !charsmap.empty())
      steps.push_back({{"type", "Precompiled"}, {"precompiled_charsmap", base64(charsmap)}});
    if (file.boolean("tokenizer.ggml.remove_extra_whitespaces").value_or(false))
      steps.push_back({{"type", "Replace"}, {"pattern", {{"Regex", " {2,}"}}}, {"content", " "}});
    if (!steps.empty()) t["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
    const json metaspace = {{"type", "Metaspace"},
                            {"replacement", kMetaspace},
                            {"prepend_scheme", space_prefix ? "always" : "never"},
                            {"split", true}};
    t["pre_tokenizer"] = metaspace;
    t["decoder"] = metaspace;
    t["post_processor"] = template_processing(add_bos ? bos : std::nullopt, add_eos ? eos : std::nullopt, false);
  }
  if (const auto kept = file.string("tokenizer.huggingface.json")) {
    json original = parse_json(*kept, file.where() + ": key 'tokenizer.huggingface.json'");
    if (original.is_object() && original.contains("model")) t = std::move(original);
  }
  out.tokenizer = std::move(t);

  json& c = out.config;
  c = {{"tokenizer_class", kind == "bert" ? "BertTokenizer" : "PreTrainedTokenizerFast"},
       {"clean_up_tokenization_spaces", false},
       {"add_bos_token", add_bos},
       {"add_eos_token", add_eos}};
  out.special_tokens = json::object();
  for (const auto& [role, token] : {std::pair{"bos_token", kind == "bert" ? std::nullopt : bos},
                                    {"eos_token", kind == "bert" ? std::nullopt : eos},
                                    {"unk_token", unk},
                                    {"pad_token", pad},
                                    {"sep_token", kind == "bert" ? sep : std::nullopt},
                                    {"cls_token", kind == "bert" ? cls : std::nullopt},
                                    {"mask_token", mask}})
    if (token) c[role] = token->second, out.special_tokens[role] = token->second;
  if (kind == "bert") c["do_lower_case"] = member(member(out.tokenizer, "normalizer"), "lowercase") != false;
  const std::string arch = file.string("general.architecture").value_or("");
  if (const auto length = file.integer(arch + ".context_length"); length && *length > 0)
    c["model_max_length"] = *length;
  out.chat_template = file.string("tokenizer.chat_template").value_or("");
  if (!out.chat_template.empty()) c["chat_template"] = out.chat_template;
  return out;
}

}  // namespace moiety
