#pragma once
// A small model and run for the tests of training.
#include <nlohmann/json.hpp>
#include <string>

#include "moiety/base/files.h"
#include "moiety/train/trainer.h"

namespace moiety::tiny {

inline nlohmann::json dense_config() {
  return {{"model_type", "llama"},       {"hidden_size", 24},
          {"num_hidden_layers", 2},      {"num_attention_heads", 2},
          {"num_key_value_heads", 1},    {"intermediate_size", 40},
          {"tie_word_embeddings", true}, {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-6}};
}

inline nlohmann::json mixture_config() {
  return {{"model_type", "qwen3_moe"},     {"hidden_size", 24},           {"num_hidden_layers", 2},
          {"num_attention_heads", 2},      {"num_key_value_heads", 1},    {"head_dim", 12},
          {"intermediate_size", 40},       {"moe_intermediate_size", 16}, {"num_experts", 4},
          {"num_experts_per_tok", 2},      {"decoder_sparse_step", 1},    {"norm_topk_prob", true},
          {"max_position_embeddings", 64}, {"tie_word_embeddings", false}};
}

/// Words with some structure to learn, a few to a line.
inline std::string text(int lines) {
  static const char* const words[] = {"one", "two", "three", "four", "five", "six", "seven"};
  std::string out;
  for (int i = 0; i < lines; ++i) {
    for (int j = 0; j < 4 + i % 3; ++j) out += std::string(words[(i * 5 + j * 2) % 7]) + " ";
    out += "\n";
  }
  return out;
}

/// A run over lines of text in `folder`.
inline TrainConfig run(const TemporaryFolder& folder, const std::string& output, int64_t steps) {
  if (!std::filesystem::exists(folder / "text.txt")) write_file(folder / "text.txt", text(160));
  TrainConfig c;
  c.model.config = dense_config();
  c.model.tokenizer = "bytes";
  SourceConfig source;
  source.path = (folder / "text.txt").string();
  source.document = "line";
  c.data.sources.push_back(source);
  c.data.length = 32;
  c.data.held_out = 0.1;
  c.train.steps = steps;
  c.train.batch = 4;
  c.optimizer.lr = 3e-3;
  c.schedule.warmup = 2;
  c.output.folder = (folder / output).string();
  return c;
}

/// The records of a run without what depends on the clock.
inline std::vector<nlohmann::json> trace(const std::string& output) {
  auto records = read_log(std::filesystem::path(output) / "log.jsonl", int64_t{1} << 60);
  for (auto& r : records) {
    r.erase("time");
    r.erase("tokens_per_second");
  }
  return records;
}

}  // namespace moiety::tiny
