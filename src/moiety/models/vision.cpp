#include "moiety/models/vision.h"

#include <torch/torch.h>

#include <cmath>
#include <set>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/io/peft.h"
#include "moiety/models/model_parts.h"
#include "moiety/models/weights_source.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

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

constexpr const char* kModelType = "moiety_vision";

Init glorot(int64_t in, int64_t out) {
  return [bound = std::sqrt(6.0 / static_cast<double>(in + out))](Tensor t) { t.uniform_(-bound, bound); };
}

// drop(down(drop(gelu(up x)))), with the activation of experts' outputs where these have one.
class VisionLayer : public FeedForwardBase {
 public:
  VisionLayer(Linear u, Linear d, bool activated, double dropout) : activated_(activated), dropout_(dropout) {
    up = register_module("up_proj", std::move(u));
    down = register_module("down_proj", std::move(d));
  }
  Tensor forward(const Tensor& x, Pass& pass) override {
    static const Activation gelu = activation("gelu_new");
    const auto drop = [&](const Tensor& t) { return dropout_ > 0.0 ? torch::dropout(t, dropout_, is_training()) : t; };
    const auto y = project(down, drop(gelu(project(up, x, pass))), pass);
    return drop(activated_ ? gelu(y) : y);
  }
  Linear up{nullptr}, down{nullptr};

 private:
  bool activated_;
  double dropout_;
};

// The model's own tensors by name, in the order in which they are asked for. Beside a frozen base parts alone learn.
class Pieces {
 public:
  Pieces(WeightsSource& weights, const VisionConfig& config) : w_(weights), c_(config) {}

  Tensor tensor(const std::string& name, std::vector<int64_t> shape, const Init& init) {
    if (!w_.has(name, true)) w_.view(name, shape);  // only what parts lack may be new: says what is missing
    const auto t = w_.tensor(name, std::move(shape), init);
    return t.requires_grad() && !w_.trainable() ? t.detach() : t;
  }
  Linear dense(const std::string& name, int64_t in, int64_t out, bool bias = true) {
    const auto weight = tensor(name + ".weight", {out, in}, glorot(in, out));
    const Linear linear(weight, bias ? tensor(name + ".bias", {out}, constant_init(0.0)) : Tensor());
    w_.store(name + ".weight", [linear] { return stored_matrix(linear); });
    if (bias) w_.store(name + ".bias", [linear] { return stored_bias(linear); });
    return linear;
  }
  std::shared_ptr<Norm> norm(const std::string& name) {
    const auto weight = tensor(name + ".weight", {c_.hidden}, constant_init(1.0));
    return std::make_shared<LayerNorm>(weight, tensor(name + ".bias", {c_.hidden}, constant_init(0.0)), c_.norm_eps);
  }
  std::shared_ptr<BidirectionalAttention> attention(const std::string& at) {
    const auto q = dense(at + "q", c_.hidden, c_.hidden), k = dense(at + "k", c_.hidden, c_.hidden),
               v = dense(at + "v", c_.hidden, c_.hidden), o = dense(at + "o", c_.hidden, c_.hidden);
    return std::make_shared<BidirectionalAttention>(q, k, v, o, c_.heads);
  }
  std::shared_ptr<MlpExperts> experts(const std::string& at) {
    const auto stack = [&](const std::string& n, int64_t in, int64_t out) {
      const auto weight = tensor(at + "w" + n, {c_.moe.experts, out, in}, glorot(in, out));
      return LinearStack(weight, tensor(at + "b" + n, {c_.moe.experts, out}, normal_init(1e-6)));
    };
    const auto first = stack("1", c_.hidden, c_.width), second = stack("2", c_.width, c_.hidden);
    return std::make_shared<MlpExperts>(first, second, activation("gelu_new"),
                                        c_.moe.output_activation == "gelu" ? activation("gelu_new") : nullptr,
                                        c_.moe.dropout);
  }
  // A checkpoint has the dense layer as a set of one expert.
  std::shared_ptr<VisionLayer> layer(const std::string& at) {
    const auto only = [&](const std::string& n, int64_t in, int64_t out) {
      const auto whole = tensor(at + "w" + n, {1, out, in}, glorot(in, out)),
                 biases = tensor(at + "b" + n, {1, out}, normal_init(1e-6));
      const Linear linear(w_.parameter(whole.detach()[0]), w_.parameter(biases.detach()[0]));
      w_.store(at + "w" + n, [linear] { return stored_matrix(linear).unsqueeze(0); });
      w_.store(at + "b" + n, [linear] { return stored_bias(linear).unsqueeze(0); });
      return linear;
    };
    const auto up = only("1", c_.hidden, c_.width), down = only("2", c_.width, c_.hidden);
    return std::make_shared<VisionLayer>(up, down, c_.moe.output_activation == "gelu", c_.dropout);
  }

 private:
  WeightsSource& w_;
  const VisionConfig& c_;
};

// Where the tensors of what blocks share stand: "shared." when there is one group of blocks, else one place a group.
std::string place(const VisionConfig& c, int64_t block, bool shared) {
  if (!shared) return fmt::format("blocks.{}.", block);
  return c.group >= c.blocks ? "shared." : fmt::format("groups.{}.", block / c.group);
}

std::vector<WideNetBlock> blocks_of(const VisionConfig& c, Pieces& pieces) {
  std::vector<WideNetBlock> blocks(static_cast<size_t>(c.blocks));
  std::shared_ptr<MlpExperts> shared_experts;
  std::shared_ptr<VisionLayer> shared_layer;
  for (int64_t i = 0; i < c.blocks; ++i) {
    auto& b = blocks[static_cast<size_t>(i)];
    const bool first = i % c.group == 0, mixture = c.mixture && i / c.group == (c.blocks - 1) / c.group;
    const WideNetBlock* before = i == 0 ? nullptr : &blocks[static_cast<size_t>(i - 1)];
    const std::string own = fmt::format("blocks.{}.", i), norms = c.share_norms ? "shared." : own;
    b.before_attention = before && c.share_norms ? before->before_attention : pieces.norm(norms + "ln1");
    b.before_ffn = before && c.share_norms ? before->before_ffn : pieces.norm(norms + "ln2");
    b.attention = first || !c.share_attention ? pieces.attention(place(c, i, c.share_attention) + "attention.")
                                              : before->attention;
    const std::string at = place(c, i, c.share_ffn) + "ffn.experts.";
    if ((first || !c.share_ffn) && mixture) shared_experts = pieces.experts(at);
    if ((first || !c.share_ffn) && !mixture) shared_layer = pieces.layer(at);
    if (!first && c.share_ffn && (!mixture || c.share_router))
      b.ffn = before->ffn;
    else if (mixture)
      b.ffn = std::make_shared<Mixture>(
          std::make_shared<CapacityRouter>(
              pieces.dense(place(c, i, c.share_ffn && c.share_router) + "ffn.router", c.hidden, c.moe.experts, false),
              c.moe),
          shared_experts);
    else
      b.ffn = shared_layer;
  }
  return blocks;
}

// What stands beside the matrices of every block; a matrix that blocks share belongs to the first of them.
void attach_to_blocks(WeightsSource& w, const std::vector<WideNetBlock>& blocks, ModelParts& parts) {
  std::set<const LinearImpl*> seen;
  for (size_t i = 0; i < blocks.size(); ++i) {
    std::vector<SiteMatrix> matrices;
    const auto add = [&](const char* name, const char* half, int input, const Linear& linear) {
      matrices.push_back({name, half, input, linear, !seen.insert(linear.get()).second});
    };
    const auto& a = *blocks[i].attention;
    add("q_proj", "attention", 0, a.q);
    add("k_proj", "attention", 0, a.k);
    add("v_proj", "attention", 0, a.v);
    add("o_proj", "attention", 1, a.o);
    if (const auto* layer = dynamic_cast<const VisionLayer*>(blocks[i].ffn.get())) {
      add("up_proj", "ffn", 2, layer->up);
      add("down_proj", "ffn", 3, layer->down);
    }
    const std::string name = fmt::format("blocks.{}.", i);
    attach_parts(w, {name, name, static_cast<int64_t>(i)}, parts, matrices);
  }
  check_placed(parts);
}

ModelParts parts_beside(const nlohmann::json& list, int64_t blocks) {
  ModelParts parts{parse_parts({{"moiety", {{"parts", list}}}}, blocks), blocks, {}, {}};
  for (const PartEntry& entry : parts.entries)
    check(entry.site == "linear",
          "part {}: parts of a vision model stand beside matrices (site linear), not at the site {}; its mixture is "
          "`moe` of the model's config",
          entry.slug, entry.site);
  check(!biases_learn(list), "a LoRA beside a vision model has `bias: none` or `lora_only`; all is for decoders");
  return parts;
}

// Says in words what would else come out as a list of tensors.
void check_sharing(const Checkpoint& checkpoint, const VisionConfig& c) {
  std::set<int64_t> norms;
  bool own_attention = false, own_experts = false;
  for (const auto& t : checkpoint.tensors()) {
    if (t.name.rfind("blocks.", 0) != 0) continue;
    const size_t dot = t.name.find('.', 7);
    if (dot == std::string::npos) continue;
    const std::string rest = t.name.substr(dot + 1), number = t.name.substr(7, dot - 7);
    const bool digits =
        !number.empty() && number.size() < 6 && number.find_first_not_of("0123456789") == std::string::npos;
    if (digits && rest == "ln1.weight") norms.insert(std::stoll(number));
    own_attention |= rest.rfind("attention.", 0) == 0;
    own_experts |= rest.rfind("ffn.experts.", 0) == 0;
  }
  const std::string where = checkpoint.path().string();
  check(!(own_attention && c.share_attention),
        "{} has an attention for every block, and its config shares one: set `share_attention: false` to give each "
        "block its own",
        where);
  check(!(own_experts && c.share_ffn),
        "{} has a feed-forward layer for every block, and its config shares one: set `share_ffn: false` to give each "
        "block its own",
        where);
  check(c.share_norms || norms.empty() || static_cast<int64_t>(norms.size()) == c.blocks,
        "{} has norms for {} blocks, and its config has {} blocks", where, norms.size(), c.blocks);
}

std::unique_ptr<WeightsSource> trainable() {
  LoadOptions o;
  o.trainable = true;
  return std::make_unique<WeightsSource>(0.02, o);
}

}  // namespace

VisionModel::VisionModel(VisionConfig c) : VisionModel(std::move(c), *trainable()) {}

VisionModel::VisionModel(VisionConfig c, WeightsSource& w, nlohmann::json list)
    : config_(std::move(c)), parts_(std::move(list)), dtype_(w.dtype()) {
  const std::string problem = config_.problem();
  check(problem.empty(), "{}", problem);
  w.inner.clear();
  const int64_t p = config_.patch, d = config_.hidden, side = config_.image / p;
  Pieces pieces(w, config_);
  patches_ = pieces.tensor("patches.weight", {d, config_.channels, p, p}, glorot(config_.channels * p * p, d * p * p));
  patches_bias_ = pieces.tensor("patches.bias", {d}, constant_init(0.0));
  positions_ = pieces.tensor("positions", {side * side + 1, d}, normal_init(0.02));
  register_parameter("patches", patches_, patches_.requires_grad());
  register_parameter("patches_bias", patches_bias_, patches_bias_.requires_grad());
  register_parameter("positions_embedding", positions_, positions_.requires_grad());
  const auto blocks = blocks_of(config_, pieces);
  body_ = register_module("body", std::make_shared<WideNet>(blocks, config_.dropout));
  norm_ = register_module("norm", pieces.norm("ln_f"));
  representation_ = register_module("representation", pieces.dense("representation", d, d));
  head_ = register_module("head", pieces.dense("head", d, config_.classes));
  // New parameters of parts are drawn behind the model's own.
  ModelParts parts = parts_beside(parts_, config_.blocks);
  attach_to_blocks(w, blocks, parts);
  stored_ = w.stored();
}

Tensor VisionModel::forward(const Tensor& images, Pass& pass) {
  return read_out(body_->forward(embed(images), pass));
}

Tensor VisionModel::embed(const Tensor& images) {
  check(images.dim() == 4 && images.size(1) == config_.channels && images.size(2) == config_.image &&
            images.size(3) == config_.image,
        "the model takes images of {} channel(s) and {} x {} pixels", config_.channels, config_.image, config_.image);
  auto x = torch::conv2d(images.to(dtype_), patches_.to(dtype_), patches_bias_.to(dtype_), config_.patch)
               .flatten(2)
               .transpose(1, 2);
  x = torch::constant_pad_nd(x, {0, 0, 1, 0}) + positions_.to(dtype_);
  return config_.dropout > 0.0 ? torch::dropout(x, config_.dropout, is_training()) : x;
}

Tensor VisionModel::read_out(const Tensor& positions) {
  const auto x = norm_->forward(positions).mean(1);
  return head_(torch::tanh(representation_(x))).to(torch::kFloat32);
}

Tensor VisionModel::pooled(const Tensor& positions) {
  return norm_->forward(positions).mean(1).to(torch::kFloat32);
}

nlohmann::json VisionModel::json() const {
  nlohmann::json out = dump(config_);
  out["model_type"] = kModelType;
  if (!parts_.is_null()) out["moiety"]["parts"] = parts_;
  if (std::isinf(config_.moe.capacity_factor)) {  // JSON has no infinity
    out["moe"]["unlimited"] = true;
    out["moe"]["capacity_factor"] = WideNetConfig().capacity_factor;
  }
  return out;
}

bool is_vision(const nlohmann::json& config) {
  return config.is_object() && config.value("model_type", nlohmann::json()) == kModelType;
}

VisionConfig parse_vision_config(const nlohmann::json& config, const std::string& where) {
  check(config.is_object(), "{}: a vision model's settings are a section", where);
  check(!config.contains("model_type") || is_vision(config), "{}: the model_type of a vision model is {}, not {}",
        where, kModelType, config.value("model_type", nlohmann::json()).dump());
  nlohmann::json own = config;
  for (const char* key : {"model_type", "dtype", "class_names", "moiety"}) own.erase(key);
  return parse<VisionConfig>(own, where);
}

std::shared_ptr<VisionModel> load_vision(const Checkpoint& checkpoint, const LoadOptions& options) {
  return load_vision(checkpoint, parts_of(checkpoint.config()), options);
}

std::shared_ptr<VisionModel> load_vision(const Checkpoint& checkpoint, const nlohmann::json& parts,
                                         const LoadOptions& options) {
  const VisionConfig config = parse_vision_config(checkpoint.config(), checkpoint.path().string());
  check_sharing(checkpoint, config);
  WeightsSource weights(checkpoint, options, "");
  weights.may_create = parts != parts_of(checkpoint.config());
  auto model = std::make_shared<VisionModel>(config, weights, parts);
  weights.check_all_used([](const std::string&) { return false; });
  return model;
}

std::shared_ptr<VisionModel> make_vision(VisionConfig config, const LoadOptions& options, const nlohmann::json& parts) {
  WeightsSource weights(0.02, options);
  return std::make_shared<VisionModel>(std::move(config), weights, parts);
}

}  // namespace moiety
