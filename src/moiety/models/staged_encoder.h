#pragma once
// An encoder block by block, for what looks at one layer at a time.
#include <torch/types.h>

#include <vector>

#include "moiety/models/model.h"
#include "moiety/nn/linear.h"

namespace moiety {

/// What load_encoder's models also are. Rows are of one length, without padding, of token type 0.
class StagedEncoder : public EncoderModel {
 public:
  virtual int64_t blocks() const = 0;
  virtual torch::Tensor embedded(const torch::Tensor& ids) = 0;  ///< [B, T] int64 -> [B, T, d]
  virtual torch::Tensor run_block(int64_t block, const torch::Tensor& x) = 0;
  /// The last block's output as sentence embeddings [B, d] f32.
  virtual torch::Tensor sentence(const torch::Tensor& x) = 0;
  virtual int64_t vocabulary() const = 0;
  virtual std::vector<Linear> matrices(int64_t block) const = 0;  ///< in the order in which a block has them
  virtual std::vector<StoredTensor> stored() const = 0;
};

}  // namespace moiety
