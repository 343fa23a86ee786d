#pragma once
// Windows of tokens through a decoder block by block: all of them through one block, then all through the next, so that
// the weights of one block are read at a time and somebody can look at what stands between blocks.
#include <torch/types.h>

#include <map>
#include <memory>
#include <vector>

#include "moiety/models/decoder.h"
#include "moiety/nn/attention.h"
#include "moiety/nn/pass.h"

namespace moiety {

/// for (LayerWalk walk(model, windows); !walk.done(); walk.next())
///   for (int64_t w = 0; w < walk.windows(); ++w) walk.run(w);
/// computes what Decoder::hidden does, without its last norm. Without gradients; no edits, padding or cache.
class LayerWalk {
 public:
  /// `windows`: token ids, one sequence each. Error: none, an empty one, an id that the model does not know.
  LayerWalk(Decoder& model, const std::vector<std::vector<int64_t>>& windows);

  int64_t windows() const { return static_cast<int64_t>(hidden_.size()); }
  int64_t block() const { return block_; }  ///< the one that runs next
  bool done() const { return block_ == model_.blocks(); }
  Block& layer() { return *model_.layers[static_cast<size_t>(block_)]; }
  /// What enters block() [1, T, d]; of a window that run() has had, what leaves it.
  const torch::Tensor& hidden(int64_t window) const { return hidden_[static_cast<size_t>(window)]; }
  const AttentionContext& context(int64_t window) const;
  /// The pass of a window, as it stands before block().
  Pass& pass(int64_t window);
  void run(int64_t window, Trace* trace = nullptr);
  /// On to the next block. Error unless all windows have run.
  void next();

 private:
  Decoder& model_;
  int64_t block_ = 0;
  std::vector<torch::Tensor> hidden_;
  std::vector<Pass> passes_;
  std::vector<bool> ran_;
  std::map<int64_t, std::unique_ptr<AttentionContext>> contexts_;  // by length
};

}  // namespace moiety
