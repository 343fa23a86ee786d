#pragma once
// What the verbs over a language model open: the checkpoint, its tokenizer and the model itself.
#include <memory>

#include "moiety/io/checkpoint.h"
#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"
#include "verb.h"

namespace moiety::cli {

struct OpenModel {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::shared_ptr<const Tokenizer> tokenizer;  ///< null when not asked for
  std::shared_ptr<CausalModel> model;
};

/// Throws Error; an encoder is refused with the verb that takes it.
OpenModel open_causal(const Common& common, bool tokenizer = true);

}  // namespace moiety::cli
