#include "moiety/io/tokenizer.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "moiety/base/error.h"
#include "moiety/io/gguf.h"
#include "moiety/io/regex.h"
#include "moiety/io/unicode.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

fs::path fixtures() {
  return fs::path(MOIETY_SOURCE_DIR) / "tests/data/tokenizers";
}

json read_json(const fs::path& path) {
  std::ifstream in(path);
  return json::parse(in);
}
json fixture(const std::string& name) {
  return read_json(fixtures() / (name + ".json"));
}

std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

std::string streamed(const std::shared_ptr<const Tokenizer>& tokenizer, const std::vector<int64_t>& ids, bool skip) {
  DecodeStream stream(tokenizer, skip);
  std::string out;
  for (const auto id : ids) {
    const std::string part = stream.push(id);
    EXPECT_EQ(unicode::sanitize(part), part) << "half a character came out";
    out += part;
  }
  return out + stream.flush();
}

class Fixture : public testing::TestWithParam<std::string> {};

// Expected ids and texts were written by the tokenizers package (tools/tokenizer_parity.py --fixtures).
TEST_P(Fixture, EqualsTokenizersPackage) {
  const auto tokenizer = Tokenizer::from_json(fixture(GetParam()));
  std::ifstream lines(fixtures() / (GetParam() + ".jsonl"));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const json want = json::parse(line);
    const auto ids = tokenizer->encode(from_hex(want["hex"]));
    ASSERT_EQ(ids, want["ids"].get<std::vector<int64_t>>()) << want["hex"];
    EXPECT_EQ(tokenizer->decode(ids), want["text"].get<std::string>()) << want["hex"];
    EXPECT_EQ(tokenizer->decode(ids, true), want["skip"].get<std::string>()) << want["hex"];
    EXPECT_EQ(streamed(tokenizer, ids, false), want["text"].get<std::string>()) << want["hex"];
    EXPECT_EQ(streamed(tokenizer, ids, true), want["skip"].get<std::string>()) << want["hex"];
  }
  EXPECT_GE(count, 100);
}

std::vector<std::string> fixture_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(fixtures()))
    if (entry.path().extension() == ".json") names.push_back(entry.path().stem());
  std::sort(names.begin(), names.end());
  return names;
}
INSTANTIATE_TEST_SUITE_P(Tokenizers, Fixture, testing::ValuesIn(fixture_names()), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

RC_GTEST_PROP(TokenizerProperty, ByteLevelReturnsEveryText, (const std::string& bytes)) {
  static const auto tokenizer = Tokenizer::from_json(fixture("gpt2"));
  const std::string text = unicode::sanitize(bytes);
  const auto ids = tokenizer->encode(bytes);
  RC_ASSERT(tokenizer->decode(ids) == text);
  RC_ASSERT(tokenizer->encode(text) == ids);
}

RC_GTEST_PROP(TokenizerProperty, StreamEqualsDecode, (const std::vector<uint16_t>& raw, bool skip)) {
  static const std::vector<std::shared_ptr<const Tokenizer>> all = [] {
    std::vector<std::shared_ptr<const Tokenizer>> out;
    for (const auto& name : fixture_names()) out.push_back(Tokenizer::from_json(fixture(name)));
    return out;
  }();
  for (const auto& tokenizer : all) {
    std::vector<int64_t> ids;
    for (const auto r : raw) ids.push_back(r % tokenizer->size());
    RC_ASSERT(streamed(tokenizer, ids, skip) == tokenizer->decode(ids, skip));
  }
}

// The SentencePiece alphabet of bytes: any text comes back, whatever the vocabulary.
RC_GTEST_PROP(TokenizerProperty, ByteFallbackReturnsEveryText, (const std::string& bytes)) {
  static const auto tokenizer = Tokenizer::from_json(fixture("gemma"));
  const std::string text = unicode::sanitize(bytes);
  // U+2581 stands for the space.
  RC_PRE(text.find("\xE2\x96\x81") == std::string::npos);
  RC_ASSERT(tokenizer->decode(tokenizer->encode(bytes, false, false)) == text);
}

TEST(Tokenizer, SpecialTokensInText) {
  const auto tokenizer = Tokenizer::from_json(fixture("gpt2"));
  const auto end = tokenizer->id("<|endoftext|>");
  ASSERT_TRUE(end.has_value());
  EXPECT_EQ(tokenizer->encode("<|endoftext|>"), std::vector<int64_t>{*end});
  EXPECT_GT(tokenizer->encode("<|endoftext|>", true, false).size(), 1u);
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("<|endoftext|>", true, false), true), "<|endoftext|>");
  EXPECT_TRUE(tokenizer->is_special(*end));
  EXPECT_FALSE(tokenizer->is_special(tokenizer->size() + 5));
  EXPECT_EQ(tokenizer->decode(std::vector<int64_t>{*end}, true), "");
  EXPECT_EQ(tokenizer->piece(*end), "<|endoftext|>");
  EXPECT_EQ(tokenizer->kind(), "BPE (byte-level)");
  EXPECT_THROW(tokenizer->piece(tokenizer->size()), Error);
  EXPECT_EQ(tokenizer->decode(std::vector<int64_t>{-1, 1 << 30}), "");
}

TEST(Tokenizer, ConfigAddsWhatTheFileLeavesOut) {
  const json config = {
      {"bos_token", {{"content", "<|im_start|>"}}},
      {"eos_token", "<|im_end|>"},
      {"add_bos_token", true},
      {"add_eos_token", true},
      {"chat_template", {{{"name", "tool"}, {"template", "T"}}, {{"name", "default"}, {"template", "D"}}}},
      {"added_tokens_decoder", {{"7", {{"content", "q"}, {"special", true}}}, {"9000", {{"content", "<new>"}}}}}};
  const auto tokenizer = Tokenizer::from_json(fixture("gpt2"), config);
  EXPECT_EQ(tokenizer->bos(), tokenizer->id("<|im_start|>"));
  EXPECT_EQ(tokenizer->eos(), tokenizer->id("<|im_end|>"));
  EXPECT_EQ(tokenizer->chat_template(), "D");
  const auto ids = tokenizer->encode("x<new>");
  ASSERT_EQ(ids.size(), 4u);
  EXPECT_EQ(ids.front(), *tokenizer->bos());
  EXPECT_EQ(ids.back(), *tokenizer->eos());
  EXPECT_EQ(ids[2], *tokenizer->id("<new>"));
  EXPECT_EQ(*tokenizer->id("<new>"), tokenizer->size() - 1);
  EXPECT_TRUE(tokenizer->is_special(*tokenizer->id("q")));
}

TEST(Tokenizer, LongRunsAreNotQuadratic) {
  for (const char* name : {"gpt2", "llama2-first", "gemma", "t5", "wordpiece-uncased", "llama3"}) {
    const auto tokenizer = Tokenizer::from_json(fixture(name));
    const auto start = std::chrono::steady_clock::now();
    for (const char c : {'a', ' ', '\n', '.'}) EXPECT_FALSE(tokenizer->encode(std::string(1 << 20, c)).empty());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // Quadratic behaviour takes minutes; a loaded machine or sanitizers take a few seconds.
    EXPECT_LT(seconds, 60) << name;
  }
}

TEST(Tokenizer, ManyThreadsShareOne) {
  const auto tokenizer = Tokenizer::from_json(fixture("llama3"));
  const std::string text = "def f(x):\n    return x + 1  # Größe, 漢字, 👍🏽\n";
  const auto want = tokenizer->encode(text);
  std::vector<std::thread> threads;
  std::vector<int> bad(8, 0);
  for (size_t t = 0; t < bad.size(); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) bad[t] += tokenizer->encode(text) != want;
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(bad, std::vector<int>(8, 0));
}

// ---- GGUF ----

struct TemporaryFile {
  fs::path path = fs::temp_directory_path() / ("moiety-tokenizer-test-" + std::to_string(::getpid()) + ".gguf");
  ~TemporaryFile() { fs::remove(path); }
};

std::vector<std::string> pieces_of(const json& tokenizer) {
  std::vector<std::string> pieces(tokenizer["model"]["vocab"].size());
  for (const auto& [piece, id] : tokenizer["model"]["vocab"].items()) pieces.at(id.get<size_t>()) = piece;
  return pieces;
}

void expect_equal_on_fixture(const Tokenizer& tokenizer, const std::string& name) {
  std::ifstream lines(fixtures() / (name + ".jsonl"));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const json want = json::parse(line);
    const auto ids = tokenizer.encode(from_hex(want["hex"]));
    ASSERT_EQ(ids, want["ids"].get<std::vector<int64_t>>()) << want["hex"];
    EXPECT_EQ(tokenizer.decode(ids), want["text"].get<std::string>()) << want["hex"];
  }
  EXPECT_GE(count, 100);
}

TEST(TokenizerGguf, ByteLevelEqualsItsJson) {
  const json source = fixture("llama3");
  const auto pieces = pieces_of(source);
  std::vector<std::string> merges;
  for (const auto& m : source["model"]["merges"])
    merges.push_back(m[0].get<std::string>() + " " + m[1].get<std::string>());
  std::vector<int32_t> types;
  for (const auto& p : pieces) types.push_back(p.starts_with("<|") ? 3 : 1);
  const TemporaryFile file;
  GgufWriter writer(file.path);
  writer.set("general.architecture", "llama");
  writer.set("tokenizer.ggml.model", "gpt2");
  writer.set("tokenizer.ggml.pre", "llama-bpe");
  writer.set("tokenizer.chat_template", "{{ messages }}");
  writer.set_array("tokenizer.ggml.tokens", pieces);
  writer.set_array("tokenizer.ggml.merges", merges);
  writer.set_array_i32("tokenizer.ggml.token_type", types);
  writer.set_u32("tokenizer.ggml.bos_token_id", source["model"]["vocab"]["<|im_start|>"].get<uint32_t>());
  writer.finish();
  const auto tokenizer = Tokenizer::from_gguf(*GgufFile::open(file.path));
  EXPECT_EQ(tokenizer->chat_template(), "{{ messages }}");
  expect_equal_on_fixture(*tokenizer, "llama3");
}

TEST(TokenizerGguf, ScoresEqualMerges) {
  const auto pieces = pieces_of(fixture("llama2-legacy"));
  std::vector<int32_t> types;
  std::vector<float> scores;
  for (size_t i = 0; i < pieces.size(); ++i) {
    types.push_back(i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1);
    scores.push_back(i < 259 ? 0.0f : -static_cast<float>(i - 259));
  }
  const TemporaryFile file;
  GgufWriter writer(file.path);
  writer.set("general.architecture", "llama");
  writer.set("tokenizer.ggml.model", "llama");
  writer.set_array("tokenizer.ggml.tokens", pieces);
  writer.set_array_f32("tokenizer.ggml.scores", scores);
  writer.set_array_i32("tokenizer.ggml.token_type", types);
  writer.set_u32("tokenizer.ggml.bos_token_id", 1);
  writer.set_u32("tokenizer.ggml.eos_token_id", 2);
  writer.set_u32("tokenizer.ggml.unknown_token_id", 0);
  writer.finish();
  const auto tokenizer = Tokenizer::from_gguf(*GgufFile::open(file.path));
  EXPECT_EQ(tokenizer->kind(), "BPE (SentencePiece)");
  expect_equal_on_fixture(*tokenizer, "llama2-legacy");
}

TEST(TokenizerGguf, UnknownKindsAreErrors) {
  const auto message = [](const char* model, const char* pre, size_t types) -> std::string {
    const TemporaryFile file;
    GgufWriter writer(file.path);
    writer.set("general.architecture", "llama");
    writer.set("tokenizer.ggml.model", model);
    writer.set("tokenizer.ggml.pre", pre);
    writer.set_array("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b", "ab"});
    writer.set_array("tokenizer.ggml.merges", std::vector<std::string>{"a b"});
    writer.set_array_i32("tokenizer.ggml.token_type", std::vector<int32_t>(types, 1));
    writer.finish();
    try {
      Tokenizer::from_gguf(*GgufFile::open(file.path));
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message("gpt2", "gpt-2", 3), "");
  EXPECT_NE(message("magic", "gpt-2", 3).find("magic"), std::string::npos);
  EXPECT_NE(message("gpt2", "wand", 3).find("wand"), std::string::npos);
  EXPECT_NE(message("gpt2", "gpt-2", 2).find("token_type"), std::string::npos);
  EXPECT_NE(message("llama", "", 3).find("scores"), std::string::npos);
}

// ---- malformed files ----

std::string message_of(const json& tokenizer, const json& config = json::object()) {
  try {
    Tokenizer::from_json(tokenizer, config);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(TokenizerErrors, NameThePlace) {
  const json good = fixture("gpt2");
  const auto with = [&](const std::string& pointer, json value) {
    json j = good;
    j[json::json_pointer(pointer)] = std::move(value);
    return message_of(j);
  };
  EXPECT_EQ(message_of(good), "");
  EXPECT_NE(message_of(json::array()), "");
  EXPECT_NE(message_of(json::object()).find("model"), std::string::npos);
  EXPECT_NE(with("/model/type", "Magic").find("Magic"), std::string::npos);
  EXPECT_NE(with("/model/vocab", 7).find("model.vocab"), std::string::npos);
  EXPECT_NE(with("/model/vocab/e", "seven").find("model.vocab"), std::string::npos);
  EXPECT_NE(with("/model/vocab/e", 1e300), "");
  EXPECT_NE(with("/model/vocab/e", -1).find("-1"), std::string::npos);
  EXPECT_NE(with("/model/vocab/e", 4'000'000'000u).find("4000000000"), std::string::npos);
  EXPECT_NE(with("/model/vocab/e", UINT64_MAX), "");
  EXPECT_NE(with("/model/merges/0", "nosuch piece").find("nosuch"), std::string::npos);
  EXPECT_NE(with("/model/merges/0", "onepiece").find("merges[0]"), std::string::npos);
  EXPECT_NE(with("/model/merges/0", json::array({"a", 1})).find("merges[0]"), std::string::npos);
  EXPECT_NE(with("/model/merges", json::object()), "");
  EXPECT_NE(with("/added_tokens", "x"), "");
  EXPECT_NE(with("/added_tokens/0/id", 1LL << 40).find("added_tokens[0].id"), std::string::npos);
  EXPECT_NE(with("/added_tokens/0/content", 5).find("added_tokens[0].content"), std::string::npos);
  EXPECT_NE(with("/decoder", {{"type", "Nothing"}}).find("Nothing"), std::string::npos);
  EXPECT_NE(with("/normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", "(["}}}, {"content", ""}}), "");
  EXPECT_NE(with("/normalizer", {{"type", "Precompiled"}, {"precompiled_charsmap", "AAAA"}}), "");
  EXPECT_NE(with("/normalizer", {{"type", "Precompiled"}, {"precompiled_charsmap", "/////w=="}}), "");
  EXPECT_NE(
      with("/post_processor", {{"type", "BertProcessing"}, {"sep", {"x", 99999}}, {"cls", {"x", 0}}}).find("99999"),
      std::string::npos);
  EXPECT_NE(with("/post_processor",
                 {{"type", "TemplateProcessing"}, {"single", "$A <x>"}, {"special_tokens", json::object()}}),
            "");
  EXPECT_NE(message_of(good, {{"added_tokens_decoder", {{"x1", {{"content", "y"}}}}}}).find("x1"), std::string::npos);
  json unigram = fixture("t5");
  unigram["model"]["unk_id"] = 1'000'000;
  EXPECT_NE(message_of(unigram).find("1000000"), std::string::npos);
}

TEST(TokenizerErrors, DepthIsBounded) {
  for (const char* key : {"normalizer", "pre_tokenizer", "decoder", "post_processor"}) {
    json j = fixture("gpt2");
    json nested = nullptr;
    const std::string list = std::string(key) == "normalizer"      ? "normalizers"
                             : std::string(key) == "pre_tokenizer" ? "pretokenizers"
                             : std::string(key) == "decoder"       ? "decoders"
                                                                   : "processors";
    for (int i = 0; i < 2000; ++i) {
      json outer = {{"type", "Sequence"}};
      outer[list] = json::array();
      outer[list].push_back(std::move(nested));
      nested = std::move(outer);
    }
    j[key] = std::move(nested);
    EXPECT_NE(message_of(j).find("deep"), std::string::npos) << key;
  }
}

// ---- parts ----

TEST(Unicode, SanitizeReplacesMaximalSequences) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(unicode::sanitize("a\xFF"
                              "b"),
            "a" + r + "b");
  EXPECT_EQ(unicode::sanitize("\xE2\x82"), r);
  EXPECT_EQ(unicode::sanitize("\xE2\x28"), r + "(");
  EXPECT_EQ(unicode::sanitize("\xED\xA0\x80"), r + r + r);
  EXPECT_EQ(unicode::sanitize("\xF0\x9F\x98"), r);
  EXPECT_EQ(unicode::sanitize("\xF0\x9F\x98\xF0\x9F\x98\x80"), r + "\xF0\x9F\x98\x80");
  EXPECT_EQ(unicode::sanitize("\xC0\xAF\xF5\x80"), r + r + r + r);
}

TEST(Regex, MeansWhatOnigurumaMeans) {
  const auto first = [](const char* pattern, std::string_view text) {
    const Regex regex(pattern, "test");
    Regex::Matches m(regex, text);
    size_t a = 0, b = 0;
    return m.next(a, b) ? std::string(text.substr(a, b - a)) : std::string("none");
  };
  EXPECT_EQ(first("\\h+", "xyzBEEF!"), "BEEF");
  EXPECT_EQ(first("[^\\S\\n]+", "a\n \tb"), " \t");
  EXPECT_EQ(first("[a-z&&[^aeiou]]+", "aeixyz"), "xyz");
  EXPECT_EQ(first("\\s", "\xE1\xA0\x8E"), "none");                       // U+180E is no space
  EXPECT_EQ(first("\\p{L}+", "1\xF0\x90\xB5\x90"), "\xF0\x90\xB5\x90");  // U+10D50, a letter since Unicode 16
  EXPECT_EQ(first("\\P{L}", "\xF0\x90\xB5\x90"), "none");
  EXPECT_EQ(first("\\p{Han}+", "\xE3\x80\x82\xE4\xB8\xAD"), "\xE4\xB8\xAD");  // U+3002 is shared by scripts
  EXPECT_EQ(first("a{,2}b", "aaab"), "aab");
  EXPECT_EQ(first("(?m:a.b)", "a\nb"), "a\nb");
  EXPECT_EQ(first("(?i:'s)", "'\xC5\xBF"), "'\xC5\xBF");  // the long s folds to s
  EXPECT_THROW(Regex("(", "here"), Error);
  EXPECT_THROW(Regex("\\p{Nonsense}", "here"), Error);
  EXPECT_THROW(Regex("[a", "here"), Error);
  EXPECT_THROW(Regex("\xFF", "here"), Error);
  EXPECT_THROW(Regex(std::string(1000, '('), "here"), Error);
}

TEST(Regex, RunawayMatchesEndInAnError) {
  const Regex regex("(a|aa)+$", "here");
  const std::string text = std::string(60, 'a') + "!" + std::string(5000, 'a') + "?";
  Regex::Matches m(regex, text);
  size_t a, b;
  EXPECT_THROW(while (m.next(a, b)){}, Error);
}

}  // namespace
}  // namespace moiety
