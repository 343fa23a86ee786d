#pragma once
// Vision transformers that classify images: WideNet (Xue et al. 2021, arXiv 2107.11817), whose blocks share attention
// and experts, and what it is compared with: blocks of their own (ViT, arXiv 2010.11929), dense layers, shared norms.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/models/model.h"
#include "moiety/moe/widenet.h"

namespace moiety {

class WeightsSource;

struct VisionConfig {
  int64_t image = 28, channels = 1, patch = 7;
  int64_t hidden = 64, blocks = 6, heads = 4;
  int64_t width = 128;  ///< hidden units of the dense layer, and of one expert
  int64_t classes = 10;
  double dropout = 0.1, norm_eps = 1e-6;
  bool mixture = true;          ///< the feed-forward layer is a mixture of experts, else dense
  bool share_attention = true;  ///< one for all blocks of a group
  bool share_ffn = true;        ///< the experts, or the dense layer
  bool share_router = true;     ///< of shared experts
  bool share_norms = false;
  int64_t group = 128;  ///< blocks that share; only the last group has a mixture, those before it dense layers
  WideNetConfig moe;
  void fields(Fields& f);
  std::string problem() const;
};

/// Patches by a strided convolution, a position of zeros in front that is no parameter, trained positions, blocks, a
/// last norm, the mean over all positions, a dense layer with tanh, and one to the classes. Kernels start as Keras
/// does it: uniform within sqrt(6 / (fan in + fan out)), experts each by its own fans; biases 0, in feed-forward layers
/// N(0, 1e-6); positions N(0, 0.02). Parts at the site `linear` stand beside q_proj, k_proj, v_proj and o_proj of
/// attention and up_proj and down_proj of dense layers; blocks that share a matrix share what stands beside it.
class VisionModel : public torch::nn::Module {
 public:
  /// New and trainable, from torch's random state. Throws Error for a config that does not fit together.
  explicit VisionModel(VisionConfig config);
  /// `parts`: a list as `moiety.parts` of its config.json, or null. Error for parts at other sites than `linear`.
  VisionModel(VisionConfig config, WeightsSource& weights, nlohmann::json parts = nullptr);
  /// images [B, channels, image, image] f32, about -1 to 1 -> logits [B, classes] f32. Capacity couples the images of a
  /// batch; a capacity factor of infinity does not. Error for images of another shape.
  torch::Tensor forward(const torch::Tensor& images, Pass& pass);
  /// forward() in steps: images to positions [B, T, hidden], which body() takes to others, and from those to logits.
  torch::Tensor embed(const torch::Tensor& images);
  WideNet& body() { return *body_; }
  torch::Tensor read_out(const torch::Tensor& positions);
  /// What read_out() classifies: [B, T, hidden] -> the mean of the normed positions [B, hidden], f32.
  torch::Tensor pooled(const torch::Tensor& positions);
  const VisionConfig& config() const { return config_; }
  /// What its config.json holds: `model_type`, the keys of VisionConfig and `moiety.parts`.
  nlohmann::json json() const;
  /// All tensors by their names in a checkpoint; what blocks share is there once.
  const std::vector<StoredTensor>& stored() const { return stored_; }

 private:
  VisionConfig config_;
  nlohmann::json parts_;
  torch::Dtype dtype_ = torch::kFloat32;  // what is computed in
  torch::Tensor patches_, patches_bias_, positions_;
  std::shared_ptr<WideNet> body_;
  std::shared_ptr<Norm> norm_;
  Linear representation_{nullptr}, head_{nullptr};
  std::vector<StoredTensor> stored_;
};

/// True for the config.json of such a model: `model_type` is moiety_vision.
bool is_vision(const nlohmann::json& config);
/// Its settings. `where` names the source. Error naming unknown keys and what does not fit.
VisionConfig parse_vision_config(const nlohmann::json& config, const std::string& where);
/// Throws Error: missing, misshapen and left-over tensors (naming them); a checkpoint that shares otherwise than the
/// config, or has norms for another number of blocks.
std::shared_ptr<VisionModel> load_vision(const Checkpoint& checkpoint, const LoadOptions& options = {});
/// The same with other parts: a list as `moiety.parts`, or null. Those that the checkpoint lacks start new.
std::shared_ptr<VisionModel> load_vision(const Checkpoint& checkpoint, const nlohmann::json& parts,
                                         const LoadOptions& options);
/// New, from torch's random state.
std::shared_ptr<VisionModel> make_vision(VisionConfig config, const LoadOptions& options = {},
                                         const nlohmann::json& parts = nullptr);

}  // namespace moiety
