#pragma once
// Tokenizers between the two worlds: tokenizer.json and its companions <-> tokenizer.* keys of a GGUF file.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/gguf.h"

namespace moiety {

/// What an HF folder says about its tokenizer.
struct HfTokenizer {
  nlohmann::json tokenizer;       ///< tokenizer.json
  nlohmann::json config;          ///< tokenizer_config.json, {} when there is none
  std::string chat_template;      ///< Jinja source, "" when the model has none
  nlohmann::json special_tokens;  ///< special_tokens_map.json, {} when there is none
};

/// Declares the tokenizer's keys. `model_config` is config.json (for ids that the tokenizer does not name); the token
/// list is filled up to `vocabulary` entries, for embeddings may have more rows than the tokenizer has tokens. Returns
/// warnings: what GGUF cannot say. Throws Error naming the key for a tokenizer.json of another kind or with ids that
/// cannot be.
std::vector<std::string> write_gguf_tokenizer(GgufWriter& writer, const HfTokenizer& tokenizer,
                                              const nlohmann::json& model_config, int64_t vocabulary);

/// The equivalent files of a GGUF tokenizer, for `tokenizers` and transformers. Throws Error when it has none or of an
/// unknown kind. What GGUF does not keep is filled in as that kind usually has it (WordPiece: lower case unless the
/// vocabulary has capitals).
HfTokenizer hf_tokenizer(const GgufFile& file);

}  // namespace moiety
