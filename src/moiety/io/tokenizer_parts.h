#pragma once
// The parts of a tokenizer pipeline: vocabulary, models, normalizers, pre-tokenizers, decoders. Used by tokenizer*.cpp
// only.
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/io/piece_map.h"
#include "moiety/io/regex.h"

namespace moiety::tokenizer {

// ---- reading JSON ----

/// A JSON value with its place, for error messages ("tokenizer.json: model.merges[7]").
class Field {
 public:
  Field(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {}
  const nlohmann::json& json() const { return *value_; }
  const std::string& where() const { return where_; }
  bool has(const char* key) const { return value_->is_object() && value_->contains(key) && !value_->at(key).is_null(); }
  Field at(const char* key) const;
  Field at(size_t index) const;
  std::string string() const;
  bool boolean() const;
  int64_t integer() const;
  double number() const;
  std::string string(const char* key) const { return at(key).string(); }
  std::string string(const char* key, const std::string& otherwise) const { return has(key) ? string(key) : otherwise; }
  bool boolean(const char* key, bool otherwise) const { return has(key) ? at(key).boolean() : otherwise; }
  int64_t integer(const char* key, int64_t otherwise) const { return has(key) ? at(key).integer() : otherwise; }
  /// One character.
  char32_t character(const char* key) const;
  const nlohmann::json::array_t& array() const;
  const nlohmann::json::object_t& object() const;
  [[noreturn]] void expected(std::string_view what) const;

 private:
  const nlohmann::json* value_;
  std::string where_;
};

// ---- vocabulary ----

/// Pieces by id. The bytes live in `owners` (copied strings, or the mapped file they came from).
struct Vocabulary {
  std::vector<std::string_view> pieces;  ///< data() == nullptr: no piece has this id
  PieceMap ids;
  std::vector<std::shared_ptr<const void>> owners;

  /// Copies the pieces: few allocations, whatever their number.
  void assign(const std::vector<std::pair<std::string_view, int64_t>>& entries, const std::string& where);
  bool has(int64_t id) const {
    return id >= 0 && id < static_cast<int64_t>(pieces.size()) && pieces[static_cast<size_t>(id)].data();
  }
};

/// Trie over byte strings: children of a node lie together, sorted.
class Trie {
 public:
  /// Values are the ids; of equal strings the last one wins.
  void build(std::vector<std::pair<std::string_view, int32_t>> entries);
  bool empty() const { return nodes_.empty(); }
  /// Child of node `at` (0 is the root) for `byte`, 0 when there is none.
  uint32_t child(uint32_t at, unsigned char byte) const;
  int32_t value(uint32_t at) const { return nodes_[at].value; }

 private:
  struct Node {
    uint32_t first = 0;
    int32_t value = -1;
    uint16_t count = 0;
    unsigned char label = 0;
  };
  std::vector<Node> nodes_;
  std::vector<uint32_t> root_;
};

// ---- text on its way through the pipeline ----

/// A piece of text. `zero` leading bytes come from the first character of the original text: Metaspace's scheme "first"
/// asks.
struct Chunk {
  std::string text;
  size_t zero = 0;
  bool first = false;  ///< starts where the original text starts
  int64_t token = -1;  ///< an added token: done
};

/// What an encode call works with; pooled, so that caches live on from call to call.
struct Scratch {
  struct Symbol {
    int32_t id;
    int32_t prev, next;
    uint32_t begin, size;
  };
  struct Candidate {
    uint32_t rank;
    uint32_t position;
    uint32_t id;
  };
  struct Scored {
    float score;
    uint32_t position;
    uint32_t size;
  };
  struct Cached {
    std::string word;
    std::vector<int32_t> ids;
  };
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
  std::vector<Scored> scored;
  std::vector<Cached> cache;  ///< direct mapped
  std::string buffer;
};

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void apply(Chunk& chunk) const = 0;
};
/// nullptr for null.
std::unique_ptr<Normalizer> make_normalizer(const Field& field, int depth = 0);

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void apply(std::vector<Chunk>& chunks) const = 0;
};
std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Field& field, int depth = 0);

/// Built in C++ for GGUF files: the same parts without a JSON file.
std::unique_ptr<Normalizer> make_normalizer(const nlohmann::json& json);
std::unique_ptr<PreTokenizer> make_pre_tokenizer(const nlohmann::json& json);
std::unique_ptr<Normalizer> make_precompiled(std::string bytes, const std::string& where);

class Model {
 public:
  virtual ~Model() = default;
  virtual void tokenize(std::string_view word, Scratch& scratch, std::vector<int64_t>& out) const = 0;
};

struct BpeOptions {
  std::string unk, prefix, suffix;
  bool fuse_unk = false, byte_fallback = false, ignore_merges = false;
};
using Merges = std::vector<std::pair<std::string_view, std::string_view>>;
std::unique_ptr<Model> make_bpe(const Vocabulary& vocabulary, const Merges& merges, BpeOptions options,
                                const std::string& where);
/// SentencePiece BPE: the best-scored neighbours merge first.
std::unique_ptr<Model> make_scored_bpe(const Vocabulary& vocabulary, std::vector<float> scores, int64_t unk,
                                       const std::string& where);
std::unique_ptr<Model> make_unigram(const Vocabulary& vocabulary, std::vector<double> scores,
                                    std::optional<int64_t> unk, bool byte_fallback, const std::string& where);
std::unique_ptr<Model> make_wordpiece(const Vocabulary& vocabulary, const std::string& unk, const std::string& prefix,
                                      size_t longest_word, const std::string& where);
std::unique_ptr<Model> make_wordlevel(const Vocabulary& vocabulary, const std::string& unk, const std::string& where);

/// One decoder at work on one sequence. Tokens go in as they come; text comes out as soon as nothing that follows can
/// change it.
class Stage {
 public:
  virtual ~Stage() = default;
  /// A token, or with `joined` more text of the same token.
  virtual void push(std::string_view token, bool joined) = 0;
  virtual void finish() { next->finish(); }
  Stage* next = nullptr;
};
/// Builds the stages of a decoder, first to last; the last one's output is what make_sink collects.
class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual void stages(std::vector<std::unique_ptr<Stage>>& out) const = 0;
};
std::unique_ptr<Decoder> make_decoder(const Field& field, int depth = 0);
std::unique_ptr<Decoder> make_decoder(const nlohmann::json& json);

/// Byte level: the characters that stand for the 256 bytes.
const std::string& byte_char(unsigned char byte);
int byte_of_char(char32_t c);  ///< -1: stands for none
void to_byte_level(std::string_view text, std::string& out);

constexpr int kMaxDepth = 32;

}  // namespace moiety::tokenizer
