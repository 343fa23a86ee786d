#pragma once
// CorDA over a whole model: second moments from a text, then a model whose directions are chosen by them.
#include <cstdint>
#include <filesystem>
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

/// Second moments by the path of a matrix ("model.layers.3.self_attn.q_proj"); those that read one input share one.
using CordaMoments = std::map<std::string, std::shared_ptr<const CordaCovariance>>;

/// Inputs of the matrices that options.targets name. `samples`: token ids, a forward pass each. `progress`: samples
/// done. Throws Error: GGUF files, blocks (decompose before quantizing), families that store several of these matrices
/// in one, a model that has parts already.
CordaMoments corda_calibrate(const Checkpoint& checkpoint, const CordaOptions& options,
                             const std::vector<std::vector<int64_t>>& samples,
                             const std::function<void(int64_t)>& progress = {});

/// Where second moments are from.
struct CordaSource {
  std::string model, text;  ///< as the user calls them
  int64_t tokens = 0;
};
/// Keeps them in a safetensors file, as sums over samples, with their source in its metadata and what tells the model's
/// matrices from others.
void write_moments(const std::filesystem::path& file, const CordaMoments& moments, const Checkpoint& checkpoint,
                   const CordaSource& source);
/// Those of the matrices that options.targets name, from such a file. Throws Error: another kind of file, another
/// model's (naming the matrix), one without some of these matrices, numbers that are not finite.
CordaMoments read_moments(const std::filesystem::path& file, const Checkpoint& checkpoint, const CordaOptions& options);

/// The model with a LoRA of the chosen directions beside every matrix of `moments` and what is left in the matrices:
/// together what the model was. `progress`: matrices done, of all. Throws Error as corda_calibrate.
std::shared_ptr<const Checkpoint> corda_checkpoint(std::shared_ptr<const Checkpoint> base, const CordaOptions& options,
                                                   const CordaMoments& moments,
                                                   const std::function<void(const char*, int64_t, int64_t)>& progress);

/// Every matrix of `moments` without the share `drop` of its components (rounded), by kind: corda, asvd or svd.
std::shared_ptr<const Checkpoint> corda_compressed(std::shared_ptr<const Checkpoint> base, const std::string& kind,
                                                   double drop, double asvd_alpha, const CordaMoments& moments,
                                                   const std::function<void(const char*, int64_t, int64_t)>& progress);

}  // namespace moiety
