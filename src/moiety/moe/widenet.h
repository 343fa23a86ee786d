#pragma once
// WideNet (Xue et al. 2021, arXiv 2107.11817): one attention and one mixture of experts shared by all blocks, which
// differ in their layer norms only.
#include <memory>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/norm.h"

namespace moiety {

struct WideNetConfig {
  int64_t experts = 4;
  int64_t top_k = 2;
  double capacity_factor = 1.2;
  double balance_coef = 0.01;
  bool noise = true;  ///< while training, N(0, 1/E^2) on the logits
  std::string output_activation = "none";
  bool unlimited = false;          ///< an expert has a place for every token
  bool official_capacity = false;  ///< one place less an expert, as the official code counts
  double dropout = 0.1;
  void fields(Fields& f);
  std::string problem() const;
};

/// Softmax over all experts of W x (+ noise), the K best, their scores as gates, at most floor(T C K / E) tokens an
/// expert. Loss "widenet.balance" per call, counted before dropping.
class CapacityRouter : public Router {
 public:
  CapacityRouter(Linear projection, WideNetConfig config);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return projection->out(); }
  void set_active(int64_t k) override {
    check_active(k);
    config.top_k = k;
  }
  /// Places an expert has in a batch of `tokens`.
  int64_t capacity(int64_t tokens) const;
  Linear projection{nullptr};
  WideNetConfig config;
  /// [N, E] standard normal numbers to use in the next pass that trains; undefined: drawn.
  torch::Tensor noise;
};

/// Attention of all positions to all, with biases; no positions, no mask but the padding's. Parts may stand beside its
/// matrices.
class BidirectionalAttention : public torch::nn::Module {
 public:
  BidirectionalAttention(Linear q, Linear k, Linear v, Linear o, int64_t heads);
  /// x [B, T, d] -> [B, T, d]; keys where the pass's mask is false are not looked at.
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  Linear q{nullptr}, k{nullptr}, v{nullptr}, o{nullptr};

 private:
  int64_t heads_;
};

struct WideNetBlock {
  std::shared_ptr<Norm> before_attention;
  std::shared_ptr<BidirectionalAttention> attention;
  std::shared_ptr<Norm> before_ffn;
  std::shared_ptr<FeedForwardBase> ffn;
};

/// x -> u = x + A_i(LN1_i x), u + M_i(LN2_i u) for i < L. In the full method all blocks have one A and one M; blocks
/// that name the same module share it, and it is registered once. Routing is reported under (block, 0, "ffn"). Dropout
/// behind attention while the module trains.
class WideNet : public torch::nn::Module {
 public:
  explicit WideNet(std::vector<WideNetBlock> blocks, double dropout = 0.0);
  /// One attention, one mixture, and a pair of norms a block.
  WideNet(std::shared_ptr<BidirectionalAttention> attention, std::shared_ptr<Mixture> mixture,
          std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>> norms, double dropout = 0.0);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  /// One block alone, as forward() runs it.
  torch::Tensor run_block(size_t i, const torch::Tensor& x, Pass& pass);
  const std::vector<WideNetBlock>& blocks() const { return blocks_; }

 private:
  std::vector<WideNetBlock> blocks_;
  double dropout_;
};

}  // namespace moiety
