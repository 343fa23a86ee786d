#include "moiety/io/pre_tokenizers.h"

#include <array>
#include <vector>

using nlohmann::json;

namespace moiety {
namespace {

// The expressions of tokenizer.json files, as published with the models.
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kO200k =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDeepSeek3 =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen35 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kBloom = " ?[^(\\s|.,!?…。，、।۔،)]+";
constexpr const char* kBailing =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";
constexpr const char* kSeedCoder =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kKimi =
    R"([\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDeepSeekLetters =
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-"
    "ὅὈ-"
    "Ὅὐ-"
    "ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-"
    "ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-"
    "𐓻𐲀-"
    "𐲲𐳀-"
    "𐳲𑢠-𑣟𞤀-𞥃]+";

json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}
json split(const char* expression) {
  return {{"type", "Split"}, {"pattern", {{"Regex", expression}}}, {"behavior", "Isolated"}, {"invert", false}};
}
json digits() {
  return {{"type", "Digits"}, {"individual_digits", true}};
}
json sequence(std::vector<json> steps) {
  return {{"type", "Sequence"}, {"pretokenizers", std::move(steps)}};
}

struct Named {
  const char* name;
  PreTokenizer value;
};

/// The first of equal rules is the name that is written; the others are read.
const std::vector<Named>& table() {
  static const std::vector<Named> all = [] {
    const json llama3 = sequence({split(kLlama3), byte_level(false)});
    const json qwen2 = sequence({split(kQwen2), byte_level(false)});
    const json single_digits = sequence({digits(), byte_level(true)});
    const json gpt2 = byte_level(true);
    const json o200k = sequence({split(kO200k), byte_level(false)});
    const json deepseek_llm =
        sequence({split("[\r\n]"), split(kDeepSeekLetters), split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"), split("\\s+$"),
                  split("[一-龥ࠀ-一가-퟿]+"), digits(), byte_level(false)});
    const json deepseek_coder = sequence({split("[\r\n]"), split("\\s?\\p{L}+"), split("\\s?\\p{P}+"),
                                          split("[一-龥ࠀ-一가-퟿]+"), digits(), byte_level(false)});
    const json deepseek3 =
        sequence({split("\\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(kDeepSeek3), byte_level(false)});
    return std::vector<Named>{
        {"gpt-2", {gpt2}},
        {"smollm", {single_digits}},
        {"llama-bpe", {llama3, true, false, true}},
        {"dbrx", {llama3}},
        {"qwen2", {qwen2, false, true}},
        {"stablelm2", {qwen2}},
        {"gpt-4o", {o200k}},
        {"tekken", {sequence({split(kTekken), byte_level(false)}), true, false, true}},
        {"deepseek-llm", {deepseek_llm}},
        {"deepseek-coder", {deepseek_coder}},
        {"deepseek-v3", {deepseek3}},
        {"starcoder", {single_digits}},
        {"refact", {single_digits}},
        {"command-r", {single_digits}},
        {"codeshell", {single_digits}},
        {"exaone", {single_digits}},
        {"minerva-7b", {single_digits}},
        {"llama3", {llama3, true, false, true}},
        {"llama-v3", {llama3, true, false, true}},
        {"falcon3", {llama3, true, false, true}},
        {"pixtral", {llama3, true, false, true}},
        {"smaug-bpe", {llama3}},
        {"falcon-h1", {llama3, true, false, true}},
        {"midm-2.0", {llama3, true, false, true}},
        {"lfm2", {llama3, true, false, true}},
        {"chatglm-bpe", {llama3}},
        {"glm4", {llama3}},

        {"deepseek-r1-qwen", {qwen2}},
        {"megrez", {qwen2}},
        {"hunyuan", {qwen2}},
        {"solar-open", {qwen2}},
        {"grok-2", {qwen2}},
        {"qwen35", {sequence({split(kQwen35), byte_level(false)}), false, true}},
        {"seed-coder", {sequence({split(kSeedCoder), byte_level(false)})}},
        {"bailingmoe", {sequence({split(kBailing), byte_level(false)})}},
        {"llada-moe", {sequence({split(kBailing), byte_level(false)})}},

        {"olmo", {gpt2}},
        {"jais", {gpt2}},
        {"phi-2", {gpt2}},
        {"mpt", {gpt2}},
        {"jina-v2-en", {gpt2}},
        {"roberta-bpe", {gpt2}},
        {"exaone4", {gpt2}},
        {"gigachat", {gpt2}},
        {"trillion", {gpt2}},
        {"granite-docling", {gpt2}},
        {"modern-bert", {gpt2}},
        {"jina-v2-code", {gpt2}},
        {"llama4", {o200k}},
        {"minimax-m2", {o200k}},
        {"kimi-k2", {sequence({split(kKimi), byte_level(false)})}},
        {"tiny_aya", {sequence({split(R"(\d{1,3}(?=(?:\d{3})*\b))"), split(kO200k), byte_level(false)})}},
        {"mellum2", {single_digits}},
        {"hunyuan-dense", {deepseek3}},
        {"falcon",
         {sequence({split(R"([\p{P}\$\+<=>\^~\|`]+)"), split(kGpt2), split("[0-9][0-9][0-9]"), byte_level(false)})}},
        {"bloom", {sequence({split(kBloom), byte_level(false)})}},
        {"gpt3-finnish", {sequence({split(kBloom), byte_level(false)})}},
        {"poro-chat", {sequence({split(kBloom), byte_level(false)})}},
        {"viking", {sequence({split(kBloom), split("\\p{N}"), byte_level(false)})}},
        {"superbpe", {sequence({split("\\p{N}+"), split(R"((?=(\d{3})+(?!\d)))"), byte_level(false)})}},
        {"default",
         {sequence({split(R"([\p{P}\$\+<=>\^~\|]+)"), split(kGpt2), split("\\p{N}+"), split("[0-9][0-9][0-9]"),
                    byte_level(false)})}},
    };
  }();
  return all;
}

/// Rules without what does not change how text is cut, in one form.
json canonical(const json& rules) {
  if (!rules.is_object()) return rules;
  const std::string type = rules.value("type", "");
  if (type == "Sequence") {
    json steps = json::array();
    for (const auto& step : rules.value("pretokenizers", json::array())) steps.push_back(canonical(step));
    return steps.size() == 1 ? steps[0] : json{{"type", "Sequence"}, {"pretokenizers", steps}};
  }
  if (type == "ByteLevel") return byte_level(rules.value("use_regex", true) == true);
  if (type == "Split") {
    json out = {
        {"type", "Split"}, {"pattern", rules.value("pattern", json())}, {"behavior", "Isolated"}, {"invert", false}};
    // "Removed" with "invert" keeps the matches, which is "Isolated" when the expression matches everything.
    if (rules.value("behavior", "") != "Isolated" && rules.value("invert", false) != true)
      out["behavior"] = rules.value("behavior", "");
    return out;
  }
  if (type == "Digits") return {{"type", "Digits"}, {"individual_digits", rules.value("individual_digits", false)}};
  return rules;
}

}  // namespace

std::optional<PreTokenizer> pre_tokenizer(std::string_view gguf_name) {
  for (const auto& n : table())
    if (n.name == gguf_name) return n.value;
  return std::nullopt;
}

std::optional<std::string> pre_tokenizer_name(const json& tokenizer) {
  const auto rules = tokenizer.find("pre_tokenizer");
  if (rules == tokenizer.end()) return std::nullopt;
  const json wanted = canonical(*rules);
  const auto model = tokenizer.find("model");
  const bool ignore_merges =
      model != tokenizer.end() && model->is_object() && model->value("ignore_merges", json()) == true;
  const auto normalizer = tokenizer.find("normalizer");
  const bool nfc = normalizer != tokenizer.end() && normalizer->is_object() && normalizer->value("type", "") == "NFC";
  const Named* near = nullptr;
  for (const auto& n : table()) {
    if (canonical(n.value.rules) != wanted) continue;
    if (n.value.ignore_merges == ignore_merges && n.value.nfc == nfc) return n.name;
    if (!near && n.value.nfc == nfc) near = &n;
  }
  if (near) return near->name;
  return std::nullopt;
}

}  // namespace moiety
