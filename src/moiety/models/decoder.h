#pragma once
// The one decoder: every family of parse_decoder_config, assembled from parts.
#include <memory>
#include <vector>

#include "moiety/models/decoder_config.h"
#include "moiety/models/model.h"
#include "moiety/nn/attention.h"
#include "moiety/nn/feed_forward.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/norm.h"

namespace moiety {

/// One block. Norms that the placement does not use are null.
class Block : public torch::nn::Module {
 public:
  Block(Placement placement, double residual_scale, std::shared_ptr<AttentionBase> attention,
        std::shared_ptr<FeedForwardBase> ffn, std::shared_ptr<Norm> before_attention,
        std::shared_ptr<Norm> after_attention, std::shared_ptr<Norm> before_ffn, std::shared_ptr<Norm> after_ffn);
  torch::Tensor forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass);
  Placement placement() const { return placement_; }
  double residual_scale() const { return residual_scale_; }

  std::shared_ptr<AttentionBase> attention;
  std::shared_ptr<FeedForwardBase> ffn;
  std::shared_ptr<Norm> before_attention, after_attention, before_ffn, after_ffn;

 private:
  Placement placement_;
  double residual_scale_;
};

class Decoder : public CausalModel {
 public:
  Decoder(nlohmann::json config, DecoderConfig parsed, Linear embed, std::vector<std::shared_ptr<Block>> blocks,
          std::shared_ptr<Norm> norm, Linear head, torch::Dtype dtype);
  torch::Tensor forward(const torch::Tensor& ids, Pass& pass) override;
  torch::Tensor hidden(const torch::Tensor& ids, Pass& pass) override;
  KvCache make_cache() const override { return KvCache(blocks(), cache_formats); }
  int64_t vocab_size() const override { return parsed.vocab; }
  int64_t context_length() const override { return parsed.context; }
  int64_t blocks() const override { return static_cast<int64_t>(layers.size()); }
  int64_t experts(int64_t block) const override;
  const nlohmann::json& config() const override { return json_; }
  std::vector<StoredTensor> stored() const override { return stored_tensors; }
  torch::Dtype dtype() const { return dtype_; }  ///< of hidden states
  /// What enters the first block: ids [B, T] -> [B, T, d]. Error: an id that the vocabulary does not have.
  torch::Tensor embedded(const torch::Tensor& ids);
  /// What comes of products with the head: f32, scaled and capped as the family does.
  torch::Tensor finished(const torch::Tensor& products) const;

  DecoderConfig parsed;
  Linear embed{nullptr}, head{nullptr};  ///< the same module when tied
  std::vector<std::shared_ptr<Block>> layers;
  std::shared_ptr<Norm> norm;
  std::vector<StoredTensor> stored_tensors;

 private:
  nlohmann::json json_;
  torch::Dtype dtype_;
};

}  // namespace moiety
