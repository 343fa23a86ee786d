#include "moiety/io/tokenizer_files.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/io/pre_tokenizers.h"
#include "moiety/io/unicode.h"

namespace moiety {
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t max_file = int64_t{256} << 20;
// The order in which transformers adds those that the vocabulary lacks.
constexpr const char* special_names[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                         "pad_token", "cls_token", "mask_token"};

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

json read_json(const fs::path& path) {
  return is_file(path) ? parse_json(read_text(path, max_file), path.string()) : json::object();
}

// What VocabularyFiles calls a kind, from tokenizer_class or else model_type.
std::string kind_of(const json& config, const json& model, bool merges, const std::string& where) {
  static const std::map<std::string, std::string> classes = {
      {"GPT2", "GPT2"},   {"CodeGen", "GPT2"}, {"Roberta", "Roberta"}, {"Bart", "Roberta"}, {"Longformer", "Roberta"},
      {"Qwen2", "Qwen2"}, {"Bert", "Bert"},    {"DistilBert", "Bert"}, {"Electra", "Bert"}, {"MobileBert", "Bert"}};
  static const std::map<std::string, std::string> models = {
      {"gpt2", "GPT2"},       {"gpt_neo", "GPT2"},       {"gptj", "GPT2"},        {"opt", "GPT2"},
      {"phi", "GPT2"},        {"codegen", "GPT2"},       {"starcoder2", "GPT2"},  {"roberta", "Roberta"},
      {"bart", "Roberta"},    {"longformer", "Roberta"}, {"qwen2", "Qwen2"},      {"qwen2_moe", "Qwen2"},
      {"qwen3", "Qwen2"},     {"qwen3_moe", "Qwen2"},    {"qwen3_next", "Qwen2"}, {"bert", "Bert"},
      {"distilbert", "Bert"}, {"electra", "Bert"},       {"mobilebert", "Bert"},  {"nomic_bert", "Bert"}};
  const auto text = [](const json& from, const char* key) {
    return from.is_object() && from.contains(key) && from[key].is_string() ? from[key].get<std::string>() : "";
  };
  std::string name = text(config, "tokenizer_class");
  for (const std::string_view end : {"Fast", "Tokenizer"})
    if (name.ends_with(end)) name.resize(name.size() - end.size());
  const bool named = !name.empty() && name != "PreTrained" && name != "TokenizersBackend";
  if (!named) name = text(model, "model_type");
  const auto& list = named ? classes : models;
  const auto found = list.find(name);
  const std::string kind = found != list.end() ? found->second : !merges && name.empty() ? "Bert" : "";
  check(!kind.empty() && (kind != "Bert") == merges,
        "{} has no tokenizer.json, and from {} only the tokenizers of {} are made, not of '{}': let transformers' "
        "save_pretrained write a tokenizer.json",
        where, merges ? "vocab.json and merges.txt" : "vocab.txt", merges ? "GPT-2, RoBERTa and Qwen 2" : "BERT",
        shown(name));
  return kind;
}

template <class Each>
void for_lines(std::string_view text, const Each& each) {
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string_view line = text.substr(at, end - at);
    if (line.ends_with('\r')) line.remove_suffix(1);
    each(line);
    at = end + 1;
  }
}

json byte_level(bool prefix_space, bool own_rules) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", prefix_space}, {"trim_offsets", true}, {"use_regex", own_rules}};
}

// A special token of the config: its text, or an object that also says how it is matched.
json special_token(const json& value, const std::string& where) {
  json token = {{"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}};
  if (value.is_object()) {
    check(value.contains("content") && value["content"].is_string(), "{} has no text as \"content\"", where);
    for (const char* key : {"single_word", "lstrip", "rstrip", "normalized"})
      if (value.contains(key)) token[key] = value[key];
    token["content"] = value["content"];
  } else {
    check(value.is_string(), "{} must be text, not {}", where, value.type_name());
    token["content"] = value;
  }
  token["special"] = true;
  return token;
}

// The special tokens that each kind has unless the files say otherwise.
json usual_tokens(const std::string& kind) {
  if (kind == "GPT2")
    return {{"bos_token", "<|endoftext|>"}, {"eos_token", "<|endoftext|>"}, {"unk_token", "<|endoftext|>"}};
  if (kind == "Qwen2")
    return {{"eos_token", "<|endoftext|>"}, {"unk_token", "<|endoftext|>"}, {"pad_token", "<|endoftext|>"}};
  if (kind == "Roberta")
    return {{"bos_token", "<s>"},   {"eos_token", "</s>"}, {"unk_token", "<unk>"},  {"sep_token", "</s>"},
            {"pad_token", "<pad>"}, {"cls_token", "<s>"},  {"mask_token", "<mask>"}};
  return {{"unk_token", "[UNK]"},
          {"sep_token", "[SEP]"},
          {"pad_token", "[PAD]"},
          {"cls_token", "[CLS]"},
          {"mask_token", "[MASK]"}};
}

}  // namespace

HfTokenizer from_vocabulary(const VocabularyFiles& files, const std::string& where) {
  for (const json* part : {&files.config, &files.special_tokens, &files.added_tokens})
    check(part->is_object() || part->is_null(), "{}: a file beside the vocabulary is {} instead of an object", where,
          part->type_name());
  const std::string& kind = files.kind;
  const auto flag = [&](const char* key, bool usual) {
    if (!files.config.is_object() || !files.config.contains(key) || files.config[key].is_null()) return usual;
    check(files.config[key].is_boolean(), "{}: {} must be true or false", where, key);
    return files.config[key].get<bool>();
  };

  // Special tokens: the usual ones, then the config's; an old special_tokens_map.json goes first unless the config
  // lists its added tokens.
  json config = usual_tokens(kind);
  if (files.config.is_object()) config.update(files.config);
  const bool listed = config.contains("added_tokens_decoder") && config["added_tokens_decoder"].is_object();
  if (!listed && files.special_tokens.is_object()) config.update(files.special_tokens);
  std::vector<json> special;
  for (const char* name : special_names)
    if (config.contains(name) && !config[name].is_null())
      special.push_back(special_token(config[name], fmt::format("{}: {}", where, name)));
  for (const char* name : {"additional_special_tokens", "extra_special_tokens"})
    if (config.contains(name) && config[name].is_array())
      for (const json& each : config[name]) special.push_back(special_token(each, fmt::format("{}: {}", where, name)));

  json vocabulary;
  if (kind == "Bert") {
    vocabulary = json::object();
    int64_t id = 0;
    for_lines(files.vocabulary, [&](std::string_view line) { vocabulary[unicode::sanitize(line)] = id++; });
  } else {
    vocabulary = parse_json(files.vocabulary, where);
    check(vocabulary.is_object(), "{} must be an object of pieces and ids, not {}", where, vocabulary.type_name());
  }

  // Tokens beside the vocabulary, in the order in which they take new ids: by id, then the special ones.
  json added = json::array();
  std::set<std::string> known;
  const auto add = [&](json token) {
    if (known.insert(token["content"].get<std::string>()).second) added.push_back(std::move(token));
  };
  if (!listed && files.added_tokens.is_object()) {
    std::vector<std::pair<int64_t, std::string>> extra;
    for (const auto& [piece, id] : files.added_tokens.items()) {
      check(id.is_number_integer(), "{}: added_tokens.json gives {} the id {}, which is no whole number", where,
            shown(piece), shown(id.dump(-1, ' ', false, json::error_handler_t::replace)));
      extra.emplace_back(id.get<int64_t>(), piece);
    }
    std::sort(extra.begin(), extra.end());
    for (const auto& [id, piece] : extra) {
      const auto same = [&, text = piece](const json& token) { return token["content"] == text; };
      const bool is_special = std::any_of(special.begin(), special.end(), same);
      json token = special_token(piece, where);
      token["special"] = is_special;
      token["normalized"] = !is_special;
      add(std::move(token));
    }
  }
  // Those of added_tokens_decoder are added by whoever reads the config; they come before the special ones here.
  if (listed) {
    std::vector<std::pair<int64_t, json>> extra;
    for (const auto& [id, token] : config["added_tokens_decoder"].items()) {
      check(!id.empty() && id.size() < 10 && id.find_first_not_of("0123456789") == std::string::npos,
            "{}: added_tokens_decoder: '{}' is not a token id", where, shown(id));
      json entry = special_token(token, fmt::format("{}: added_tokens_decoder {}", where, id));
      entry["special"] = token.is_object() && token.value("special", json(false)) == json(true);
      extra.emplace_back(std::stoll(id), std::move(entry));
    }
    std::sort(extra.begin(), extra.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [id, token] : extra) add(std::move(token));
  }
  for (json& token : special) add(std::move(token));
  int64_t next = static_cast<int64_t>(vocabulary.size());
  for (json& token : added) {
    const auto found = vocabulary.find(token["content"].get_ref<const std::string&>());
    token["id"] = found != vocabulary.end() ? *found : json(next++);
  }

  json out = {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"added_tokens", added}};
  const auto text_of = [&](const char* name) {
    return special_token(config[name], fmt::format("{}: {}", where, name))["content"].get<std::string>();
  };
  const auto id_of = [&](const std::string& text) {
    for (const json& token : added)
      if (token["content"] == text) return token["id"];
    return json(nullptr);
  };
  const bool prefix = flag("add_prefix_space", false);
  if (kind == "Bert") {
    const json accents = config.value("strip_accents", json(nullptr));
    out["normalizer"] = {{"type", "BertNormalizer"},
                         {"clean_text", true},
                         {"handle_chinese_chars", flag("tokenize_chinese_chars", true)},
                         {"strip_accents", accents},
                         {"lowercase", flag("do_lower_case", true)}};
    out["pre_tokenizer"] = {{"type", "BertPreTokenizer"}};
    const std::string cls = text_of("cls_token"), sep = text_of("sep_token");
    out["post_processor"] = {{"type", "BertProcessing"}, {"sep", {sep, id_of(sep)}}, {"cls", {cls, id_of(cls)}}};
    out["decoder"] = {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}};
    out["model"] = {{"type", "WordPiece"},
                    {"unk_token", text_of("unk_token")},
                    {"continuing_subword_prefix", "##"},
                    {"max_input_chars_per_word", 100},
                    {"vocab", std::move(vocabulary)}};
  } else {
    json merges = json::array();
    for_lines(files.merges, [&](std::string_view line) {
      if (!line.starts_with("#version") && !line.empty()) merges.push_back(unicode::sanitize(line));
    });
    out["pre_tokenizer"] = byte_level(prefix, true);
    if (kind == "Qwen2") {
      out["normalizer"] = {{"type", "NFC"}};
      out["pre_tokenizer"] = pre_tokenizer("qwen2")->rules;
    }
    if (kind == "Roberta") {
      const std::string cls = text_of("cls_token"), sep = text_of("sep_token");
      out["post_processor"] = {{"type", "RobertaProcessing"},
                               {"sep", {sep, id_of(sep)}},
                               {"cls", {cls, id_of(cls)}},
                               {"trim_offsets", flag("trim_offsets", true)},
                               {"add_prefix_space", prefix}};
    }
    out["decoder"] = byte_level(true, true);
    out["model"] = {{"type", "BPE"},
                    {"dropout", nullptr},
                    {"unk_token", nullptr},
                    {"continuing_subword_prefix", ""},
                    {"end_of_word_suffix", ""},
                    {"fuse_unk", false},
                    {"byte_fallback", false},
                    {"vocab", std::move(vocabulary)},
                    {"merges", std::move(merges)}};
  }
  return {std::move(out), std::move(config), "",
          files.special_tokens.is_object() ? files.special_tokens : json::object()};
}

namespace {

// The chat template of the folder, else the config's: the text, or the one called default of several, or the first.
std::string chat_template(const fs::path& folder, const json& config) {
  if (const fs::path path = folder / "chat_template.jinja"; is_file(path)) return read_text(path);
  if (!config.is_object() || !config.contains("chat_template")) return "";
  const json& t = config["chat_template"];
  if (t.is_string()) return t.get<std::string>();
  std::string out;
  if (t.is_array())
    for (const json& named : t)
      if (named.is_object() && named.contains("template") && named["template"].is_string() &&
          (out.empty() || named.value("name", json()) == json("default")))
        out = named["template"].get<std::string>();
  return out;
}

}  // namespace

HfTokenizer read_tokenizer_json(const fs::path& path) {
  const fs::path folder = path.parent_path();
  HfTokenizer out{parse_json(read_text(path, max_file), path.string()), read_json(folder / "tokenizer_config.json"), "",
                  read_json(folder / "special_tokens_map.json")};
  out.chat_template = chat_template(folder, out.config);
  return out;
}

std::optional<HfTokenizer> read_tokenizer_files(const fs::path& folder) {
  if (is_file(folder / "tokenizer.json")) return read_tokenizer_json(folder / "tokenizer.json");
  const bool merges = is_file(folder / "vocab.json") && is_file(folder / "merges.txt");
  if (merges || is_file(folder / "vocab.txt")) {
    const fs::path path = folder / (merges ? "vocab.json" : "vocab.txt");
    VocabularyFiles files;
    files.config = read_json(folder / "tokenizer_config.json");
    files.kind = kind_of(files.config, read_json(folder / "config.json"), merges, folder.string());
    files.vocabulary = read_text(path, max_file);
    if (merges) files.merges = read_text(folder / "merges.txt", max_file);
    files.special_tokens = read_json(folder / "special_tokens_map.json");
    files.added_tokens = read_json(folder / "added_tokens.json");
    HfTokenizer out = from_vocabulary(files, path.string());
    out.chat_template = chat_template(folder, out.config);
    return out;
  }
  for (const char* name : {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"})
    check(!is_file(folder / name),
          "{} has no tokenizer.json, only {}, which is not read: let transformers' save_pretrained write a "
          "tokenizer.json",
          folder.string(), name);
  return std::nullopt;
}

}  // namespace moiety
