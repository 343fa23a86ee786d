#include "moiety/study/experts.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/compress/expert_selection.h"
#include "moiety/convert/upcycle.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/dataset.h"
#include "moiety/io/sha256.h"
#include "moiety/train/byte_tokenizer.h"

namespace moiety {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t kSteps = 800, kShortSteps = 150, kTopK = 2;
constexpr double kBalance = 0.01;
// In all; every kind of text that is asked for has an even share.
constexpr int64_t kHeldOutTokens = 7 * 6144, kCalibrationBytes = 28672, kQuestions = 210;
constexpr int64_t kDocumentBytes = 1024;  // of one learned document
constexpr int64_t kContext = 64, kContinuation = 24, kChoices = 4;

int64_t share(int64_t all, const std::vector<std::string>& names) {
  return all / static_cast<int64_t>(study_sources(names).size());
}

// All documents of a file, in an order of their own.
std::vector<std::string> documents(const fs::path& file, uint64_t seed) {
  const auto data = shuffled(Dataset::open(file.string()), seed);
  std::vector<std::string> out;
  for (int64_t i = 0; i < data->size(); ++i) out.push_back(data->get(i).text);
  return out;
}

size_t whole_character(const std::string& text, size_t at) {
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
  return at;
}

// `context` bytes from anywhere in a document and what follows them.
struct Passage {
  std::string context, continuation;
};
Passage passage(const std::vector<std::string>& documents, RandomStream& random) {
  for (int64_t attempt = 0; attempt < 10000; ++attempt) {
    const std::string& text = documents[random.below(documents.size())];
    constexpr size_t all = kContext + kContinuation + 8;  // and what characters of several bytes may add
    if (text.size() < all) continue;
    const size_t begin = whole_character(text, random.below(text.size() - all + 1)),
                 middle = whole_character(text, begin + kContext), end = whole_character(text, middle + kContinuation);
    if (end > text.size()) continue;
    return {text.substr(begin, middle - begin), text.substr(middle, end - middle)};
  }
  fail("the held-out documents are too short for questions of {} bytes", kContext + kContinuation);
}

}  // namespace

LanguageRecipe mixture_recipe(const std::vector<std::string>& sources) {
  LanguageRecipe r;
  r.sources = sources;
  if (!sources.empty()) r.held_out_tokens = kHeldOutTokens / static_cast<int64_t>(sources.size());
  return r;
}

RoutingConfig mixture_routing() {
  RoutingConfig out;
  out.balance = "switch";
  out.coef = kBalance;
  return out;
}

json mixture_settings() {
  json out = mixture_recipe().settings();
  out.update({{"base_steps", {kSteps, kShortSteps}},
              {"balance", kBalance},
              {"calibration", {kCalibrationBytes, kDocumentBytes}},
              {"held_out_tokens", kHeldOutTokens},
              {"questions", {kQuestions, kContext, kContinuation, kChoices}}});
  return out;
}

std::string mixture_setup() {
  const auto r = mixture_recipe();
  return fmt::format(
      "{}, whose feed-forward layers are top-{} mixtures (Mixtral), learns for {} steps ({} in a short run) of {} rows "
      "of {} bytes. Calibration: {} bytes of learned text, the beginnings of documents. Measured on held-out "
      "documents: "
      "bits a byte, mean over the kinds, and {} questions: which of {} continuations of {} bytes, all of one kind of "
      "text, follows {} bytes",
      r.text(), kTopK, kSteps, kShortSteps, r.batch, r.length, kCalibrationBytes, kQuestions, kChoices, kContinuation,
      kContext);
}

fs::path mixture_base(const StudyCell& cell, const MixtureBase& base) {
  const LanguageRecipe recipe = mixture_recipe();
  const int64_t steps = cell.budget.full() ? kSteps : kShortSteps;
  const std::string print = mixture_settings().dump();
  Sha256 hash;
  hash.update(std::as_bytes(std::span(print)));
  StudyCell common = cell;
  common.shared = cell.common / "mixture-base";
  const std::string name = fmt::format("{}-{}{}-{}-{}", hash.hex().substr(0, 12), base.experts,
                                       base.upcycled ? "-upcycled" : "", steps, cell.seed);
  const auto folder = common.once(name, [&](const fs::path& to) {
    StudyCell own = cell;
    own.folder = to;
    const RoutingConfig routing = mixture_routing();
    if (!base.upcycled) {
      train_language(own, {.recipe = recipe,
                           .config = {{"model_type", "mixtral"},
                                      {"intermediate_size", recipe.width / kTopK},
                                      {"num_local_experts", base.experts},
                                      {"num_experts_per_tok", kTopK}},
                           .steps = steps,
                           .routing = routing});
      return;
    }
    train_language(own, {.recipe = recipe, .steps = steps / 2}, "dense");
    const auto dense = Checkpoint::open((to / "dense" / "last").string());
    write_hf(*upcycled(dense, {.experts = base.experts, .top_k = kTopK, .seed = static_cast<uint64_t>(cell.seed)}),
             to / "copies");
    own.seed += 1000;  // other rows
    train_language(own, {.recipe = recipe,
                         .checkpoint = to / "copies",
                         .lr_scale = 0.5,
                         .steps = steps - steps / 2,
                         .routing = routing});
  });
  return folder / "run" / "last";
}

std::vector<std::vector<int64_t>> learned_documents(const std::vector<std::string>& sources, int64_t bytes,
                                                    uint64_t seed) {
  std::vector<std::vector<int64_t>> out;
  for (const auto& s : study_sources(sources)) {
    int64_t left = share(bytes, sources);
    for (const std::string& text : documents(s.train, seed)) {
      if (left <= 0) break;
      const auto n = std::min({static_cast<int64_t>(text.size()), left, kDocumentBytes});
      if (n < 2) continue;
      out.emplace_back();
      for (int64_t i = 0; i < n; ++i) out.back().push_back(static_cast<unsigned char>(text[static_cast<size_t>(i)]));
      left -= n;
    }
  }
  return out;
}

Calibration mixture_calibration(const fs::path& base, const std::vector<std::string>& sources) {
  const auto checkpoint = Checkpoint::open(base.string());
  const auto model = load_causal(*checkpoint);
  model->eval();
  CalibrationOptions options;
  options.windows.context = mixture_recipe().length;
  options.windows.batch_size = 32;
  return calibrate(*model, ExpertLayers(checkpoint), learned_documents(sources, kCalibrationBytes), options);
}

MixturePlan kept_by(const std::string& score, int64_t keep, uint64_t seed) {
  return [=](const ExpertLayers& layers, const Calibration& calibration) {
    const auto scores = score == "random" ? random_scores(layers, seed) : expert_scores(layers, calibration, score);
    return keep_experts(layers, select_experts(layers, scores, {static_cast<double>(keep), false}));
  };
}

fs::path with_plan(const StudyCell& cell, const fs::path& base, const Calibration& calibration, const MixturePlan& plan,
                   const std::string& name) {
  const ExpertLayers layers(Checkpoint::open(base.string()));
  const fs::path to = cell.folder / name;
  write_hf(*with_experts(layers, plan(layers, calibration)), to);
  return to;
}

MixtureText mixture_text(const std::vector<std::string>& sources) {
  MixtureText out{held_out_text(mixture_recipe(sources)), {}};
  for (const auto& s : study_sources(sources)) {
    const auto texts = documents(s.held_out, 0);
    RandomStream random(0, "study.questions." + s.name);
    for (int64_t i = 0; i < share(kQuestions, sources); ++i) {
      const auto [context, truth] = passage(texts, random);
      ChoiceQuestion q{context, {}, static_cast<int64_t>(random.below(kChoices))};
      while (static_cast<int64_t>(q.choices.size()) < kChoices) {
        if (static_cast<int64_t>(q.choices.size()) == q.answer) {
          q.choices.push_back(truth);
          continue;
        }
        // Distinct from the true one, or the question would have two answers.
        std::string other = passage(texts, random).continuation;
        if (other != truth) q.choices.push_back(std::move(other));
      }
      out.questions.push_back(std::move(q));
    }
  }
  return out;
}

double questions_right(CausalModel& model, const Tokenizer& tokenizer, const std::vector<ChoiceQuestion>& questions) {
  MultipleChoiceOptions options;
  options.delimiter = "";
  options.batch_size = 64;
  const auto scores = score_choices(model, tokenizer, questions, options);
  // Choices differ by the bytes of a character at most.
  return 100.0 * accuracy("acc_bytes", scores, questions).value;
}

json measure_mixture(CausalModel& model, const MixtureText& text) {
  json out = measure_language(model, text.rows);
  const auto tokenizer =
      Tokenizer::from_json(json(byte_tokenizer()), json(byte_tokenizer_config()), "the byte tokenizer");
  out["choice"] = questions_right(model, *tokenizer, text.questions);
  return out;
}

json measure_mixture(const fs::path& model, const MixtureText& text) {
  const auto loaded = load_causal(*Checkpoint::open(model.string()));
  loaded->eval();
  return measure_mixture(*loaded, text);
}

double experts_left(const fs::path& model, const fs::path& base) {
  const auto count = [](const fs::path& folder) {
    const ExpertLayers layers(Checkpoint::open(folder.string()));
    int64_t n = 0;
    for (const auto& layer : layers.layers()) n += layer.experts;
    return static_cast<double>(n);
  };
  return 100.0 * count(model) / count(base);
}

}  // namespace moiety
