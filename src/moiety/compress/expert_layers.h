#pragma once
// The mixture layers of a checkpoint as transforms see them, whatever the family and the layout of its tensors, and the
// same checkpoint with other experts: fewer, merged ones, another number in every layer.
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moiety/compress/expert_weights.h"
#include "moiety/io/checkpoint.h"

namespace moiety {

class ExpertLayers {
 public:
  struct Layer {
    int64_t block = 0;
    int64_t experts = 0;       ///< there are
    int64_t rows = 0;          ///< of the router; more than `experts` where rows share one
    std::vector<int64_t> map;  ///< row -> expert; empty: the identity
    int64_t top_k = 0, width = 0, hidden = 0;
    int64_t groups = 1;  ///< equal parts of the experts that a token chooses among first (DeepSeek-V3)
  };

  /// Error: a config of no decoder, no layer with experts, a part that replaces its experts, tensors that are missing.
  explicit ExpertLayers(std::shared_ptr<const Checkpoint> checkpoint);
  ~ExpertLayers();
  const std::vector<Layer>& layers() const { return layers_; }
  const std::shared_ptr<const Checkpoint>& checkpoint() const { return checkpoint_; }
  /// Index into layers() of a block. Error: it has no experts.
  size_t of_block(int64_t block) const;
  torch::Tensor router(size_t layer) const;                       ///< [rows, hidden] f32
  ExpertWeights expert(size_t layer, int64_t expert) const;       ///< Error: biases or clamped experts (gpt-oss)
  std::vector<std::string> names(size_t layer, int64_t e) const;  ///< tensors that hold an expert, for messages
  /// What the tensors of an expert's gate, up and down, in this order, are or would be called if it had its own.
  /// Error: a family that has no such names.
  std::vector<std::string> matrices(size_t layer, int64_t e) const;
  int64_t expert_bytes(size_t layer) const;       ///< of one expert, as stored
  int64_t expert_parameters(size_t layer) const;  ///< of one expert

  struct Places;  ///< where the tensors of a layer lie

 private:
  friend std::shared_ptr<const Checkpoint> with_experts(const ExpertLayers& layers,
                                                        std::vector<struct NewExperts> plan);
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::map<std::string, TensorInfo> infos_;  // nothing is fetched for its shape
  std::vector<Layer> layers_;
  std::vector<std::unique_ptr<Places>> places_;
};

/// What the experts of one layer become.
struct NewExperts {
  int64_t block = 0;
  /// Rows of the router, and entries of its biases, that stay, in this order.
  std::vector<int64_t> rows;
  /// [rows, hidden] instead of them; undefined: as they are.
  torch::Tensor router;
  /// Row -> new expert; empty: the identity.
  std::vector<int64_t> map;
  /// By new expert: the expert whose bytes it takes over, or -1 for one that `made` gives.
  std::vector<int64_t> from;
  /// All new experts of the layer with -1 in `from` (entries of others are not read), f32. Called when the layer is
  /// written, perhaps more than once.
  std::function<std::vector<ExpertWeights>()> made;

  /// Experts `kept` alone, ascending, with their rows of the router.
  static NewExperts keep(const ExpertLayers::Layer& layer, std::vector<int64_t> kept);
};

/// The checkpoint with these layers changed; tensors are made when they are asked for, one layer in memory at a time.
/// Tensors of experts that are taken over keep their bytes; made ones get the type of the old ones, bf16 in place of
/// blocks. The config says the new number in its own words where all layers have one and no map, else in
/// `moiety.experts`. top-k becomes at most the number of rows. Error: a layer twice or without experts, indices that do
/// not exist, no expert left, groups of experts (DeepSeek-V3) that lose unequal numbers, another shape from `made`.
std::shared_ptr<const Checkpoint> with_experts(const ExpertLayers& layers, std::vector<NewExperts> plan);

/// True when transformers and llama.cpp know what with_experts made of a config: no section `moiety.experts`.
bool uniform_experts(const nlohmann::json& config);

}  // namespace moiety
