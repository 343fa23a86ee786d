#pragma once
// UNCURL: the experts of a layer are clustered by their router logits on the tokens of one task, and every cluster
// becomes one expert: aligned, averaged by use (Sarkar et al., ENLSP 2024, PMLR 262, arXiv 2409.01483). Use and
// affinity come from usage_of and cosine_affinity (expert_statistics.h).
#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/compress/expert_weights.h"

namespace moiety {

struct UncurlConfig {
  double factor = 2.0;
  bool align = true;
  std::string router = "map";
  void fields(Fields& f) {
    f("factor", factor, "a layer keeps one of so many experts").min(1.0);
    f("align", align, "neurons are brought into the order of the cluster's most used expert before they are averaged");
    f("router", router, "map: the router stays, experts of a cluster are aliases; average: its rows are averaged, too")
        .choices({"map", "average"});
  }
};

/// round(experts / factor), 1 at least. Error: a factor below 1.
int64_t uncurl_clusters(int64_t experts, double factor);

/// Normalised spectral clustering of affinity [E, E] into `clusters`, without chance: eigenvectors of the largest
/// eigenvalues of D^-1/2 A D^-1/2, rows at length 1, k-means from the most used expert's row and the farthest ones. The
/// labels [E] int64, numbered by each cluster's first expert; experts that cannot be told apart may leave fewer. Error:
/// clusters outside 1 ... E, an affinity that is not symmetric.
torch::Tensor spectral_clusters(const torch::Tensor& affinity, const torch::Tensor& usage, int64_t clusters);

/// One cluster's expert: its members (ascending) averaged by use, in the order of neurons of the most used one (ties,
/// and where none was used: the first); equal weights where none was used. One member alone stays what it is. Reads the
/// members of `experts` only; usage [E].
struct UncurlCluster {
  ExpertWeights expert;
  std::vector<std::vector<int64_t>> order;  ///< of each member's neurons, as they were averaged (with_neurons)
};
UncurlCluster uncurl_cluster(const std::vector<ExpertWeights>& experts, const std::vector<int64_t>& members,
                             const torch::Tensor& usage, bool align = true);
/// Rows of a router [E, h] averaged in the same way: [K, h] f32 by label.
torch::Tensor average_rows(const torch::Tensor& router, const torch::Tensor& labels, const torch::Tensor& usage);

struct UncurlMerge {
  std::vector<ExpertWeights> experts;  ///< K, by label
  torch::Tensor order;                 ///< [E, d] int64: see UncurlCluster
  torch::Tensor router;                ///< [K, h] f32: see average_rows
};
/// All clusters of a layer: labels and usage [E], router [E, h] or undefined.
UncurlMerge uncurl_merge(const std::vector<ExpertWeights>& experts, const torch::Tensor& router,
                         const torch::Tensor& labels, const torch::Tensor& usage, bool align = true);

/// A mixture of merged experts behind the router as it was: softmax over all E, top-k, then the weights of aliases add
/// up and a token meets each expert once.
struct AliasedMixture {
  torch::Tensor y;        ///< [T, h]
  torch::Tensor weights;  ///< [T, K] f32
  int64_t calls = 0;      ///< pairs of a token and an expert with a weight above 0
};
/// x [T, h], router [E, h], labels [E] int64 of the K experts, gated by SiLU. The model itself does the same by its
/// expert map (moe/mixture.h).
AliasedMixture route_aliases(const torch::Tensor& x, const torch::Tensor& router, const torch::Tensor& labels,
                             const std::vector<ExpertWeights>& experts, int64_t top_k, bool normalize);

}  // namespace moiety
