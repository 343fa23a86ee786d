#pragma once
// Self-attention of decoders: grouped queries, rotary positions, sliding windows, query/key norms, sinks, soft caps,
// and the latent form of DeepSeek-V2/V3.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "moiety/nn/linear.h"
#include "moiety/nn/norm.h"
#include "moiety/nn/pass.h"
#include "moiety/nn/rope.h"

namespace moiety {

/// What one pass knows about its tokens: where they stand and who may look at whom. Built once, shared by all layers.
class AttentionContext {
 public:
  /// positions [B, T] of the new tokens behind `past` cached ones; padding [B, past + T] bool or undefined (true:
  /// real); segments [B, T] or undefined.
  AttentionContext(torch::Tensor positions, int64_t past, torch::Tensor padding, torch::Tensor segments);

  /// [1 or B, 1, T, past + T] bool for a window (0: all); undefined when nothing but the causal rule applies, see
  /// causal().
  const torch::Tensor& allowed(int64_t window) const;
  /// True when allowed(window) is undefined and queries must still be kept from later keys (T > 1).
  bool causal() const { return tokens_ > 1; }
  /// Some tokens are padding, or rows hold several sequences.
  bool padded() const { return padding_.defined() || segments_.defined(); }
  /// Rotary angles of this pass's positions, computed once for each rope.
  const std::pair<torch::Tensor, torch::Tensor>& angles(const Rope& rope) const;

 private:
  int64_t batch_, tokens_, past_;
  torch::Tensor positions_, padding_, segments_;
  mutable std::map<int64_t, torch::Tensor> allowed_;
  mutable std::map<const Rope*, std::pair<torch::Tensor, torch::Tensor>> angles_;
};

/// softmax(q k^T * scale + mask) v. q [B, H, T, D], k [B, Hk, S, D], v [B, Hk, S, Dv] -> [B, H, T, Dv].
struct AttentionOptions {
  double scale = 1.0;
  int64_t window = 0;    ///< 0: unlimited
  double softcap = 0.0;  ///< logits = cap * tanh(logits / cap); 0: off
  torch::Tensor sinks;   ///< [H]: a learned logit that takes probability and gives nothing (gpt-oss)
  /// Without a graph f32 operands of many queries may be rounded to bf16; scores, softmax and sums stay in f32. For
  /// layers whose matrices round their activations to 8 bits, beside which this does not show.
  bool round_operands = false;
};
torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                     const AttentionContext& context, const AttentionOptions& options);
/// The same over keys and values as a cache keeps them. A few tokens read them as they are stored; for more they are
/// widened some rows and heads at a time, never the whole of a long cache at once.
torch::Tensor attend(const torch::Tensor& q, const CacheRows& k, const CacheRows& v, const AttentionContext& context,
                     const AttentionOptions& options);

/// A matrix that parts at the site `linear` may stand beside.
struct NamedMatrix {
  const char* name;  ///< "q_proj"
  int input;         ///< which of the layer's inputs it reads: matrices of one input share it and stand side by side
  Linear linear;
};

/// An attention site: x [B, T, d] -> [B, T, d].
class AttentionBase : public torch::nn::Module {
 public:
  /// Its matrices that parts may stand beside; it multiplies by these through project().
  virtual std::vector<NamedMatrix> matrices() const { return {}; }
  virtual torch::Tensor forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) = 0;
};

struct AttentionParts {
  Linear q{nullptr}, k{nullptr}, v{nullptr}, o{nullptr};
  std::shared_ptr<Norm> q_norm, k_norm;  ///< over the head size, or over all heads together when `norm_all_heads`
  bool norm_all_heads = false;
  bool norm_after_rope = false;
  std::shared_ptr<const Rope> rope;  ///< null: no positions (NoPE)
  int64_t head_dim = 0;
  double clip = 0.0;  ///< clamp q, k, v to [-clip, clip]; 0: off
  AttentionOptions options;
};

class Attention : public AttentionBase {
 public:
  explicit Attention(AttentionParts parts);
  std::vector<NamedMatrix> matrices() const override;
  torch::Tensor forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) override;
  AttentionParts parts;
};

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are expanded from a cached latent.
struct LatentAttentionParts {
  Linear q{nullptr};                  ///< direct, or
  Linear q_a{nullptr}, q_b{nullptr};  ///< through a low rank with a norm between
  std::shared_ptr<Norm> q_a_norm, kv_a_norm;
  Linear kv_a{nullptr}, kv_b{nullptr}, o{nullptr};  ///< kv_a [rank + rope, d], kv_b [H * (nope + v), rank]
  std::shared_ptr<const Rope> rope;
  int64_t heads = 0, nope_dim = 0, rope_dim = 0, v_dim = 0, rank = 0;
  double scale = 1.0;
};

class LatentAttention : public AttentionBase {
 public:
  explicit LatentAttention(LatentAttentionParts parts);
  std::vector<NamedMatrix> matrices() const override;
  torch::Tensor forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) override;
  LatentAttentionParts parts;
};

}  // namespace moiety
