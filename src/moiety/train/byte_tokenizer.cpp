#include "moiety/train/byte_tokenizer.h"

#include <string>

namespace moiety {
namespace {

using Json = nlohmann::ordered_json;

const char* const kSpecial[] = {"<|begin|>", "<|end|>", "<|pad|>"};

// Byte-level BPE spells every byte as one printable character: itself where it is one, else the next of U+0100 ...
std::string spelled(int byte, int& next) {
  const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  const int code = printable ? byte : next++;
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

}  // namespace

Json byte_tokenizer() {
  Json vocabulary = Json::object(), added = Json::array();
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) vocabulary[spelled(byte, next)] = byte;
  for (int i = 0; i < 3; ++i)
    added.push_back({{"id", 256 + i},
                     {"content", kSpecial[i]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  const Json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer", level},
          {"post_processor", nullptr},
          {"decoder", level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocabulary},
            {"merges", Json::array()}}}};
}

Json byte_tokenizer_config() {
  return {{"tokenizer_class", "PreTrainedTokenizerFast"},
          {"bos_token", kSpecial[0]},
          {"eos_token", kSpecial[1]},
          {"pad_token", kSpecial[2]},
          {"clean_up_tokenization_spaces", false}};
}

}  // namespace moiety
