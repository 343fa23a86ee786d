#pragma once
// The second half of MC-SMoE in a model that trains: every matrix of the experts is replaced by low rank + row-sparse,
// all of it learns, and rows of the sparse halves go by importance, over all matrices of the model together (Li et al.,
// ICLR 2024, arXiv 2310.01334); and the small checkpoint that comes of it. The method's steps are in mc_smoe.h.
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/compress/mc_smoe.h"
#include "moiety/io/checkpoint.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/scheduled.h"

namespace moiety {

struct LowRankSparseConfig {
  int64_t rank = 32;
  RowPruningConfig pruning;  ///< its steps are the run's
  void fields(Fields& f) {
    f("rank", rank, "rank of left right").min(1);
    pruning.rule(f);
  }
};

/// In place of the matrices W [out, in] of E experts: y = left (right x) + sparse x (+ the stack's bias). At the start
/// left right + sparse = W.
class LowRankSparseStack : public BesideStack {
 public:
  /// left [E, out, r], right [E, r, in], sparse [E, out, in]; `stack` outlives this. Error: shapes that do not fit.
  LowRankSparseStack(LinearStackImpl* stack, torch::Tensor left, torch::Tensor right, torch::Tensor sparse);
  torch::Tensor apply(const torch::Tensor& x, const std::vector<int64_t>& counts, torch::Tensor y) override;
  torch::Tensor delta(int64_t expert) const override;
  bool replaces() const override { return true; }

  torch::Tensor left, right, sparse;
  torch::Tensor average, latest;  ///< importance of entries, see RowPruning: buffers, so that a run goes on with them

 private:
  LinearStackImpl* stack_;
};

/// What the stacks of a model share: prunes the rows of all of them after every step of a run.
class RowPruner : public torch::nn::Module, public Scheduled {
 public:
  explicit RowPruner(RowPruningConfig config) : config_(std::move(config)) {}
  void add(LowRankSparseStack& stack) { stacks_.push_back(&stack); }  ///< of the model that holds this, too
  /// Error: a run shorter than its two warm-ups.
  void before_step(int64_t step, int64_t steps) override;
  void after_step() override;

 private:
  RowPruningConfig config_;
  std::vector<LowRankSparseStack*> stacks_;
  std::unique_ptr<RowPruning> rule_;
};

/// A model that trained with the part, its experts stored as they are now: left, right and the rows of the sparse
/// halves that are not zero (io/low_rank_sparse.h), a tensor an expert and matrix. Error: no such part, other parts
/// beside it, experts that it does not replace whole, a family whose experts share tensors always, a GGUF file.
std::shared_ptr<const Checkpoint> compact_low_rank_sparse(std::shared_ptr<const Checkpoint> trained);

}  // namespace moiety
