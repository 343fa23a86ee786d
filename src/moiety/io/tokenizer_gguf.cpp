// Tokenizers from GGUF metadata: the same pipeline parts, chosen by tokenizer.ggml.model and tokenizer.ggml.pre.
#include <algorithm>
#include <array>

#include "moiety/io/gguf.h"
#include "moiety/io/tokenizer_pipeline.h"

namespace moiety {
namespace tokenizer {
namespace {

using json = nlohmann::json;

enum TokenType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen35 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken = R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
                                R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
                                R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDeepseek3 =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDeepseekCjk = "[一-龥぀-ゟ゠-ヿ]+";
constexpr const char* kDeepseekOldCjk = "[一-龥ࠀ-一가-퟿]+";
constexpr const char* kDeepseekLetters =
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-"
    "ὗὙὛὝὟ-ώᾀ-"
    "ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-"
    "ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
constexpr const char* kBloom = " ?[^(\\s|.,!?…。，、।۔،)]+";
constexpr const char* kBailing =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";
constexpr const char* kSeedCoder =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTinyAyaDigits = R"(\d{1,3}(?=(?:\d{3})*\b))";
constexpr const char* kKimi =
    R"([\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct Pre {
  std::vector<std::string_view> names;
  std::vector<const char*> patterns;  ///< each splits what the one before left
  bool ignore_merges = false;
  bool bos = false;
};
const std::vector<Pre>& pres() {
  static const std::vector<Pre> table = {
      {{"default", ""}, {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
      {{"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"},
       {kLlama3},
       true,
       true},
      {{"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}, {kLlama3}},
      {{"gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
        "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe", "jina-v1-en",
        "jina-v2-code"},
       {kGpt2}},
      {{"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"},
       {R"(\p{N})", kGpt2}},
      {{"qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"},
       {kQwen2}},
      {{"qwen35"}, {kQwen35}},
      {{"gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"}, {kGpt4o}},
      {{"tiny_aya", "cohere2moe"}, {kTinyAyaDigits, kGpt4o}},
      {{"tekken"}, {kTekken}, true, true},
      {{"kimi-k2"}, {kKimi}},
      {{"deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"}, {R"(\p{N}{1,3})", kDeepseekCjk, kDeepseek3}},
      {{"deepseek-llm"},
       {"[\r\n]", kDeepseekLetters, "\\s?[!-/:-~！-／：-～‘-‟　-。]+", "\\s+$", kDeepseekOldCjk, "\\p{N}+"}},
      {{"deepseek-coder"}, {"[\r\n]", R"(\s?\p{L}+)", R"(\s?\p{P}+)", kDeepseekOldCjk, R"(\p{N})"}},
      {{"falcon"}, {R"([\p{P}\$\+<=>\^~\|`]+)", kGpt2, "[0-9][0-9][0-9]"}},
      {{"poro-chat", "bloom", "gpt3-finnish"}, {kBloom}},
      {{"viking"}, {kBloom, R"(\p{N})"}},
      {{"superbpe"}, {R"(\p{N}+)", R"((?=(\d{3})+(?!\d)))"}},
      {{"bailingmoe", "bailingmoe2", "llada-moe"}, {kBailing}},
      {{"seed-coder"}, {kSeedCoder}},
  };
  return table;
}

json split(const char* pattern) {
  return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
}
json replace(const char* from, const char* to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

class Reader {
 public:
  explicit Reader(const GgufFile& file) : file_(file), p_(std::make_shared<Pipeline>()) {}

  std::shared_ptr<const Tokenizer> read() {
    p_->where_ = file_.where();
    const auto model = file_.string("tokenizer.ggml.model");
    check(model.has_value(), "{}: there is no tokenizer: the key tokenizer.ggml.model is missing.", file_.where());
    const auto* tokens = file_.strings("tokenizer.ggml.tokens");
    check(tokens && !tokens->empty(), "{}: the tokenizer has no tokenizer.ggml.tokens.", file_.where());
    tokens_ = *tokens;
    types_ = file_.numbers("tokenizer.ggml.token_type");
    check(types_.empty() || types_.size() == tokens_.size(),
          "{}: tokenizer.ggml.token_type has {} values for {} tokens.", file_.where(), types_.size(), tokens_.size());
    p_->bos_ = token_id("tokenizer.ggml.bos_token_id");
    p_->eos_ = token_id("tokenizer.ggml.eos_token_id");
    p_->unk_ = token_id("tokenizer.ggml.unknown_token_id");
    p_->pad_ = token_id("tokenizer.ggml.padding_token_id");
    if (*model == "gpt2")
      byte_level();
    else if (*model == "llama")
      sentencepiece();
    else if (*model == "gemma4")
      metaspace_bpe();
    else if (*model == "bert")
      bert();
    else if (*model == "t5")
      unigram();
    else
      fail("{}: tokenizer.ggml.model is \"{}\"; gpt2, llama, gemma4, bert and t5 are known.", file_.where(), *model);
    p_->chat_template_ = file_.string("tokenizer.chat_template").value_or("");
    p_->finish();
    return p_;
  }

 private:
  std::optional<int64_t> token_id(const char* key) const {
    const auto id = file_.integer(key);
    // Files are found that name an id behind the end for "none".
    if (!id || *id < 0 || *id >= static_cast<int64_t>(tokens_.size())) return std::nullopt;
    return id;
  }
  int type(size_t i) const { return types_.empty() ? kNormal : static_cast<int>(types_[i]); }
  bool flag(const char* key, bool otherwise) const { return file_.boolean(key).value_or(otherwise); }

  void vocabulary() {
    std::vector<std::pair<std::string_view, int64_t>> entries;
    entries.reserve(tokens_.size());
    for (size_t i = 0; i < tokens_.size(); ++i) entries.emplace_back(tokens_[i], static_cast<int64_t>(i));
    p_->vocabulary_.assign(entries, file_.where() + ": tokenizer.ggml.tokens");
  }

  /// Tokens that are looked for in the text before anything else.
  void added() {
    std::vector<AddedToken> tokens;
    for (size_t i = 0; i < tokens_.size(); ++i) {
      const int t = type(i);
      if (t != kControl && t != kUserDefined && t != kUnknown) continue;
      AddedToken token;
      token.content = p_->vocabulary_.pieces[i];
      token.normalized = false;
      token.special = t != kUserDefined;
      tokens.push_back(std::move(token));
    }
    p_->add(std::move(tokens));
  }

  void frame(std::optional<int64_t> before, std::optional<int64_t> behind) {
    Template t;
    if (before) t.push_back(*before);
    t.push_back(kSequence);
    if (behind) t.push_back(*behind);
    if (t.size() > 1) p_->templates_.push_back(std::move(t));
  }
  void frame_by_flags(bool bos, bool eos) {
    bos = flag("tokenizer.ggml.add_bos_token", bos);
    eos = flag("tokenizer.ggml.add_eos_token", eos);
    frame(bos ? p_->bos_ : std::nullopt, eos ? p_->eos_ : std::nullopt);
  }

  Merges merges() const {
    const auto* list = file_.strings("tokenizer.ggml.merges");
    check(list != nullptr, "{}: the tokenizer has no tokenizer.ggml.merges.", file_.where());
    Merges out;
    out.reserve(list->size());
    for (size_t i = 0; i < list->size(); ++i) {
      const std::string_view s = (*list)[i];
      const size_t space = s.find(' ', 1);
      check(space != std::string_view::npos,
            "{}: tokenizer.ggml.merges[{}] is \"{}\"; two pieces with a space between are needed.", file_.where(), i,
            s);
      out.emplace_back(s.substr(0, space), s.substr(space + 1));
    }
    return out;
  }

  void byte_level() {
    vocabulary();
    const std::string name = file_.string("tokenizer.ggml.pre").value_or("");
    const Pre* pre = nullptr;
    for (const auto& p : pres())
      if (std::find(p.names.begin(), p.names.end(), name) != p.names.end()) pre = &p;
    check(pre != nullptr,
          "{}: tokenizer.ggml.pre is \"{}\", which is not known; llama-bpe, gpt-2, qwen2, smollm, deepseek-v3 and "
          "gpt-4o are among those that are.",
          file_.where(), name);
    json parts = json::array();
    for (const char* pattern : pre->patterns) parts.push_back(split(pattern));
    parts.push_back({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}});
    if (flag("tokenizer.ggml.add_space_prefix", false))
      p_->normalizer_ =
          make_normalizer(json{{"type", "Replace"}, {"pattern", {{"Regex", "\\A(?! )"}}}, {"content", " "}});
    p_->pre_tokenizer_ = make_pre_tokenizer(json{{"type", "Sequence"}, {"pretokenizers", parts}});
    p_->decoder_ = make_decoder(json{{"type", "ByteLevel"}});
    BpeOptions options;
    options.ignore_merges = pre->ignore_merges;
    p_->model_ = make_bpe(p_->vocabulary_, merges(), std::move(options), file_.where() + ": tokenizer.ggml.merges");
    p_->kind_ = "BPE (byte-level)";
    added();
    frame_by_flags(pre->bos, false);
  }

  void metaspace_decoder(bool prefix) {
    json list = {replace("▁", " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}};
    if (prefix) list.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    p_->decoder_ = make_decoder(json{{"type", "Sequence"}, {"decoders", list}});
  }

  void sentencepiece() {
    vocabulary();
    const auto scores = file_.numbers("tokenizer.ggml.scores");
    check(!scores.empty(), "{}: the tokenizer has no tokenizer.ggml.scores.", file_.where());
    const bool prefix = flag("tokenizer.ggml.add_space_prefix", true);
    json list = json::array();
    if (prefix) list.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
    list.push_back(replace(" ", "▁"));
    p_->normalizer_ = make_normalizer(json{{"type", "Sequence"}, {"normalizers", list}});
    p_->model_ = make_scored_bpe(p_->vocabulary_, {scores.begin(), scores.end()}, p_->unk_.value_or(-1),
                                 file_.where() + ": tokenizer.ggml.scores");
    metaspace_decoder(prefix);
    p_->kind_ = "BPE (SentencePiece)";
    added();
    frame_by_flags(true, false);
  }

  void metaspace_bpe() {
    vocabulary();
    p_->normalizer_ = make_normalizer(replace(" ", "▁"));
    p_->pre_tokenizer_ = make_pre_tokenizer(split("[^\\n]+|[\\n]+"));
    BpeOptions options;
    options.byte_fallback = options.fuse_unk = true;
    if (p_->unk_) options.unk = tokens_[static_cast<size_t>(*p_->unk_)];
    p_->model_ = make_bpe(p_->vocabulary_, merges(), std::move(options), file_.where() + ": tokenizer.ggml.merges");
    metaspace_decoder(false);
    p_->kind_ = "BPE (byte fallback)";
    added();
    frame_by_flags(true, false);
  }

  void bert() {
    // The file marks the first piece of a word with U+2581; the model's own spelling marks the others with ##.
    std::vector<std::string> spelled(tokens_.size());
    std::vector<std::pair<std::string_view, int64_t>> entries;
    bool cased = false;
    for (size_t i = 0; i < tokens_.size(); ++i) {
      const std::string_view t = tokens_[i];
      const bool plain = type(i) == kNormal;
      if (t.starts_with("▁"))
        spelled[i] = t.substr(3);
      else
        spelled[i] = plain ? "##" + std::string(t) : std::string(t);
      if (plain && t.size() > 4) cased |= std::any_of(t.begin(), t.end(), [](char c) { return c >= 'A' && c <= 'Z'; });
      entries.emplace_back(spelled[i], static_cast<int64_t>(i));
    }
    p_->vocabulary_.assign(entries, file_.where() + ": tokenizer.ggml.tokens");
    p_->normalizer_ = make_normalizer(json{{"type", "BertNormalizer"}, {"lowercase", !cased}});
    p_->pre_tokenizer_ = make_pre_tokenizer(json{{"type", "BertPreTokenizer"}});
    p_->decoder_ = make_decoder(json{{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}});
    const std::string unk = p_->unk_ ? spelled[static_cast<size_t>(*p_->unk_)] : "[UNK]";
    p_->model_ = make_wordpiece(p_->vocabulary_, unk, "##", 100, file_.where() + ": tokenizer.ggml.tokens");
    p_->kind_ = "WordPiece";
    added();
    auto first = token_id("tokenizer.ggml.cls_token_id"), last = token_id("tokenizer.ggml.seperator_token_id");
    if (!first) first = p_->bos_ ? p_->bos_ : p_->id("[CLS]");
    if (!last) last = p_->id("[SEP]") ? p_->id("[SEP]") : p_->eos_;
    frame(flag("tokenizer.ggml.add_bos_token", true) ? first : std::nullopt,
          flag("tokenizer.ggml.add_sep_token", true) ? last : std::nullopt);
  }

  void unigram() {
    vocabulary();
    std::string map;
    for (const double b : file_.numbers("tokenizer.ggml.precompiled_charsmap"))
      map += static_cast<char>(static_cast<int>(b) & 0xFF);
    const bool squeeze = flag("tokenizer.ggml.remove_extra_whitespaces", true);
    p_->normalizer_ = std::make_unique<Chain>(
        map.empty() ? nullptr
                    : make_precompiled(std::move(map), file_.where() + ": tokenizer.ggml.precompiled_charsmap"),
        squeeze ? make_normalizer(json{{"type", "Sequence"},
                                       {"normalizers",
                                        {{{"type", "Strip"}, {"strip_left", false}, {"strip_right", true}},
                                         {{"type", "Replace"}, {"pattern", {{"Regex", " {2,}"}}}, {"content", "▁"}}}}})
                : nullptr);
    const bool prefix = flag("tokenizer.ggml.add_space_prefix", true);
    const json metaspace = {
        {"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", prefix ? "always" : "never"}};
    p_->pre_tokenizer_ = make_pre_tokenizer(metaspace);
    p_->decoder_ = make_decoder(metaspace);
    const auto scores = file_.numbers("tokenizer.ggml.scores");
    const bool bytes = std::any_of(types_.begin(), types_.end(), [](double t) { return static_cast<int>(t) == kByte; });
    p_->model_ = make_unigram(p_->vocabulary_, scores, p_->unk_, bytes, file_.where() + ": tokenizer.ggml.scores");
    p_->kind_ = "Unigram";
    added();
    frame_by_flags(false, true);
  }

  class Chain : public Normalizer {
   public:
    Chain(std::unique_ptr<Normalizer> first, std::unique_ptr<Normalizer> second)
        : first_(std::move(first)), second_(std::move(second)) {}
    void apply(Chunk& chunk) const override {
      if (first_) first_->apply(chunk);
      if (second_) second_->apply(chunk);
    }

   private:
    std::unique_ptr<Normalizer> first_, second_;
  };

  const GgufFile& file_;
  std::shared_ptr<Pipeline> p_;
  std::vector<std::string_view> tokens_;
  std::vector<double> types_;
};

}  // namespace
}  // namespace tokenizer

std::shared_ptr<const Tokenizer> Tokenizer::from_gguf(const GgufFile& file) {
  return tokenizer::Reader(file).read();
}

}  // namespace moiety
