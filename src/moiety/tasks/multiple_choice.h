#pragma once
// Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness scores it.
//
// The score of a choice is the sum of log p of its tokens behind the context. Spaces at the end of the context move to
// the front of the continuation; context + continuation is tokenized as a whole, and the continuation's tokens are
// those that the context's own tokenization does not account for. An empty context is one BOS token (EOS when there is
// no BOS). A request longer than the model's context loses tokens on the left.
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"

namespace moiety {

struct ChoiceQuestion {
  std::string context;
  std::vector<std::string> choices;
  int64_t answer = 0;
};

struct MultipleChoiceOptions {
  std::string delimiter = " ";  ///< between context and choice; not counted in lengths
  enum Bos {
    automatic,
    always,
    never
  } bos = automatic;         ///< automatic: as the tokenizer does; lm-eval's default is never
  bool mutual_info = false;  ///< also score every choice without its context
  int64_t batch_size = 16;
};

/// Tokens of one request.
struct ChoiceTokens {
  std::vector<int64_t> context, continuation;
};
/// `bos` < 0: none is put before a context. Error: no BOS and no EOS for an empty context, or an empty continuation.
ChoiceTokens encode_choice(const Tokenizer& tokenizer, std::string context, std::string continuation, int64_t bos);

/// What one choice got.
struct ChoiceScore {
  double logprob = 0;                 ///< sum over the continuation's tokens
  double unconditional = 0;           ///< the same behind an empty context (mutual_info)
  int64_t tokens = 0;                 ///< of the continuation
  int64_t characters = 0, bytes = 0;  ///< of the choice's text, delimiter left out: code points, UTF-8 bytes
  bool greedy = false;                ///< every token was the most likely one
};

/// The choice that a rule picks; the lowest index wins ties.
/// acc: logprob. acc_norm: logprob / characters (lm-eval's acc_norm). acc_bytes: / bytes. acc_tokens: / tokens.
/// acc_mutual_info: logprob - unconditional.
int64_t pick_choice(const std::vector<ChoiceScore>& scores, const std::string& rule);
const std::vector<std::string>& choice_rules();

struct Accuracy {
  std::string rule;
  double value = 0;
  double standard_error = 0;  ///< sample standard deviation / sqrt(n)
};
Accuracy accuracy(const std::string& rule, const std::vector<std::vector<ChoiceScore>>& scores,
                  const std::vector<ChoiceQuestion>& questions);

/// Scores of every choice of every question. `progress` gets requests done (from 0) and their number.
std::vector<std::vector<ChoiceScore>> score_choices(CausalModel& model, const Tokenizer& tokenizer,
                                                    const std::vector<ChoiceQuestion>& questions,
                                                    const MultipleChoiceOptions& options,
                                                    const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace moiety
