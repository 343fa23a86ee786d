#pragma once
// What studies of smaller mixtures share: base mixtures that have learned all kinds of text, trained once for all of
// them; what routers and experts do on text that was learned; pruning by a score, which everything is compared with;
// and bits a byte and multiple choice on held-out documents.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/compress/calibration.h"
#include "moiety/compress/expert_layers.h"
#include "moiety/study/language.h"
#include "moiety/tasks/multiple_choice.h"

namespace moiety {

/// Of all bases: 4 blocks, hidden size 64, a token takes 256 hidden units of experts. `sources` as there.
LanguageRecipe mixture_recipe(const std::vector<std::string>& sources = {});
/// A Mixtral whose tokens take 2 experts.
struct MixtureBase {
  int64_t experts = 16;
  /// false: experts of 128, grown apart from random weights. true: of 256, copies of the feed-forward layers of a dense
  /// model that has learned for half of the steps.
  bool upcycled = false;
};
/// How they are kept in balance: Switch's loss.
RoutingConfig mixture_routing();
/// For Study::settings.
nlohmann::json mixture_settings();
/// Bases and data in a sentence's beginning, for Study::setup.
std::string mixture_setup();

/// The folder of the base of the cell's seed; trained by the first cell of any study that asks, then kept for all.
std::filesystem::path mixture_base(const StudyCell& cell, const MixtureBase& base = {});

/// Beginnings of learned documents as token ids, about `bytes` in all, in even shares of these kinds (of all when
/// none is named); another seed takes other documents.
std::vector<std::vector<int64_t>> learned_documents(const std::vector<std::string>& sources, int64_t bytes,
                                                    uint64_t seed = 0);
/// What routers and experts of a base do on learned documents of these kinds.
Calibration mixture_calibration(const std::filesystem::path& base, const std::vector<std::string>& sources = {});

/// What becomes of the experts of a base.
using MixturePlan = std::function<std::vector<NewExperts>(const ExpertLayers& layers, const Calibration& calibration)>;
/// `keep` experts of every layer stay, by frequency, importance, reap or, drawn from the seed, random.
MixturePlan kept_by(const std::string& score, int64_t keep, uint64_t seed);
/// Writes the base with other experts into a folder of the cell called `name`, as `moiety compress` would.
std::filesystem::path with_plan(const StudyCell& cell, const std::filesystem::path& base,
                                const Calibration& calibration, const MixturePlan& plan, const std::string& name);

/// Held-out text to measure on.
struct MixtureText {
  std::map<std::string, HeldOut> rows;
  std::vector<ChoiceQuestion> questions;  ///< which of four continuations, all of one kind of text, is the true one
};
MixtureText mixture_text(const std::vector<std::string>& sources = {});
/// Percent of questions whose true answer is the most likely one, byte for byte.
double questions_right(CausalModel& model, const Tokenizer& tokenizer, const std::vector<ChoiceQuestion>& questions);
/// measure_language's, and {"choice": percent of questions right}.
nlohmann::json measure_mixture(CausalModel& model, const MixtureText& text);
nlohmann::json measure_mixture(const std::filesystem::path& model, const MixtureText& text);

/// Experts that there are in all layers, in percent of those of the base.
double experts_left(const std::filesystem::path& model, const std::filesystem::path& base);

}  // namespace moiety
