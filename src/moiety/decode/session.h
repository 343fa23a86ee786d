#pragma once
// One step of decoding, whatever computes it: ids go in, logits of the next token come out.
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moiety/models/model.h"

namespace moiety {

/// What a decoding loop asks of that which it drives. A Session is one model with its cache; a policy that steps
/// several models, or one model several times for each token, is another.
class Steps {
 public:
  virtual ~Steps() = default;
  /// Appends `pieces[row]` to every row and returns the logits behind the last token, [B, V] f32. Pieces may differ in
  /// length; the first call sets the number of rows.
  virtual torch::Tensor feed(const std::vector<std::vector<int64_t>>& pieces) = 0;
  /// Keeps the rows `rows`, in that order; a row may be taken more than once.
  virtual void select(const std::vector<int64_t>& rows) = 0;
  /// Makes `pieces` the whole content of the rows and returns the logits behind it. What the cache already holds of it
  /// is not computed again; `reused` (may be null) is the number of tokens that were there.
  virtual torch::Tensor restart(const std::vector<std::vector<int64_t>>& pieces, int64_t* reused) = 0;
  virtual int64_t context_length() const = 0;
  virtual int64_t vocab_size() const = 0;
};

/// A model and the cache of what it has read. Rows of unequal length are padded on the left and masked.
class Session : public Steps {
 public:
  /// Prompts are read in chunks of `chunk` tokens, which bounds the memory of long ones.
  explicit Session(std::shared_ptr<CausalModel> model, int64_t chunk = 512);

  /// Throws Error: an id outside the vocabulary, an empty first piece, another number of rows than before, no room left
  /// in the context.
  torch::Tensor feed(const std::vector<std::vector<int64_t>>& pieces) override;
  /// The same, with the logits behind every token: [B, T, V] f32, T the longest piece; shorter ones stand at the right.
  torch::Tensor feed_all(const std::vector<std::vector<int64_t>>& pieces);
  void select(const std::vector<int64_t>& rows) override;
  torch::Tensor restart(const std::vector<std::vector<int64_t>>& pieces, int64_t* reused) override;

  Session fork() const;       ///< an independent copy, cache and all
  void crop(int64_t length);  ///< forgets all columns from `length` on
  void clear();
  int64_t length() const { return cache_.length(); }  ///< columns of the cache, padding included
  int64_t rows() const { return static_cast<int64_t>(columns_.size()); }
  /// Row `row` of the cache, one id a column, -1 where it is padding.
  std::span<const int64_t> content(int64_t row) const { return columns_.at(static_cast<size_t>(row)); }
  int64_t context_length() const override { return model_->context_length(); }
  int64_t vocab_size() const override { return model_->vocab_size(); }
  CausalModel& model() { return *model_; }
  const KvCache& cache() const { return cache_; }

  // What every pass of this session carries.
  Edits edits;
  Trace* trace = nullptr;
  bool gradients = false;  ///< for policies that optimise an edit while decoding

 private:
  torch::Tensor run(const std::vector<std::vector<int64_t>>& pieces, bool all);

  std::shared_ptr<CausalModel> model_;
  torch::Device device_;
  int64_t chunk_;
  KvCache cache_;
  std::vector<std::vector<int64_t>> columns_;
  std::vector<int64_t> real_;  ///< real tokens of every row
};

}  // namespace moiety
