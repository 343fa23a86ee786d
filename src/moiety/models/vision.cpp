#include "moiety/models/vision.h"

#include <torch/torch.h>

#include <cmath>
#include <vector>

#include "moiety/base/error.h"

namespace moiety {

using torch::Tensor;

void VisionConfig::fields(Fields& f) {
  f("image", image, "side of an image in pixels").min(1).max(4096);
  f("channels", channels, "colours of a pixel").min(1).max(4);
  f("patch", patch, "side of a patch in pixels").min(1);
  f("hidden", hidden, "features of a position").min(1);
  f("blocks", blocks, "depth").min(1).max(4096);
  f("heads", heads, "heads of attention").min(1);
  f("width", width, "hidden units of the dense layer, and of one expert").min(1);
  f("classes", classes, "labels").min(2);
  f("dropout", dropout, "dropout behind positions, attention and dense feed-forward layers").min(0).max(0.99);
  f("norm_eps", norm_eps, "added to the variance in norms").min(0);
  f("mixture", mixture, "the feed-forward layer is a mixture of experts, else dense");
  f("share_attention", share_attention, "one attention for all blocks of a group");
  f("share_ffn", share_ffn, "one set of experts (or one dense layer) for all blocks of a group");
  f("share_router", share_router, "shared experts have one router, else one a block");
  f("share_norms", share_norms, "one pair of norms for all blocks");
  f("group", group, "blocks that share; only the last group has a mixture").min(1);
  f("moe", moe, "the mixture");
}

std::string VisionConfig::problem() const {
  if (image % patch != 0) return fmt::format("`image` {} cannot be cut into patches of `patch` {}", image, patch);
  if (hidden % heads != 0) return fmt::format("`hidden` {} cannot be shared by `heads` {}", hidden, heads);
  return moe.problem();
}

namespace {

Tensor normal(std::vector<int64_t> shape, double std) {
  return (torch::randn(shape) * std).requires_grad_();
}
Tensor glorot(std::vector<int64_t> shape, int64_t in, int64_t out) {
  const double bound = std::sqrt(6.0 / static_cast<double>(in + out));
  return torch::empty(shape).uniform_(-bound, bound).requires_grad_();
}

Linear dense(int64_t in, int64_t out, bool bias = true) {
  return Linear(glorot({out, in}, in, out), bias ? torch::zeros({out}).requires_grad_() : Tensor());
}
LinearStack stack(int64_t count, int64_t in, int64_t out) {
  return LinearStack(glorot({count, out, in}, in, out), normal({count, out}, 1e-6));
}

// One expert for every token, and no router.
class DenseLayer : public FeedForwardBase {
 public:
  explicit DenseLayer(std::shared_ptr<MlpExperts> layer) : layer_(register_module("layer", std::move(layer))) {}
  Tensor forward(const Tensor& x, Pass&) override {
    const auto flat = x.reshape({-1, x.size(-1)});
    return layer_->forward(flat, {flat.size(0)}).view(x.sizes());
  }

 private:
  std::shared_ptr<MlpExperts> layer_;
};

std::shared_ptr<MlpExperts> experts(const VisionConfig& c, bool mixture) {
  const int64_t count = mixture ? c.moe.experts : 1;
  return std::make_shared<MlpExperts>(
      stack(count, c.hidden, c.width), stack(count, c.width, c.hidden), activation("gelu_new"),
      c.moe.output_activation == "gelu" ? activation("gelu_new") : nullptr, mixture ? c.moe.dropout : c.dropout);
}

std::vector<WideNetBlock> blocks_of(const VisionConfig& c) {
  std::vector<WideNetBlock> blocks(static_cast<size_t>(c.blocks));
  const auto fresh_norm = [&] {
    return std::make_shared<LayerNorm>(torch::ones({c.hidden}).requires_grad_(),
                                       torch::zeros({c.hidden}).requires_grad_(), c.norm_eps);
  };
  std::shared_ptr<MlpExperts> shared_experts;
  for (int64_t i = 0; i < c.blocks; ++i) {
    auto& b = blocks[static_cast<size_t>(i)];
    const bool first = i % c.group == 0, mixture = c.mixture && i / c.group == (c.blocks - 1) / c.group;
    const WideNetBlock* before = i == 0 ? nullptr : &blocks[static_cast<size_t>(i - 1)];
    b.before_attention = before && c.share_norms ? before->before_attention : fresh_norm();
    b.before_ffn = before && c.share_norms ? before->before_ffn : fresh_norm();
    const int64_t d = c.hidden;
    b.attention = first || !c.share_attention ? std::make_shared<BidirectionalAttention>(
                                                    dense(d, d), dense(d, d), dense(d, d), dense(d, d), c.heads)
                                              : before->attention;
    if (first || !c.share_ffn) shared_experts = experts(c, mixture);
    if (!first && c.share_ffn && (!mixture || c.share_router))
      b.ffn = before->ffn;
    else if (mixture)
      b.ffn = std::make_shared<Mixture>(std::make_shared<CapacityRouter>(dense(d, c.moe.experts, false), c.moe),
                                        shared_experts);
    else
      b.ffn = std::make_shared<DenseLayer>(shared_experts);
  }
  return blocks;
}

}  // namespace

VisionModel::VisionModel(VisionConfig c) : config_(std::move(c)) {
  const std::string problem = config_.problem();
  check(problem.empty(), "{}", problem);
  const int64_t p = config_.patch, d = config_.hidden, side = config_.image / p;
  patches_ = register_parameter("patches", glorot({d, config_.channels, p, p}, config_.channels * p * p, d * p * p));
  patches_bias_ = register_parameter("patches_bias", torch::zeros({d}).requires_grad_());
  positions_ = register_parameter("positions_embedding", normal({side * side + 1, d}, 0.02));
  body_ = register_module("body", std::make_shared<WideNet>(blocks_of(config_), config_.dropout));
  norm_ = register_module("norm", std::make_shared<LayerNorm>(torch::ones({d}).requires_grad_(),
                                                              torch::zeros({d}).requires_grad_(), config_.norm_eps));
  representation_ = register_module("representation", dense(d, d));
  head_ = register_module("head", dense(d, config_.classes));
}

Tensor VisionModel::forward(const Tensor& images, Pass& pass) {
  check(images.dim() == 4 && images.size(1) == config_.channels && images.size(2) == config_.image &&
            images.size(3) == config_.image,
        "the model takes images of {} channel(s) and {} x {} pixels", config_.channels, config_.image, config_.image);
  auto x = torch::conv2d(images, patches_, patches_bias_, config_.patch).flatten(2).transpose(1, 2);
  x = torch::constant_pad_nd(x, {0, 0, 1, 0}) + positions_;
  if (config_.dropout > 0.0) x = torch::dropout(x, config_.dropout, is_training());
  x = norm_->forward(body_->forward(x, pass)).mean(1);
  return head_(torch::tanh(representation_(x)));
}

}  // namespace moiety
