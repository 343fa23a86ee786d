#pragma once
// What distinguishes encoder families: the switches that config.json sets, and the names of their tensors.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/nn/rope.h"

namespace moiety {

/// What config.json says, in one vocabulary.
struct EncoderSpec {
  std::string family;
  int64_t vocabulary = 0, hidden = 0, embedding = 0, heads = 0, head_dim = 0, layers = 0, intermediate = 0,
          positions = 0, types = 0;
  double eps = 1e-12;
  std::string activation = "gelu";
  int64_t padding = -1;  ///< RoBERTa and MPNet: positions start behind this id and padding stays on it; -1: from 0
  bool pre_norm = false;
  bool rotary = false;
  int64_t window = 0;       ///< ModernBERT: distance that its local layers see
  std::vector<bool> local;  ///< per layer, when there is a window
  RopeConfig rope, local_rope;
  int64_t buckets = 32;  ///< MPNet: rows of the relative position bias
};

/// Throws Error: an unknown model_type (naming the nearest), missing or impossible values (naming the key).
EncoderSpec parse_encoder_config(const nlohmann::json& config);

/// Tensor names of a family, without the prefix that models with a head put before them: BERT's, unless said otherwise.
/// "" means the family has no such part.
struct EncoderNames {
  std::string word = "embeddings.word_embeddings", position = "embeddings.position_embeddings",
              type = "embeddings.token_type_embeddings", embedding_norm = "embeddings.LayerNorm", projection, relative,
              final_norm, pooler = "pooler.dense";
  std::string layer = "encoder.layer.";  ///< before the layer's number
  std::string q = "attention.self.query", k = "attention.self.key", v = "attention.self.value", qkv,
              out = "attention.output.dense", attention_norm = "attention.output.LayerNorm", up = "intermediate.dense",
              gate, gate_up, down = "output.dense", ffn_norm = "output.LayerNorm";
};
/// `transformers_names`: Nomic BERT as transformers names its modules, not as its authors do.
EncoderNames encoder_names(const std::string& family, bool transformers_names = false);

}  // namespace moiety
