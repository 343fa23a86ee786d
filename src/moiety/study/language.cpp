#include "moiety/study/language.h"

#include <torch/torch.h>

#include <algorithm>
#include <numbers>

#include "moiety/base/error.h"
#include "moiety/io/dataset.h"
#include "moiety/train/byte_tokenizer.h"

namespace moiety {

using nlohmann::json;

json LanguageRecipe::settings() const {
  return {{"hidden", hidden},
          {"layers", layers},
          {"heads", heads},
          {"width", width},
          {"length", length},
          {"batch", batch},
          {"lr", lr},
          {"sources", sources},
          {"held_out_tokens", held_out_tokens},
          {"text", study_text().digest.substr(0, 16)}};
}

std::string LanguageRecipe::text() const {
  return fmt::format(
      "A byte-level decoder of {} blocks, hidden size {}, on seven kinds of text (code, prose, manuals in four "
      "languages)",
      layers, hidden);
}

std::unique_ptr<Trainer> train_language(const StudyCell& cell, const LanguageRun& run, const std::string& name) {
  const LanguageRecipe& r = run.recipe;
  const int64_t steps = run.steps > 0 ? run.steps : cell.budget.steps;
  TrainConfig config;
  if (run.checkpoint.empty()) {
    config.model.tokenizer = "bytes";
    config.model.config = {{"model_type", "llama"},
                           {"hidden_size", r.hidden},
                           {"num_hidden_layers", r.layers},
                           {"num_attention_heads", r.heads},
                           {"num_key_value_heads", r.heads},
                           {"intermediate_size", r.width},
                           {"max_position_embeddings", 4 * r.length},
                           {"tie_word_embeddings", true}};
    if (run.config.is_object()) config.model.config.update(run.config);
  } else {
    config.model.checkpoint = run.checkpoint.string();
  }
  config.parts = run.parts;
  config.routing = run.routing;
  const auto sources = study_sources(r.sources);
  for (const auto& s : sources) {
    SourceConfig source;
    source.path = s.train.string();
    source.weight = 1.0;
    config.data.sources.push_back(source);
  }
  config.data.length = r.length;
  config.train.steps = steps;
  config.train.batch = r.batch;
  config.train.seed = cell.seed;
  config.train.log_every = std::max<int64_t>(1, steps / 20);
  config.train.train = run.train;
  config.train.freeze = run.freeze;
  if (!run.task.is_null()) config.task = run.task;
  config.optimizer.lr = r.lr * run.lr_scale;
  config.optimizer.weight_decay = 0.1;
  config.optimizer.clip = 1.0;
  config.schedule.name = "cosine";
  config.schedule.warmup = static_cast<double>(std::max<int64_t>(1, steps / 20));
  config.schedule.floor = 0.05;
  config.output.folder = (cell.folder / name).string();
  TrainOptions options;
  options.resume = TrainOptions::restart;
  auto trainer = std::make_unique<Trainer>(config, options);
  trainer->run();
  return trainer;
}

namespace {

std::map<std::string, HeldOut> rows_of(const LanguageRecipe& recipe, int64_t length,
                                       std::filesystem::path StudySource::*documents) {
  Encoder encoder;
  encoder.tokenizer = Tokenizer::from_json(json(byte_tokenizer()), json(byte_tokenizer_config()), "the byte tokenizer");
  DataConfig config;
  config.length = length;
  std::map<std::string, HeldOut> out;
  for (const auto& s : study_sources(recipe.sources))
    out[s.name] = held_out_rows(Dataset::open((s.*documents).string()), encoder, config,
                                std::max<int64_t>(1, 4096 / length), recipe.held_out_tokens, 1);
  return out;
}

}  // namespace

std::map<std::string, HeldOut> held_out_text(const LanguageRecipe& recipe, int64_t length) {
  return rows_of(recipe, length > 0 ? length : recipe.length, &StudySource::held_out);
}

std::map<std::string, HeldOut> learned_text(const LanguageRecipe& recipe) {
  return rows_of(recipe, recipe.length, &StudySource::train);
}

json measure_language(CausalModel& model, const std::map<std::string, HeldOut>& text, const Edits& edits) {
  json by_source = json::object();
  double bits = 0, nats = 0;
  for (const auto& [name, rows] : text) {
    const EvaluationResult e = evaluate(model, rows, torch::kCPU, nullptr, edits);
    by_source[name] = e.bits_per_byte;
    bits += e.bits_per_byte / static_cast<double>(text.size());
    nats += e.loss / static_cast<double>(text.size());
  }
  return {{"bits_per_byte", bits}, {"nats", nats}, {"by_source", by_source}};
}

void trace_language(CausalModel& model, const std::map<std::string, HeldOut>& text,
                    const std::function<void(const std::string&, const Trace::Record&)>& use) {
  for (const auto& [name, rows] : text) {
    Trace trace;
    trace.on_record = [&, source = name](const Trace::Record& r) { use(source, r); };
    evaluate(model, rows, torch::kCPU, nullptr, {}, &trace);
  }
}

json plain_mixture(int64_t experts, int64_t top_k, int64_t width, bool normalize, double balance) {
  return {{"slug", "deepseekmoe"}, {"experts", experts},          {"shared", 0},       {"top_k", top_k},
          {"width", width},        {"norm_topk_prob", normalize}, {"alpha1", balance}, {"seq_aux", false}};
}

}  // namespace moiety
