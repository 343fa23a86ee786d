#pragma once
// DERN: the least used experts go, and each of their neurons moves into the expert left that holds the most similar
// one, if it is similar enough; enlarged experts are clustered back to their width (Zhou et al., Findings of EMNLP
// 2025, arXiv 2509.10377). No training, no chance.
#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/compress/expert_weights.h"

namespace moiety {

struct DernConfig {
  double threshold = 0.6;
  std::vector<std::string> components = {"up", "down"};
  bool router_transfer = true;
  int64_t width = 0;
  std::string init = "own";
  int64_t iterations = 20;
  void fields(Fields& f) {
    f("threshold", threshold, "a neuron moves when its best cosine is above this; 1: none does").min(-1.0).max(1.0);
    f("components", components, "what neurons are compared by: any of gate, up and down")
        .choices({"gate", "up", "down"})
        .length(1, 3);
    f("router_transfer", router_transfer, "the router rows of dropped experts are added, in proportion to what moved");
    f("width", width, "neurons of an expert afterwards; 0: as before").min(0);
    f("init", init, "the first centres are the neurons of largest peak of the expert's own, or of all (peak)")
        .choices({"own", "peak"});
    f("iterations", iterations, "most rounds of clustering").min(1);
  }
};

/// The `keep` experts of largest importance [E], ties to the lower index, ascending; `always` are among them in any
/// case. Error: keep outside 1 ... E, or below what is kept always; importance that is not finite.
std::vector<int64_t> dern_retained(const torch::Tensor& importance, int64_t keep,
                                   const std::vector<int64_t>& always = {});

/// Where the neurons of dropped experts go.
struct DernMoves {
  std::vector<int64_t> dropped;           ///< D, ascending
  std::vector<torch::Tensor> target;      ///< of each, [d] int64: an expert's index before, -1: lost
  std::vector<torch::Tensor> similarity;  ///< of each, [d] f32: the best cosine, in [-1, 1]
  int64_t moved = 0, lost = 0;            ///< neurons of dropped experts
  torch::Tensor router;                   ///< [M, h] f32: rows of those retained with what was handed over
};
/// router [E, h]. Uses threshold, components and router_transfer. Error: experts or settings that do not fit.
DernMoves dern_reassign(const std::vector<ExpertWeights>& experts, const torch::Tensor& router,
                        const std::vector<int64_t>& retained, const DernConfig& config);

/// One expert out of n neurons (gate and up [n, h], down [h, n]) by spherical weighted k-means on all three parts.
struct DernClusters {
  ExpertWeights expert;  ///< of `width` neurons
  torch::Tensor label;   ///< [n] int64, of the assignment that the centres were last updated by
};
/// The first `own` neurons are the expert's own; weight [n]. n = own = width is the expert itself. Error: fewer neurons
/// to begin with than `width`, iterations below 1.
DernClusters dern_recluster(const ExpertWeights& neurons, const torch::Tensor& weight, int64_t own, int64_t width,
                            const std::string& init = "own", int64_t iterations = 20);

/// Retained expert r with what moved to it, clustered: its own neurons, then the moved ones by expert and neuron,
/// weighed by importance [E]. Reads expert r and those dropped. `width` of the config, `init` and `iterations`. Error:
/// see dern_recluster.
DernClusters dern_expert(const std::vector<ExpertWeights>& experts, const torch::Tensor& importance,
                         const DernMoves& moves, int64_t r, const DernConfig& config);

struct DernLayer {
  std::vector<int64_t> retained;       ///< ascending, as before
  std::vector<ExpertWeights> experts;  ///< M, in that order
  DernMoves moves;
  std::vector<torch::Tensor> label;  ///< of each expert: see dern_expert
  int64_t mixed = 0;                 ///< neurons of retained experts that hold something of a dropped one
};
/// A layer with the experts `retained`. importance [E] weighs the neurons.
DernLayer dern_layer(const std::vector<ExpertWeights>& experts, const torch::Tensor& router,
                     const torch::Tensor& importance, const std::vector<int64_t>& retained, const DernConfig& config);

}  // namespace moiety
