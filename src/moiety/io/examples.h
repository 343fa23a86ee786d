#pragma once
// From samples to token ids: which tokens are learned, cutting, packing into rows of one length, padding.
#include <cstdint>
#include <span>
#include <vector>

#include "moiety/io/chat_template.h"
#include "moiety/io/dataset.h"
#include "moiety/io/tokenizer.h"

namespace moiety {

struct Example {
  std::vector<int64_t> ids;
  std::vector<uint8_t> loss;  ///< 1: this token is to be predicted; as long as ids
};

struct EncodeOptions {
  int64_t max_length = 0;         ///< tokens behind it are cut; 0: all stay
  bool add_special = true;        ///< what the tokenizer adds around a text (BOS); a chat's template writes its own
  bool add_eos = true;            ///< the end token behind texts and completions, learned, when the tokenizer has one
  bool loss_on_prompt = false;    ///< learn all tokens, prompts and questions too
  bool last_answer_only = false;  ///< of chats: learn the last assistant message only
  nlohmann::ordered_json template_variables = nlohmann::ordered_json::object();  ///< more variables of the template
};

/// Text: every token but a leading BOS is learned. Completion: prompt and completion are encoded as one text, and the
/// tokens from the first that reaches beyond the prompt are learned. Chat (needs `chat_template`): what {% generation
/// %} blocks wrote is learned; without such blocks, what each assistant message adds to the rendered chat, found by
/// rendering the chat up to it with and without it. Choice: prompt and right answer as a completion, with a blank
/// between. Throws Error for images, for a choice without an answer, and when a template writes an answer in a way that
/// cannot be found again.
Example encode_example(const Sample& sample, const Tokenizer& tokenizer, const ChatTemplate* chat_template = nullptr,
                       const EncodeOptions& options = {});

/// bos_token, eos_token, pad_token, unk_token as a template reads them.
nlohmann::ordered_json special_tokens(const Tokenizer& tokenizer);

/// Rows of one length, [rows, length] row by row.
struct Batch {
  int64_t rows = 0, length = 0;
  std::vector<int64_t> ids;
  std::vector<uint8_t> loss;       ///< 0 also for the first token of every segment: nothing before it predicts it
  std::vector<int64_t> segments;   ///< 1, 2, ... of each row: tokens see only their own segment; 0 is padding
  std::vector<int64_t> positions;  ///< from 0 in every segment; 0 in padding
};

enum class Packing {
  sequential,  ///< examples one after another, cut at the ends of rows: no padding but in the last row
  best_fit,  ///< longest first into the fullest row that has room (best-fit decreasing): nothing is cut that fits a row
};
/// Every token of every example is in exactly one row, in order; examples longer than a row are cut into pieces, each a
/// segment of its own. Examples without tokens vanish. The same input gives the same rows. length > 0, else Error.
Batch pack(std::span<const Example> examples, int64_t length, Packing packing, int64_t pad_id = 0);

/// One example a row, padded to the longest (or to `length`, when it is not 0; a longer example is an Error).
Batch pad(std::span<const Example> examples, int64_t pad_id = 0, int64_t length = 0, bool left = false);

}  // namespace moiety
