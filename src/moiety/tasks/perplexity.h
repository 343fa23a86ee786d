#pragma once
// Perplexity of a text under a causal model, exactly defined.
//
// sliding: the text's tokens x[0..N) are scored once each. With BOS, every window is BOS followed by tokens, and all N
// tokens are scored; without, x[0] has nothing before it and is not scored. Window k predicts the `context` tokens that
// start `k * stride` after the first scorable one, each from everything before it in the window (so a window feeds
// `context` tokens to the model), and scores those that no earlier window scored: all in the first window, the last
// `stride` in the others.
//
// llama.cpp: what llama.cpp's perplexity tool computes. Windows of `context` tokens that do not overlap; the first
// token of each is replaced by BOS where the model adds BOS; of each window the tokens behind the first half are scored
// (context - context / 2 - 1 of them); what does not fill a window is dropped, and so is one line feed at the end of
// the text.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"

namespace moiety {

struct PerplexityOptions {
  enum Method { sliding, llama_cpp } method = sliding;
  enum Bos { automatic, always, never } bos = automatic;  ///< automatic: as the tokenizer does
  int64_t context = 0;                                    ///< 0: min(512, the model's)
  int64_t stride = 0;                                     ///< sliding only; 0: context / 2
  int64_t batch_size = 8;                                 ///< windows at a time; fewer when their logits would not fit
  int64_t limit_tokens = 0;                               ///< use only the first tokens of each text; 0: all
  bool stepwise = false;  ///< one token at a time, as decoding does, instead of a window at once
};

/// Sequence tokens[begin, end), of which [first, end) are scored.
struct PerplexityWindow {
  int64_t begin = 0, end = 0, first = 0;
};

/// The windows over `tokens` tokens. `bos`: windows have a BOS of their own. Error: context or stride out of range.
std::vector<PerplexityWindow> perplexity_windows(PerplexityOptions::Method method, int64_t tokens, int64_t context,
                                                 int64_t stride, bool bos);

struct PerplexityResult {
  int64_t text_tokens = 0;  ///< of the text, BOS not counted
  int64_t tokens = 0;       ///< scored
  int64_t bytes = 0;        ///< UTF-8 bytes that the scored tokens stand for
  int64_t windows = 0;
  double nll = 0;             ///< sum of -log p, natural logarithm
  double nll_squared = 0;     ///< sum of squares
  double perplexity() const;  ///< exp(nll / tokens)
  double perplexity_stderr()
      const;                     ///< perplexity times the standard error of the mean nll, tokens taken as independent
  double bits_per_byte() const;  ///< nll / ln 2 / bytes
  double bits_per_token() const;
  PerplexityResult& operator+=(const PerplexityResult& other);
};

/// Scores token ids. `bos` < 0: none. `bytes_before` [ids + 1]: bytes of the text before each token (empty: bytes stay
/// 0). `progress` gets windows done (from 0) and their number.
PerplexityResult perplexity_of_ids(CausalModel& model, std::vector<int64_t> ids, int64_t bos,
                                   const std::vector<int64_t>& bytes_before, const PerplexityOptions& options,
                                   const std::function<void(int64_t, int64_t)>& progress = {});

/// Tokenizes and scores one text. Error: too short to score anything, or BOS asked of a tokenizer without one.
PerplexityResult perplexity(CausalModel& model, const std::shared_ptr<const Tokenizer>& tokenizer,
                            const std::string& text, const PerplexityOptions& options,
                            const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace moiety
