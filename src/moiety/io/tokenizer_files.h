#pragma once
// The tokenizer of a Hugging Face folder: tokenizer.json, or the files that came before it.
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "moiety/io/gguf_tokenizer.h"

namespace moiety {

/// Files of a tokenizer as they were before tokenizer.json. The JSON parts are {} when there is no such file.
struct VocabularyFiles {
  std::string kind;               ///< GPT2, Roberta, Qwen2 or Bert: a class of transformers without "Tokenizer"
  std::string vocabulary;         ///< vocab.json; of Bert vocab.txt, a piece a line
  std::string merges;             ///< merges.txt, "left right" a line; Bert has none
  nlohmann::json config;          ///< tokenizer_config.json
  nlohmann::json special_tokens;  ///< special_tokens_map.json
  nlohmann::json added_tokens;    ///< added_tokens.json: {"piece": id}
};

/// The tokenizer.json that transformers makes of them, with the special tokens in the config. `where` stands before
/// errors.
HfTokenizer from_vocabulary(const VocabularyFiles& files, const std::string& where);

/// What the folder says: tokenizer.json and its companions, else vocab.json with merges.txt, else vocab.txt, whose kind
/// follows from tokenizer_class in tokenizer_config.json or model_type in config.json. nullopt when there is none of
/// them; Error when there is one that is not read (SentencePiece's tokenizer.model, other kinds).
std::optional<HfTokenizer> read_tokenizer_files(const std::filesystem::path& folder);
/// The same with tokenizer.json under another name.
HfTokenizer read_tokenizer_json(const std::filesystem::path& json);

}  // namespace moiety
