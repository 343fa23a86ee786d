#pragma once
// From prompts to text: prefill, sampling, stopping and streaming for a batch whose rows differ in length, settings and
// end.
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "moiety/decode/sampling.h"
#include "moiety/decode/session.h"
#include "moiety/decode/stop.h"
#include "moiety/io/checkpoint.h"
#include "moiety/io/tokenizer.h"

namespace moiety {

/// What a checkpoint says about how it wants to be decoded.
struct GenerationDefaults {
  SamplerConfig
      sampler;  ///< as transformers reads generation_config.json: greedy unless do_sample, top_k 50 when it samples
  std::optional<int64_t> max_new_tokens;
  std::vector<int64_t> eos;  ///< ids that end an answer

  /// `eos` comes from generation_config.json, else from config.json and the tokenizer. A GGUF file names one id only:
  /// the end-of-turn and end-of-text tokens that it marks as control tokens are added. Throws Error naming a key of the
  /// wrong type.
  static GenerationDefaults of(const Checkpoint& checkpoint, const Tokenizer& tokenizer);
};

struct Request {
  std::vector<int64_t> prompt;
  SamplerConfig sampler;
  uint64_t seed = 0;         ///< rows with one seed draw the same numbers
  int64_t max_tokens = 128;  ///< -1: until the context is full
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool skip_special = true;  ///< special tokens give no text
  int64_t logprobs = -1;     ///< -1: none; n: of every chosen token and of the n most probable
};

/// Log-probabilities are the model's own, before penalties, temperature and truncation.
struct Chosen {
  int64_t id = 0;
  double logprob = 0.0;
  std::vector<std::pair<int64_t, double>> top;
};

enum class Finish { eos, stop, length, context, cancelled };
/// "eos", "stop", "length", "context", "cancelled".
std::string to_string(Finish finish);

struct Completion {
  std::vector<int64_t> ids;  ///< all generated ids, the end token included
  std::string text;          ///< without the stop string
  Finish finish = Finish::length;
  std::string stop;              ///< the stop string that was met
  std::vector<Chosen> logprobs;  ///< one for each id, when asked for
};

struct GenerationStats {
  int64_t prompt_tokens = 0;  ///< of all rows
  int64_t reused_tokens = 0;  ///< of those: already in the cache
  int64_t generated_tokens = 0;
  double prompt_seconds = 0.0;
  double decode_seconds = 0.0;  ///< from the first token to the last
  double first_token_seconds = 0.0;
  double model_seconds = 0.0;  ///< of decode_seconds: inside the model
  int64_t decode_tokens = 0;   ///< tokens that decode_seconds covers (the first of each row comes out of the prompt)

  double prompt_rate() const;  ///< tokens a second that were really read
  double decode_rate() const;
  nlohmann::ordered_json json() const;
  std::string summary() const;  ///< one line for people
};

/// The output side of one row: ids in, text out, and whether it is over. Loops of other shapes (speculative, several
/// passes a token) use it as Generator does.
class Row {
 public:
  Row(const Request& request, std::shared_ptr<const Tokenizer> tokenizer, const std::vector<int64_t>& eos,
      int64_t context_length);

  /// Picks the next id from `logits` [V], which are overwritten, and accepts it.
  int64_t choose(std::span<float> logits);
  /// Takes one id and returns the text that may be shown now; sets over().
  std::string accept(int64_t id);
  /// Ends the row early and returns the text that was held back.
  std::string finish(Finish reason);
  bool over() const { return over_; }
  Completion take() { return std::move(out_); }

 private:
  std::string end(Finish reason);
  std::string fresh(std::string text);

  const Request& request_;
  const std::vector<int64_t>& eos_;
  DecodeStream stream_;
  StopStrings stops_;
  Sampler sampler_;
  int64_t room_;     ///< tokens until the context is full
  size_t lead_ = 0;  ///< bytes of the prompt that the stream still holds
  bool over_ = false;
  Completion out_;
};

struct Piece {
  size_t row;
  int64_t id;
  std::string_view text;  ///< new text, whole characters, may be empty
  bool last;              ///< the row is over
};
/// Called for every token of every row; false stops that row.
using OnPiece = std::function<bool(const Piece&)>;

class Generator {
 public:
  Generator(std::shared_ptr<const Tokenizer> tokenizer, std::vector<int64_t> eos)
      : tokenizer_(std::move(tokenizer)), eos_(std::move(eos)) {}

  /// Runs all requests as one batch over `steps`, which keeps what it can of an earlier run (a chat's history). Equal
  /// prompts are read once. Throws Error: an empty prompt, a bad setting, a prompt longer than the context.
  std::vector<Completion> run(Steps& steps, const std::vector<Request>& requests, const OnPiece& on_piece = {});
  const GenerationStats& stats() const { return stats_; }  ///< of the last run
  const std::vector<int64_t>& eos() const { return eos_; }

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::vector<int64_t> eos_;
  GenerationStats stats_;
};

}  // namespace moiety
