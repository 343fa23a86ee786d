// Tokenizers from GGUF metadata: the same pipeline parts, chosen by tokenizer.ggml.model and tokenizer.ggml.pre.
#include <algorithm>
#include <array>

#include "moiety/io/gguf.h"
#include "moiety/io/pre_tokenizers.h"
#include "moiety/io/tokenizer_pipeline.h"

namespace moiety {
namespace tokenizer {
namespace {

using json = nlohmann::json;

enum TokenType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

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
    const std::string name = file_.string("tokenizer.ggml.pre").value_or("default");
    const auto pre = moiety::pre_tokenizer(name);
    check(pre.has_value(),
          "{}: tokenizer.ggml.pre is \"{}\", which is not known; llama-bpe, gpt-2, qwen2, smollm, deepseek-v3 and "
          "gpt-4o are "
          "among those that are.",
          file_.where(), name);
    if (pre->nfc)
      p_->normalizer_ = make_normalizer(json{{"type", "NFC"}});
    else if (flag("tokenizer.ggml.add_space_prefix", false))
      p_->normalizer_ =
          make_normalizer(json{{"type", "Replace"}, {"pattern", {{"Regex", "\\A(?! )"}}}, {"content", " "}});
    p_->pre_tokenizer_ = make_pre_tokenizer(pre->rules);
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
