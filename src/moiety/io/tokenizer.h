#pragma once
// Tokenizers of pretrained models, from Hugging Face tokenizer.json or GGUF metadata: byte-level BPE,
// SentencePiece-style BPE with byte fallback, Unigram and WordPiece, with their normalizers, pre-tokenizers,
// post-processors and decoders. Ids equal those of the `tokenizers` package. Invalid UTF-8 is replaced by U+FFFD, one
// per maximal ill-formed sequence. The truncation and padding sections of tokenizer.json, and BPE dropout, are ignored:
// encode returns the whole text, always the same way.
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moiety/io/checkpoint.h"

namespace moiety {

class Tokenizer {
 public:
  /// From an HF tokenizer.json; `config` is tokenizer_config.json (may be {}).
  static std::shared_ptr<const Tokenizer> from_json(const nlohmann::json& tokenizer, const nlohmann::json& config = {},
                                                    const std::string& where = "tokenizer.json");
  static std::shared_ptr<const Tokenizer> from_gguf(const GgufFile& file);
  /// From whatever the checkpoint carries (of a folder, see read_tokenizer_files); Error naming what was looked for when
  /// it has none.
  static std::shared_ptr<const Tokenizer> load(const Checkpoint& checkpoint);
  /// From a tokenizer.json, a folder that holds one or the vocabulary files that came before it (with
  /// tokenizer_config.json and chat_template.jinja beside it), or anything Checkpoint::open takes.
  static std::shared_ptr<const Tokenizer> open(const std::string& location);
  virtual ~Tokenizer() = default;

  /// `add_special`: add what the post-processor adds (BOS, [CLS] ... [SEP]). Special tokens written in the text are
  /// recognised unless `parse_special` is false.
  virtual std::vector<int64_t> encode(std::string_view text, bool add_special = true,
                                      bool parse_special = true) const = 0;
  virtual std::string decode(std::span<const int64_t> ids, bool skip_special = false) const = 0;
  virtual std::string piece(int64_t id) const = 0;  ///< the vocabulary's own spelling ("Ġthe", "▁the", "##ing")
  virtual std::optional<int64_t> id(std::string_view piece) const = 0;
  virtual int64_t size() const = 0;  ///< largest id + 1
  virtual bool is_special(int64_t id) const = 0;
  virtual std::string kind() const = 0;  ///< "BPE (byte-level)", "Unigram", ...
  virtual std::optional<int64_t> bos() const = 0;
  virtual std::optional<int64_t> eos() const = 0;
  virtual std::optional<int64_t> pad() const = 0;
  virtual std::optional<int64_t> unk() const = 0;
  virtual std::string chat_template() const = 0;  ///< Jinja source, "" when the model has none

  /// One sequence being decoded; see DecodeStream. It refers to the tokenizer.
  class Decoding {
   public:
    virtual ~Decoding() = default;
    virtual std::string push(int64_t id) = 0;
    virtual std::string flush() = 0;
  };
  virtual std::unique_ptr<Decoding> decoding(bool skip_special) const = 0;
};

/// Streaming decode: push ids one by one; returns only whole characters, and exactly decode(all ids) when put together.
/// Text is held back only while later ids can still change it (an unfinished character, a run of byte tokens).
class DecodeStream {
 public:
  explicit DecodeStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special = true)
      : tokenizer_(std::move(tokenizer)), decoding_(tokenizer_->decoding(skip_special)) {}
  std::string push(int64_t id) { return decoding_->push(id); }
  std::string flush() { return decoding_->flush(); }  ///< what is left: an unfinished character becomes U+FFFD

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<Tokenizer::Decoding> decoding_;
};

}  // namespace moiety
