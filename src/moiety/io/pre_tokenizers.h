#pragma once
// Byte-level pre-tokenizers that GGUF knows by name (tokenizer.ggml.pre) and tokenizer.json spells out as rules.
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace moiety {

struct PreTokenizer {
  nlohmann::json rules;        ///< what tokenizer.json has under `pre_tokenizer`
  bool ignore_merges = false;  ///< a word that is in the vocabulary is taken whole
  bool nfc = false;            ///< text is normalized to NFC first
  bool bos = false;            ///< BOS is added unless the file says otherwise
};

/// The rules of a name; nullopt when moiety does not know it.
std::optional<PreTokenizer> pre_tokenizer(std::string_view gguf_name);
/// The name for the rules of a tokenizer.json; nullopt when GGUF has none that moiety knows.
std::optional<std::string> pre_tokenizer_name(const nlohmann::json& tokenizer);

}  // namespace moiety
