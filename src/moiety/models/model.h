#pragma once
// Pretrained models from a checkpoint: one decoder and one encoder, assembled from config.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "moiety/nn/pass.h"

namespace moiety {

struct LoadOptions {
  std::string dtype = "auto";  ///< auto (as stored; f32 beside block-quantized weights), f32, bf16
  torch::Device device = torch::kCPU;
  /// Private copies of all float tensors that ask for gradients, instead of read-only mapped ones. They are f32
  /// whatever `dtype` computes in: optimizers need the digits.
  bool trainable = false;
  /// With `trainable`: only what parts beside matrices bring is trainable. The rest is held as for inference, blocks
  /// stay blocks.
  bool frozen_base = false;
  /// Matrices of experts stay in their file, one Linear each that is never read unless it is used (offload/).
  bool leave_experts = false;
};

/// One tensor of a model as checkpoints of its family store it.
struct StoredTensor {
  std::string name;                      ///< Hugging Face name
  std::function<torch::Tensor()> value;  ///< cut, joined or transposed from the parameters as they are when called
};

/// A decoder-only language model.
class CausalModel : public torch::nn::Module {
 public:
  /// ids [B, T] int64 -> logits [B, T, V] f32 (or [B, 1, V], see Pass::last_logits_only).
  virtual torch::Tensor forward(const torch::Tensor& ids, Pass& pass) = 0;
  /// ids [B, T] -> final normed hidden states [B, T, d].
  virtual torch::Tensor hidden(const torch::Tensor& ids, Pass& pass) = 0;
  virtual KvCache make_cache() const = 0;
  virtual int64_t vocab_size() const = 0;
  virtual int64_t context_length() const = 0;
  virtual int64_t blocks() const = 0;
  /// Experts of the mixture at `block`, 0 where the block is dense.
  virtual int64_t experts(int64_t block) const = 0;
  virtual const nlohmann::json& config() const = 0;
  CacheFormats cache_formats;  ///< of what make_cache() makes
  /// All tensors of the model by their names in a checkpoint, with the layout that it was loaded from, or that
  /// transformers writes today when it was not. Their values follow the parameters. Error when the model cannot say.
  virtual std::vector<StoredTensor> stored() const;
};

/// A bidirectional encoder (BERT, RoBERTa, DistilBERT, MiniLM).
class EncoderModel : public torch::nn::Module {
 public:
  /// ids [B, T] int64, mask [B, T] bool (undefined: all real), types [B, T] int64 (undefined: 0) -> hidden states [B,
  /// T, d] f32.
  virtual torch::Tensor forward(const torch::Tensor& ids, const torch::Tensor& mask,
                                const torch::Tensor& types = {}) = 0;
  /// Sentence embeddings [B, d] with the checkpoint's own pooling and normalization (sentence-transformers' modules;
  /// mean and L2-normalized when it has none).
  virtual torch::Tensor embed(const torch::Tensor& ids, const torch::Tensor& mask) = 0;
  /// hidden [B, T, d] -> [B, d] f32: the pooler that BERT was trained with (tanh of a dense layer over the first
  /// token). Error when the checkpoint has none.
  virtual torch::Tensor pooled(const torch::Tensor& hidden) = 0;
  virtual int64_t max_length() const = 0;
  virtual const nlohmann::json& config() const = 0;
};

bool is_encoder(const nlohmann::json& config);
/// model_type values of the encoders that load.
std::vector<std::string> encoder_families();
/// Throws Error: unknown model_type (naming the nearest), missing or misshapen tensors (naming them).
std::shared_ptr<CausalModel> load_causal(const Checkpoint& checkpoint, const LoadOptions& options = {});
/// The same under a changed config: with parts, say.
std::shared_ptr<CausalModel> load_causal(const Checkpoint& checkpoint, const nlohmann::json& config,
                                         const LoadOptions& options);
/// The same model with random weights drawn from torch's generator: what training from scratch starts from.
std::shared_ptr<CausalModel> make_causal(const nlohmann::json& config, const LoadOptions& options = {});
std::shared_ptr<EncoderModel> load_encoder(const Checkpoint& checkpoint, const LoadOptions& options = {});

}  // namespace moiety
