#pragma once
// Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055) with fine experts (He et al. 2024, arXiv 2410.07524): a
// dense decoder becomes a mixture whose experts are copies, or equal parts, of its feed-forward layers.
#include <cstdint>
#include <memory>

#include "moiety/io/checkpoint.h"

namespace moiety {

struct UpcycleOptions {
  int64_t experts = 8;      ///< copies of every feed-forward layer
  int64_t top_k = 2;        ///< copies a token takes
  int64_t granularity = 1;  ///< parts that every copy is cut into; experts and top-k grow by it
  double noise = 0.0;       ///< normal noise on every expert, in deviations of the matrix
  double router_std = 0.02;
  uint64_t seed = 0;
};

/// Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE: gates are normalized over the chosen experts, so that
/// without noise the mixture computes what the dense model did. Parts of one copy begin with equal rows of the router
/// and are chosen together; their down matrices are scaled by the granularity to make up for the gates. Tensors are
/// made when they are asked for, in the type of the base (bf16 for blocks); the matrices of one layer stay decoded for
/// the next of its experts. Error: another family, one that has experts, parts or biases, a GGUF file (its rows have
/// another order: convert it first), settings out of range, a width that the granularity does not divide.
std::shared_ptr<const Checkpoint> upcycled(std::shared_ptr<const Checkpoint> dense, const UpcycleOptions& options);

}  // namespace moiety
