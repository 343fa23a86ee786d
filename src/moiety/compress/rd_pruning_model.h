#pragma once
// Layer-adaptive pruning of whole models (Xu et al., ICCV 2023, arXiv 2308.10438): vision models, decoders and encoders
// as stages, their matrices as layers, and what is left as a checkpoint.
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/compress/rd_pruning.h"
#include "moiety/io/checkpoint.h"
#include "moiety/models/model.h"
#include "moiety/models/staged_encoder.h"
#include "moiety/models/vision.h"

namespace moiety {

/// A model that was loaded as trainable, as stages: embedding, blocks, head. Its layers are the weights of all matrices
/// and convolutions, each expert's apart, but not those of routers, embeddings and heads that are one with them. They
/// change in place. Modules that several blocks share are layers of the first. The model has to stay, in evaluation
/// mode.
StagedModel stages_of(VisionModel& model);
/// Reads ids [B, T] int64; puts out the logits of `entries` tokens of the vocabulary, drawn by `seed` (0: all). Error:
/// a model that is no plain decoder.
StagedModel stages_of(CausalModel& model, int64_t entries = 0, uint64_t seed = 0);

/// Reads ids [B, T] int64; puts out sentence embeddings [B, d].
StagedModel stages_of(StagedEncoder& model);

/// A checkpoint that is opened to be pruned.
struct PrunableModel {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::shared_ptr<VisionModel> vision;  ///< one of these
  std::shared_ptr<StagedEncoder> encoder;
  std::shared_ptr<CausalModel> causal;
  StagedModel staged;
  std::shared_ptr<const Checkpoint> now() const;  ///< the checkpoint with the values that the layers have now
  double zeros() const;                           ///< share of the layers' weights
};
/// `entries` as in stages_of. Error: what check_prunable refuses, a model that has no stages.
PrunableModel open_prunable(const std::string& model, int64_t entries = 0);

struct PrunedLayer {
  std::string name;
  int64_t weights = 0, before = 0, pruned = 0;  ///< in all; zeros before and after
};
struct PruningReport {
  std::vector<PrunedLayer> layers;
  int64_t weights = 0, pruned = 0;  ///< of all layers
  double predicted = 0.0;           ///< rd: the sum of the chosen points, of the last iteration
  double joint = 0.0;               ///< how far the output of the whole moved, of the last iteration
  double seconds_of_allocation = 0.0;
  nlohmann::json json() const;
};
/// Prunes the layers in place to `config.sparsity` of all their weights: method rd by curves over `batches`, or one of
/// pruning_baseline's. Error: the model is sparser already, floors leave too much (naming layers), no samples.
PruningReport prune_layers(StagedModel& model, const std::vector<torch::Tensor>& batches, const std::string& method,
                           const RdPruningConfig& config, const std::function<void(int64_t, int64_t)>& progress = {});

/// The checkpoint with the values that `stored` has now. Error: a GGUF file, or weights in blocks.
std::shared_ptr<const Checkpoint> with_values(std::shared_ptr<const Checkpoint> base,
                                              const std::vector<StoredTensor>& stored);
/// Error: a GGUF file, or weights in blocks, which no mask can stand in.
void check_prunable(const Checkpoint& checkpoint);

}  // namespace moiety
