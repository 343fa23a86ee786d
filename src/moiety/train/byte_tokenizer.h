#pragma once
// The tokenizer that needs no training: one token a byte.
#include <nlohmann/json.hpp>

namespace moiety {

/// A tokenizer.json, byte-level BPE without merges: ids 0 ... 255 are the bytes, then <|begin|> (256), <|end|> (257)
/// and
/// <|pad|> (258). Loads in moiety and in the `tokenizers` package.
nlohmann::ordered_json byte_tokenizer();
/// The tokenizer_config.json that goes with it: names its special tokens.
nlohmann::ordered_json byte_tokenizer_config();
constexpr int64_t byte_tokenizer_size = 259;

}  // namespace moiety
