#pragma once
// CorDA over a whole model: second moments from a text, then a model whose directions are chosen by them.
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moiety/adapt/corda.h"
#include "moiety/io/checkpoint.h"

namespace moiety {

struct CordaOptions {
  std::vector<std::string> targets = {"all"};  ///< as a part's `target`
  std::string mode = "kpm";                    ///< kpm or ipm
  int64_t rank = 128;
  double alpha = 0.0;  ///< 0: the rank
  std::string dtype = "f32";
};

/// Inputs of the matrices that options.targets name, by the path of a matrix ("model.layers.3.self_attn.q_proj"); those
/// that read one input share one. `samples`: token ids, a forward pass each. `progress`: samples done.
std::map<std::string, std::shared_ptr<const CordaCovariance>> corda_calibrate(
    const Checkpoint& checkpoint, const CordaOptions& options, const std::vector<std::vector<int64_t>>& samples,
    const std::function<void(int64_t)>& progress = {});

/// The model with a LoRA of the chosen directions beside every target and what is left in the matrices: together what
/// the model was. `progress`: matrices done, of all. Throws Error: blocks (decompose before quantizing), families that
/// store several of these matrices in one, a model that has parts already.
std::shared_ptr<const Checkpoint> corda_checkpoint(std::shared_ptr<const Checkpoint> base, const CordaOptions& options,
                                                   const std::vector<std::vector<int64_t>>& samples,
                                                   const std::function<void(const char*, int64_t, int64_t)>& progress);

/// Every target without the share `drop` of its components (rounded), by kind: corda, asvd or svd.
std::shared_ptr<const Checkpoint> corda_compressed(std::shared_ptr<const Checkpoint> base, const std::string& kind,
                                                   double drop, double asvd_alpha, const CordaOptions& options,
                                                   const std::vector<std::vector<int64_t>>& samples,
                                                   const std::function<void(const char*, int64_t, int64_t)>& progress);

}  // namespace moiety
