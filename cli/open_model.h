#pragma once
// What the verbs over a language model open: the checkpoint, its tokenizer and the model itself.
#include <memory>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "moiety/io/peft.h"
#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"
#include "moiety/offload/offload.h"
#include "offload_options.h"
#include "verb.h"

namespace moiety::cli {

struct OpenModel {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::shared_ptr<const Tokenizer> tokenizer;  ///< null when not asked for
  std::shared_ptr<CausalModel> model;
  std::shared_ptr<Offload> offload;  ///< null when all experts are in memory

  /// Gives experts on disk their places, once it is known what the run needs; returns how many tokens of a prompt to
  /// read at a time. Error: the budget is too small.
  int64_t start(OffloadWork work) const;
};

/// What --adapter and --adapter-scaled name. Throws Error.
std::vector<AdapterChoice> adapters_of(const Common& common);
/// The model with its adapters. Throws Error.
std::shared_ptr<const Checkpoint> open_checkpoint(const Common& common);

/// Throws Error; an encoder is refused with the verb that takes it.
OpenModel open_causal(const Common& common, bool tokenizer = true, const OffloadArguments& offload = {});

}  // namespace moiety::cli
