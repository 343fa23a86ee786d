#pragma once
// A matrix with one interface over many stores: trainable float tensors, and mapped GGUF blocks that are never expanded as a whole.
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <memory>

#include "moiety/io/tensor_view.h"

namespace moiety {

/// y = x W^T + b. W is [out, in], or one slice of a stack [E, out, in].
class LinearImpl : public torch::nn::Module {
 public:
  /// A trainable matrix; initialised like torch's Linear unless loaded over.
  LinearImpl(int64_t in, int64_t out, bool bias = false);
  /// A frozen block-quantized matrix over a mapped file (nothing is copied).
  LinearImpl(const TensorView& blocks, torch::Tensor bias = {});

  /// x [..., in] -> [..., out], in x's dtype. Differentiable in x always, in W when it is a float tensor.
  torch::Tensor forward(const torch::Tensor& x);
  /// Rows `ids` of the matrix (an embedding look-up), [..., in].
  torch::Tensor rows(const torch::Tensor& ids, torch::Dtype dtype);
  /// The whole matrix in `dtype` (dequantized when it is blocks).
  torch::Tensor dense(torch::Dtype dtype) const;

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  bool quantized() const { return blocks_ != nullptr; }

  torch::Tensor weight;  ///< [out, in], undefined when quantized
  torch::Tensor bias;    ///< [out], or undefined

 private:
  int64_t in_, out_;
  std::shared_ptr<const TensorView> blocks_;
};
TORCH_MODULE(Linear);

}  // namespace moiety
