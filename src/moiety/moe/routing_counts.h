#pragma once
// How the routers of a site used their experts: the counts behind the training log and `moiety analyze routing`.
#include <torch/types.h>

#include "moiety/nn/pass.h"

namespace moiety {

/// -sum p ln p of all elements, nats; 0 where p is 0.
double entropy_of(const torch::Tensor& p);

/// Sums over records of one site. E experts; a token counts once for each expert that it chose.
struct RoutingCounts {
  int64_t experts = 0;         ///< E; 0 before the first record
  int64_t scored_options = 0;  ///< what the router scores: E, and null experts besides
  int64_t tokens = 0;
  int64_t scored = 0;         ///< tokens whose router gave scores
  torch::Tensor load;         ///< [E] int64: tokens that chose the expert
  torch::Tensor probability;  ///< [E] f64: sum over tokens of the router's scores, normalized to a distribution
  double entropy_sum = 0;     ///< sum over tokens of the entropy of that distribution, nats

  /// Counts the tokens where `real` [N] bool is true (undefined: all) and returns who chose whom: [N, E] f32 of 0 and 1
  /// on the CPU. Error: another number of experts than before, a record without scores and logits.
  torch::Tensor add(const Trace::Record& record, const torch::Tensor& real);

  torch::Tensor share() const;       ///< [E] f64: load over all choices; zeros when there is none
  double experts_per_token() const;  ///< choices over tokens
  double load_entropy() const;       ///< of share(), nats; log E when the load is even
  double token_entropy() const;      ///< mean over scored tokens, nats
  double evenness() const;           ///< load_entropy over its largest value; 1 for one expert
  double indecision() const;         ///< token_entropy over its largest value; 0 for one option
  double imbalance() const;          ///< largest share times E: 1 when even, E when one expert takes all
  int64_t unused() const;            ///< experts that no token chose
};

}  // namespace moiety
