#pragma once
// Small byte-level language models for studies: one recipe that all arms of a study share, trained by the trainer that
// `moiety train` runs, measured on held-out documents of every source.
#include <torch/types.h>

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/nn/parameters.h"
#include "moiety/study/study.h"
#include "moiety/study/text.h"
#include "moiety/train/trainer.h"

namespace moiety {

struct LanguageRecipe {
  int64_t hidden = 64, layers = 4, heads = 4;
  int64_t width = 256;  ///< hidden units of the dense gated feed-forward layer: the active width of all arms
  int64_t length = 128, batch = 8;
  double lr = 4e-3;                  ///< peak of a cosine, 5 % warm-up; AdamW 0.9/0.95, decay 0.1, clip 1
  std::vector<std::string> sources;  ///< names of StudySource; empty: all, in even shares
  int64_t held_out_tokens = 6144;    ///< of every source
  nlohmann::json settings() const;   ///< for Study::settings
  std::string text() const;          ///< model and data in a sentence's beginning, for Study::setup
};

struct LanguageRun {
  LanguageRecipe recipe;
  nlohmann::json parts;              ///< entries of `parts` of a run
  nlohmann::json config;             ///< keys of the model's config besides the recipe's
  std::filesystem::path checkpoint;  ///< go on from this model instead of a new one
  std::vector<std::string> train;    ///< patterns: only these parameters learn
  std::vector<std::string> freeze;   ///< patterns: these do not
  nlohmann::json task;               ///< as `task` of a run; null: the next token
  double lr_scale = 1.0;
  int64_t steps = 0;      ///< 0: the budget's
  RoutingConfig routing;  ///< as `routing` of a run
};

/// Trains one model; its run stands in a folder of the cell called `name`. Throws Error.
std::unique_ptr<Trainer> train_language(const StudyCell& cell, const LanguageRun& run, const std::string& name = "run");

/// Held-out rows of each source, encoded once. `length` of a row; 0: the recipe's.
std::map<std::string, HeldOut> held_out_text(const LanguageRecipe& recipe, int64_t length = 0);
/// The same of documents that are learned: to calibrate on.
std::map<std::string, HeldOut> learned_text(const LanguageRecipe& recipe);

/// {"bits_per_byte": mean over the sources, "by_source": {...}, "nats": mean loss a byte token}.
nlohmann::json measure_language(CausalModel& model, const std::map<std::string, HeldOut>& text,
                                const Edits& edits = {});

/// Calls `use` for every routing record of the model on that text, with the source's name.
void trace_language(CausalModel& model, const std::map<std::string, HeldOut>& text,
                    const std::function<void(const std::string& source, const Trace::Record&)>& use);

/// A plain top-k mixture (softmax, Switch's balance loss), the usual baseline, as an entry of `parts`.
/// `normalize`: gates over their sum; raw otherwise. `width` of one expert. `balance` 0: a run's `routing` says how.
nlohmann::json plain_mixture(int64_t experts, int64_t top_k, int64_t width, bool normalize, double balance = 0.01);

}  // namespace moiety
