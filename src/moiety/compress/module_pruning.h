#pragma once
// Takes modules that a task does not use out of a model with ModuleFormer parts (Shen et al. 2023, arXiv 2306.04640):
// their rows of the gate and their matrices go, and the softmax of the gate runs over those that are kept.
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// How one mixture used its modules on a text.
struct ModuleUse {
  int64_t layer = 0;
  std::string site;         ///< ffn or attention
  int64_t top_k = 0;        ///< modules a token
  torch::Tensor frequency;  ///< [N]: share of the tokens that chose the module
};

/// What one mixture keeps.
struct KeptModules {
  int64_t layer = 0;
  std::string site;
  int64_t modules = 0;        ///< there were
  std::vector<int64_t> keep;  ///< ascending
};

/// Modules that at least `tau` of the tokens chose; the `at_least` most frequent ones of a mixture in any case. Error:
/// tau outside [0, 1], or a mixture would keep fewer modules than a token chooses (names layer, site and both numbers).
std::vector<KeptModules> plan_module_pruning(const std::vector<ModuleUse>& use, double tau, int64_t at_least = 0);

/// The checkpoint with these modules alone: every layer gets an entry of its own under `moiety.parts`. Tensors are cut
/// when they are asked for. Its logits are those of the whole model with the logits of all other modules at -inf.
/// Error: a layer of the plan has no ModuleFormer part at that site, or another number of modules.
std::shared_ptr<const Checkpoint> prune_modules(std::shared_ptr<const Checkpoint> checkpoint,
                                                const std::vector<KeptModules>& plan);

}  // namespace moiety
