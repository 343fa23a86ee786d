#include "moiety/convert/upcycle.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/io/hf_defaults.h"
#include "moiety/io/overlay.h"
#include "moiety/models/decoder_config.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

Tensor normal(std::vector<int64_t> shape, double std, uint64_t seed, const std::string& name) {
  RandomStream draw(seed, "upcycle." + name);
  auto t = torch::empty(shape, torch::kFloat32);
  float* v = t.data_ptr<float>();
  for (int64_t i = 0; i < t.numel(); ++i) v[i] = static_cast<float>(std * draw.normal());
  return t;
}

json mixture_config(const json& dense, const DecoderConfig& parsed, const UpcycleOptions& o, int64_t width) {
  // What the config leaves out means another thing in the other family.
  json c = with_defaults(dense);
  c.update({{"rms_norm_eps", parsed.norm_eps},
            {"head_dim", parsed.head_dim},
            {"num_key_value_heads", parsed.kv_heads},
            {"max_position_embeddings", parsed.context}});
  if (!c.contains("rope_parameters")) c["rope_theta"] = parsed.ropes.at(0).theta;
  const int64_t experts = o.experts * o.granularity;
  if (dense.at("model_type") == "qwen3") {
    c["model_type"] = "qwen3_moe";
    c["architectures"] = {"Qwen3MoeForCausalLM"};
    c.update({{"num_experts", experts},
              {"moe_intermediate_size", width},
              {"norm_topk_prob", true},
              {"decoder_sparse_step", 1},
              {"mlp_only_layers", json::array()}});
  } else {
    c["model_type"] = "mixtral";
    c["architectures"] = {"MixtralForCausalLM"};
    c.update({{"num_local_experts", experts}, {"intermediate_size", width}});
    if (!c.contains("sliding_window")) c["sliding_window"] = nullptr;
    for (const char* key : {"mlp_bias", "attention_bias", "pretraining_tp"}) c.erase(key);
  }
  c.update({{"num_experts_per_tok", o.top_k * o.granularity},
            {"router_aux_loss_coef", 0.001},
            {"output_router_logits", false}});
  return c;
}

void check_options(const Checkpoint& dense, const DecoderConfig& c, const UpcycleOptions& o) {
  const std::string where = dense.path().string();
  check(dense.gguf() == nullptr,
        "{} is a GGUF file, whose rows have another order: make a directory of it first (moiety convert {} -o FOLDER)",
        where, where);
  check(c.family == "llama" || c.family == "mistral" || c.family == "qwen3",
        "{} is a {} model; Llama and Mistral can become Mixtral, and Qwen3 Qwen3-MoE", where, c.family);
  const auto own = dense.config().find("moiety");
  check(own == dense.config().end() || !own->contains("parts") || (*own)["parts"].empty(),
        "{} has parts: merge or leave them out first", where);
  check(!c.qkv_bias && !c.o_bias && !c.mlp_bias, "{} has biases, which the family of the mixture has no place for",
        where);
  check(o.experts >= 1 && o.experts <= 65536, "{} experts are impossible", o.experts);
  check(o.top_k >= 1 && o.top_k <= o.experts, "{} of {} experts a token is impossible", o.top_k, o.experts);
  check(o.granularity >= 1 && c.intermediate % o.granularity == 0,
        "feed-forward layers of {} hidden units cannot be cut into {} equal parts", c.intermediate, o.granularity);
  check(o.noise >= 0.0 && std::isfinite(o.noise), "noise of {} deviations is impossible", o.noise);
  check(o.router_std >= 0.0 && std::isfinite(o.router_std), "a deviation of {} is impossible", o.router_std);
}

// Matrices of the dense model, decoded once for all experts that come of them. Whoever writes the mixture asks for its
// tensors expert by expert, so that those of one layer are wanted in turn.
class Parents {
 public:
  Parents(std::shared_ptr<const Checkpoint> dense, double noise) : dense_(std::move(dense)), noise_(noise) {
    for (const TensorInfo& t : dense_->tensors()) infos_[t.name] = t;
  }
  const TensorInfo& info(const std::string& name) const {
    const auto it = infos_.find(name);
    check(it != infos_.end(), "{}: there is no tensor '{}'", dense_->path().string(), name);
    return it->second;
  }
  TensorView view(const std::string& name) const { return dense_->get(name); }
  struct Decoded {
    std::string name;
    Tensor values;  // f32
    double spread;  // of the noise on it
  };
  Decoded decoded(const std::string& name) {
    const std::lock_guard lock(mutex_);
    const auto it = std::find_if(last_.begin(), last_.end(), [&](const Decoded& d) { return d.name == name; });
    if (it != last_.end()) return *it;
    const auto values = dequantize(dense_->get(name));
    if (last_.size() == kKept) last_.erase(last_.begin());
    last_.push_back({name, values, noise_ > 0.0 ? noise_ * values.std().item<double>() : 0.0});
    return last_.back();
  }

 private:
  static constexpr size_t kKept = 3;  // gate, up and down of one layer
  std::shared_ptr<const Checkpoint> dense_;
  double noise_;
  std::map<std::string, TensorInfo> infos_;
  std::mutex mutex_;
  std::vector<Decoded> last_;
};

// One matrix of expert `e`.
OverlayTensor expert_matrix(const std::shared_ptr<Parents>& parents, const std::string& old, std::string name,
                            int64_t e, bool down, int64_t width, const UpcycleOptions& o) {
  const Format was = parents->info(old).format;
  OverlayTensor t{parents->info(old), {}};
  t.info.name = std::move(name);
  if (is_block(was)) t.info.format = Format::BF16;
  t.info.shape.at(down ? 1 : 0) = width;
  t.get = [parents, old, was, down, e, width, o, name = t.info.name, format = t.info.format] {
    const torch::NoGradGuard frozen;
    const int64_t g = o.granularity;
    if (g == 1 && o.noise == 0.0 && was == format) return parents->view(old);
    const auto whole = parents->decoded(old);
    auto w = whole.values.narrow(down ? 1 : 0, e % g * width, width).clone();
    if (whole.spread > 0.0) w.add_(normal(w.sizes().vec(), whole.spread, o.seed, name));
    if (down && g > 1) w.mul_(static_cast<double>(g));
    return view_of(w.contiguous(), format);
  };
  return t;
}

}  // namespace

std::shared_ptr<const Checkpoint> upcycled(std::shared_ptr<const Checkpoint> dense, const UpcycleOptions& o) {
  const DecoderConfig c = parse_decoder_config(dense->config());
  check_options(*dense, c, o);
  const int64_t g = o.granularity, width = c.intermediate / g;
  const bool qwen = c.family == "qwen3";
  const std::string half = qwen ? "mlp." : "block_sparse_moe.";
  const auto parents = std::make_shared<Parents>(dense, o.noise);
  std::vector<OverlayTensor> tensors;
  std::set<std::string> removed;
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    for (const auto& [from, to] :
         {std::pair{"gate_proj", "w1"}, std::pair{"up_proj", "w3"}, std::pair{"down_proj", "w2"}}) {
      const std::string old = fmt::format("{}mlp.{}.weight", layer, from);
      removed.insert(old);
      for (int64_t e = 0; e < o.experts * g; ++e)
        tensors.push_back(expert_matrix(parents, old,
                                        fmt::format("{}{}experts.{}.{}.weight", layer, half, e, qwen ? from : to), e,
                                        std::string_view(from) == "down_proj", width, o));
    }
    // Parts of one copy share a row, and ties of equal logits go to the lower index: they are chosen together.
    const std::string name = layer + half + "gate.weight";
    const auto rows = normal({o.experts, c.hidden}, o.router_std, o.seed, name).repeat_interleave(g, 0).contiguous();
    tensors.push_back(overlay_of(name, rows.sizes().vec(),
                                 std::vector<float>(rows.data_ptr<float>(), rows.data_ptr<float>() + rows.numel())));
  }
  return overlay(dense, mixture_config(dense->config(), c, o, width), std::move(tensors), removed);
}

}  // namespace moiety
