#pragma once
// Images in front of the text of a decoder, as in LLaVA (Liu et al. 2023, arXiv 2304.08485): patches become vectors
// that stand where tokens would; to every part of the model they are tokens.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <vector>

#include "moiety/models/model.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/pass.h"

namespace moiety {

/// In the next pass over ids [B, T] a decoder takes `vectors` [N, hidden], a float type, for what enters its first
/// block at the N true positions of `where` [B, T] bool, row by row; ids there are looked at no further, but have to
/// be some of the vocabulary. Gradients reach `vectors`. What a family multiplies embeddings with does not touch them.
/// Mask, positions, segments and cache are as with tokens. Error: the sizes do not fit each other.
void place_vectors(Pass& pass, const torch::Tensor& where, const torch::Tensor& vectors);
/// What enters the first block: x [B, T, hidden] with what place_vectors() left in the pass, which then has it no more.
/// Models call it. Error: the sizes do not fit x.
torch::Tensor with_placed_vectors(const torch::Tensor& x, Pass& pass);

/// Square patches of an image, row by row from the top left, each through one matrix with a bias that learn: weights
/// N(0, 0.02), bias 0, from torch's random state.
class ImageTokens : public torch::nn::Module {
 public:
  /// Error: the side of an image is no multiple of a patch's.
  ImageTokens(int64_t image, int64_t channels, int64_t patch, int64_t hidden);
  /// images [B, channels, image, image] f32 -> [B, tokens(), hidden] f32. Error for another shape.
  torch::Tensor forward(const torch::Tensor& images);
  int64_t tokens() const { return side_ * side_; }  ///< of an image
  /// image_tokens.weight [hidden, channels patch^2] and image_tokens.bias [hidden].
  std::vector<StoredTensor> stored() const;

 private:
  int64_t image_, channels_, patch_, side_;
  Linear adaptor_{nullptr};
};

}  // namespace moiety
