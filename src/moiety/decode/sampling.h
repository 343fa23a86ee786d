#pragma once
// Choosing the next token from logits [V] f32: penalties, temperature and truncation with the semantics and in the
// order of transformers' LogitsProcessor classes: logit bias, repetition penalty (CTRL, arXiv 1909.05858), frequency
// and presence penalties (OpenAI API), temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082), locally
// typical (arXiv 2202.00666). Nothing here needs torch, and nothing sorts a vocabulary of which only the head is kept.
#include <cstdint>
#include <map>
#include <span>
#include <unordered_map>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/base/random.h"

namespace moiety {

struct SamplerConfig {
  bool greedy = true;        ///< take the largest logit (after bias and penalties), the lowest index on a tie
  double temperature = 1.0;  ///< 0 is greedy
  int64_t top_k = 0;         ///< keep the k largest (and what equals the last of them); 0: off
  double top_p = 1.0;        ///< keep the smallest head whose mass reaches p; 1: off
  double min_p = 0.0;        ///< keep what has at least this share of the largest probability; 0: off
  double typical_p = 1.0;    ///< keep what is nearest to the entropy, up to this mass; 1: off
  double repetition_penalty =
      1.0;  ///< divides positive and multiplies negative logits of tokens seen, the prompt included
  double frequency_penalty = 0.0;  ///< subtracted once for each time a token was generated (the prompt does not count)
  double presence_penalty = 0.0;   ///< subtracted once from tokens generated at least once
  std::map<int64_t, double> logit_bias;  ///< added to the logits of token ids; -inf bans a token

  bool is_greedy() const { return greedy || temperature == 0.0; }
  bool processes() const;  ///< false when logits pass through unchanged
  void fields(Fields& f);
  /// Throws Error naming the field, its value and what is allowed.
  void validate() const;
};

/// The index of the largest value, the lowest on a tie; NaN never wins. Throws Error when no value is a number.
int64_t argmax(std::span<const float> values);
/// The k largest values with their indices, largest first, ties by lower index.
std::vector<std::pair<int64_t, float>> top(std::span<const float> values, int64_t k);
/// log(sum(exp(values))).
double log_sum_exp(std::span<const float> values);

/// The sampler of one sequence: its settings, its random numbers and what it has seen.
class Sampler {
 public:
  Sampler(SamplerConfig config, RandomStream random);

  void see_prompt(std::span<const int64_t> ids);  ///< counts for the repetition penalty only
  void accept(int64_t id);                        ///< a token was generated
  /// Picks the next token. `logits` is overwritten. Throws Error when every token is banned or the logits are not
  /// numbers.
  int64_t sample(std::span<float> logits);
  /// What sample() draws from: `logits` with everything applied and -inf where a token was cut away.
  void process(std::span<float> logits) const;

  const SamplerConfig& config() const { return config_; }

 private:
  struct Candidate {
    int64_t id;
    float score;
    float probability;  ///< relative to the largest
    float distance;     ///< from the expected surprise (typical)
  };
  void penalize(std::span<float> logits) const;
  /// Fills kept_ in index order.
  void truncate(std::span<float> logits) const;

  SamplerConfig config_;
  RandomStream random_;
  std::unordered_map<int64_t, int64_t> seen_;  ///< id -> times generated (0: only in the prompt)
  mutable std::vector<Candidate> kept_;
};

}  // namespace moiety
