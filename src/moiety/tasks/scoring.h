#pragma once
// Log-probabilities that a causal model gives to tokens of given sequences: what perplexity and multiple choice are
// made of.
#include <torch/types.h>

#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"

namespace moiety {

struct TokenScores {
  torch::Tensor logprob;  ///< [B, T - 1] f32: log p(ids[b, t + 1] | ids[b, .. t]); 0 where not asked for
  torch::Tensor greedy;   ///< [B, T - 1] bool: the token is the most likely one (the lowest id among equals); false
                          ///< unless `greedy` was asked
};

/// ids [B, T] int64 (T >= 2); mask [B, T] bool, false for padding behind a row's tokens, or undefined. Only targets
/// from column `first` on (0: all) are scored. `stepwise`: tokens are fed one by one, as decoding does. Results are on
/// the CPU. No gradients.
TokenScores score_tokens(CausalModel& model, const torch::Tensor& ids, const torch::Tensor& mask = {},
                         int64_t first = 0, bool greedy = false, bool stepwise = false);

/// How many rows of `tokens` tokens keep the logits of one batch below about 1 GiB, at least 1 and at most `wanted`.
int64_t rows_that_fit(const CausalModel& model, int64_t tokens, int64_t wanted);

/// True when the tokenizer itself puts its BOS token before a text.
bool adds_bos(const Tokenizer& tokenizer);

}  // namespace moiety
