#pragma once
// The one implementation of Tokenizer: added tokens, normalizer, pre-tokenizer, model, post-processor, decoder. Filled
// by tokenizer.cpp (tokenizer.json) and tokenizer_gguf.cpp; immutable and shared between threads afterwards.
#include <mutex>
#include <unordered_map>

#include "moiety/io/tokenizer.h"
#include "moiety/io/tokenizer_parts.h"

namespace moiety::tokenizer {

struct AddedToken {
  std::string content;
  bool single_word = false, lstrip = false, rstrip = false, normalized = true, special = false;
  int64_t id = -1;
  std::string shown;  ///< what decoding sees: normalized content for normalized tokens
};

/// A post-processor: where the sequence goes (-1) among ids of special tokens.
using Template = std::vector<int64_t>;
constexpr int64_t kSequence = -1;

class Pipeline : public Tokenizer, public std::enable_shared_from_this<Pipeline> {
 public:
  std::vector<int64_t> encode(std::string_view text, bool add_special, bool parse_special) const override;
  std::string decode(std::span<const int64_t> ids, bool skip_special) const override;
  std::string piece(int64_t id) const override;
  std::optional<int64_t> id(std::string_view piece) const override;
  int64_t size() const override { return size_; }
  bool is_special(int64_t id) const override { return id >= 0 && id < size_ && skip_[static_cast<size_t>(id)]; }
  std::string kind() const override { return kind_; }
  std::optional<int64_t> bos() const override { return bos_; }
  std::optional<int64_t> eos() const override { return eos_; }
  std::optional<int64_t> pad() const override { return pad_; }
  std::optional<int64_t> unk() const override { return unk_; }
  std::string chat_template() const override { return chat_template_; }
  std::unique_ptr<Decoding> decoding(bool skip_special) const override;

  /// Adds or changes tokens; ids come from the vocabulary, new ones follow it, as in the tokenizers package.
  void add(std::vector<AddedToken> tokens);
  /// Once everything is set: builds the matchers and checks the ids that templates use.
  void finish();
  /// The vocabulary's text of an id; data() == nullptr when it has none.
  std::string_view text_of(int64_t id) const;

  std::string where_;
  Vocabulary vocabulary_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Normalizer> normalizer_;
  std::unique_ptr<PreTokenizer> pre_tokenizer_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<Template> templates_;
  std::string kind_;
  std::optional<int64_t> bos_, eos_, pad_, unk_;
  std::string chat_template_;

 private:
  void split_added(std::vector<Chunk>& chunks, const Trie& trie, bool parse_special) const;
  std::unique_ptr<Scratch> take_scratch() const;
  void give_scratch(std::unique_ptr<Scratch> scratch) const;

  std::vector<AddedToken> added_;
  std::unordered_map<std::string, size_t> added_by_content_;
  std::unordered_map<int64_t, size_t> added_by_id_;
  Trie raw_, normalized_;
  std::vector<bool> skip_;
  int64_t size_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> scratch_;
};

/// Reads what tokenizer_config.json adds: special tokens, added tokens, BOS/EOS where the pipeline adds none, chat
/// template.
void apply_config(Pipeline& pipeline, const nlohmann::json& config, const std::string& where);

}  // namespace moiety::tokenizer
