// One bidirectional encoder for BERT (MiniLM), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, MPNet, Nomic BERT
// and ModernBERT. Families differ in tensor names and in a handful of switches; parameters keep the checkpoint's own
// names.
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "moiety/base/error.h"
#include "moiety/models/encoder_config.h"
#include "moiety/models/model.h"
#include "moiety/models/sentence.h"
#include "moiety/models/staged_encoder.h"
#include "moiety/models/weights_source.h"
#include "moiety/nn/activation.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/norm.h"
#include "moiety/nn/rope.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

/// What stands before the encoder's own names: "", "bert.", "roberta.", "model.", ... The shortest wins, for a
/// checkpoint may hold several encoders.
std::string prefix_of(const Checkpoint& checkpoint, const std::string& word) {
  const std::string tail = word + ".weight";
  std::optional<std::string> found;
  for (const auto& t : checkpoint.tensors()) {
    if (!t.name.ends_with(tail)) continue;
    std::string prefix = t.name.substr(0, t.name.size() - tail.size());
    if (!prefix.empty() && !prefix.ends_with('.')) continue;
    if (!found || prefix.size() < found->size()) found = std::move(prefix);
  }
  check(found.has_value(), "{}: no tensor '{}' under any prefix; is this the encoder that config.json describes?",
        checkpoint.path().string(), tail);
  return *found;
}

/// Registers modules under the names that their tensors have in the checkpoint.
class Parts {
 public:
  Parts(WeightsSource& source, torch::nn::Module& root) : source_(source), root_(root) {}

  bool has(const std::string& name) const { return source_.has(name, false); }

  Linear linear(const std::string& name, int64_t out, int64_t in) {
    Linear module = source_.linear(name, in, out, false);
    adopt(name, module.ptr());
    return module;
  }

  /// Checkpoints of 2018 say gamma and beta.
  std::shared_ptr<LayerNorm> norm(const std::string& name, int64_t size, double eps) {
    const bool old = !has(name + ".weight") && has(name + ".gamma");
    const std::string bias = name + (old ? ".beta" : ".bias");
    auto module = std::make_shared<LayerNorm>(source_.tensor(name + (old ? ".gamma" : ".weight"), {size}, 1.0),
                                              has(bias) ? source_.tensor(bias, {size}, 0.0) : Tensor(), eps);
    adopt(name, module);
    return module;
  }

 private:
  /// Registers `child` under a dotted name, making the modules between.
  void adopt(const std::string& dotted, std::shared_ptr<torch::nn::Module> child) {
    torch::nn::Module* at = &root_;
    size_t begin = 0;
    for (size_t dot; (dot = dotted.find('.', begin)) != std::string::npos; begin = dot + 1) {
      const std::string part = dotted.substr(begin, dot - begin);
      const auto children = at->named_children();
      const auto* next = children.find(part);
      at = next ? next->get() : at->register_module(part, std::make_shared<torch::nn::Module>()).get();
    }
    at->register_module(dotted.substr(begin), std::move(child));
  }

  WeightsSource& source_;
  torch::nn::Module& root_;
};

struct Block {
  Linear q{nullptr}, k{nullptr}, v{nullptr}, qkv{nullptr}, out{nullptr};
  Linear up{nullptr}, gate{nullptr}, gate_up{nullptr}, down{nullptr};
  std::shared_ptr<LayerNorm> attention_norm, ffn_norm;  // attention_norm is null in ModernBERT's first block
  bool local = false;
};

/// What one pass shares between its blocks.
struct Shared {
  std::optional<Tensor> bias, local_bias;  // added to the attention scores; broadcast to [B, H, T, T]
  std::pair<Tensor, Tensor> angles, local_angles;
};

class Encoder : public StagedEncoder {
 public:
  Encoder(const Checkpoint& checkpoint, const LoadOptions& options)
      : config_(checkpoint.config()), spec_(parse_encoder_config(config_)), activation_(activation(spec_.activation)) {
    const EncoderNames n = names(checkpoint);
    prefix_ = prefix_of(checkpoint, n.word);
    WeightsSource weights(checkpoint, options, prefix_);
    dtype_ = weights.dtype();
    Parts parts(weights, *this);
    word_ = parts.linear(n.word, spec_.vocabulary, spec_.embedding);
    if (!n.position.empty()) position_ = parts.linear(n.position, spec_.positions, spec_.embedding);
    if (!n.type.empty() && spec_.types > 0) type_ = parts.linear(n.type, spec_.types, spec_.embedding);
    embedding_norm_ = parts.norm(n.embedding_norm, spec_.embedding, spec_.eps);
    if (!n.projection.empty() && spec_.embedding != spec_.hidden)
      projection_ = parts.linear(n.projection, spec_.hidden, spec_.embedding);
    if (!n.relative.empty()) {
      check(spec_.buckets >= kBuckets,
            "config.json: relative_attention_num_buckets is {}, fewer than the {} that the model uses", spec_.buckets,
            kBuckets);
      relative_ = parts.linear(n.relative, spec_.buckets, spec_.heads);
    }
    const int64_t inner = spec_.heads * spec_.head_dim;
    for (int64_t i = 0; i < spec_.layers; ++i) {
      const std::string at = n.layer + std::to_string(i) + ".";
      Block b;
      if (!n.qkv.empty()) {
        b.qkv = parts.linear(at + n.qkv, 3 * inner, spec_.hidden);
      } else {
        b.q = parts.linear(at + n.q, inner, spec_.hidden);
        b.k = parts.linear(at + n.k, inner, spec_.hidden);
        b.v = parts.linear(at + n.v, inner, spec_.hidden);
      }
      b.out = parts.linear(at + n.out, spec_.hidden, inner);
      if (!(spec_.pre_norm && i == 0)) b.attention_norm = parts.norm(at + n.attention_norm, spec_.hidden, spec_.eps);
      if (!n.gate_up.empty()) {
        b.gate_up = parts.linear(at + n.gate_up, 2 * spec_.intermediate, spec_.hidden);
      } else {
        b.up = parts.linear(at + n.up, spec_.intermediate, spec_.hidden);
        if (!n.gate.empty()) b.gate = parts.linear(at + n.gate, spec_.intermediate, spec_.hidden);
      }
      b.down = parts.linear(at + n.down, spec_.hidden, spec_.intermediate);
      b.ffn_norm = parts.norm(at + n.ffn_norm, spec_.hidden, spec_.eps);
      b.local = spec_.window > 0 && spec_.local[i];
      blocks_.push_back(std::move(b));
    }
    if (!n.final_norm.empty()) final_norm_ = parts.norm(n.final_norm, spec_.hidden, spec_.eps);
    if (!n.pooler.empty() && parts.has(n.pooler + ".weight"))
      pooler_ = parts.linear(n.pooler, spec_.hidden, spec_.hidden);
    if (spec_.rotary) rope_ = std::make_shared<const Rope>(spec_.rope);
    if (spec_.window > 0) local_rope_ = std::make_shared<const Rope>(spec_.local_rope);
    head_ = register_module("sentence", std::make_shared<SentenceHead>(checkpoint, options));
    eval();
  }

  Tensor forward(const Tensor& ids, const Tensor& mask, const Tensor& types) override {
    check(ids.defined() && ids.dim() == 2, "encoder input must be ids [batch, tokens]");
    const int64_t batch = ids.size(0), tokens = ids.size(1);
    check(tokens <= max_length(), "a sequence of {} tokens is longer than the {} positions of this encoder", tokens,
          max_length());
    if (batch == 0 || tokens == 0)
      return torch::zeros({batch, tokens, spec_.hidden}, ids.options().dtype(torch::kFloat32));
    in_range(ids, spec_.vocabulary, "token id");
    Tensor keep;
    if (mask.defined()) {
      check(mask.sizes() == ids.sizes(), "the mask must be [{}, {}] like the ids", batch, tokens);
      keep = mask.to(torch::kBool);
      if (keep.all().item<bool>()) keep = Tensor();
    }
    Tensor x = embedding(ids, keep, types);
    const Shared shared = share(batch, tokens, keep, x.device());
    for (auto& b : blocks_) x = run(b, x, shared);
    return finished(x);
  }

  int64_t blocks() const override { return static_cast<int64_t>(blocks_.size()); }
  int64_t vocabulary() const override { return spec_.vocabulary; }
  Tensor embedded(const Tensor& ids) override { return embedding(ids, {}, {}); }
  Tensor run_block(int64_t block, const Tensor& x) override {
    return run(blocks_.at(static_cast<size_t>(block)), x, share(x.size(0), x.size(1), {}, x.device()));
  }
  Tensor sentence(const Tensor& x) override { return head_->forward(finished(x), {}); }
  std::vector<Linear> matrices(int64_t block) const override {
    const Block& b = blocks_.at(static_cast<size_t>(block));
    std::vector<Linear> out{b.q, b.k, b.v, b.qkv, b.out, b.up, b.gate, b.gate_up, b.down};
    std::erase_if(out, [](const Linear& m) { return m.is_empty(); });
    return out;
  }
  std::vector<StoredTensor> stored() const override {
    std::vector<StoredTensor> out;
    // What follows the pooling has files of its own.
    for (const auto& p : named_parameters())
      if (!p.key().starts_with("sentence.")) out.push_back({prefix_ + p.key(), [value = p.value()] { return value; }});
    return out;
  }

  Tensor embed(const Tensor& ids, const Tensor& mask) override { return head_->forward(forward(ids, mask, {}), mask); }

  Tensor pooled(const Tensor& hidden) override {
    check(!pooler_.is_empty(), "this {} checkpoint has no pooler ('pooler.dense')", spec_.family);
    return torch::tanh(pooler_(hidden.select(1, 0).to(dtype_))).to(torch::kFloat32);
  }

  int64_t max_length() const override { return std::max<int64_t>(0, spec_.positions - (spec_.padding + 1)); }
  const json& config() const override { return config_; }

 private:
  EncoderNames names(const Checkpoint& checkpoint) const {
    const auto& tensors = checkpoint.tensors();
    return encoder_names(spec_.family, std::any_of(tensors.begin(), tensors.end(), [](const TensorInfo& t) {
                           return t.name.ends_with("self_attn.q_proj.weight");
                         }));
  }

  Tensor embedding(const Tensor& ids, const Tensor& keep, const Tensor& types) {
    Tensor x = word_->rows(ids, dtype_);
    if (!type_.is_empty()) {
      if (types.defined()) {
        check(types.sizes() == ids.sizes(), "the token types must be [{}, {}] like the ids", ids.size(0), ids.size(1));
        in_range(types, spec_.types, "token type");
      }
      x = x + type_->rows(types.defined() ? types : torch::zeros_like(ids), dtype_);
    } else {
      check(!types.defined() || !types.any().item<bool>(), "{} has no token types, all must be 0", spec_.family);
    }
    if (!position_.is_empty()) x = x + position_->rows(positions(ids, keep), dtype_);
    x = embedding_norm_->forward(x);
    if (!projection_.is_empty()) x = projection_(x);
    return x;
  }

  Tensor finished(const Tensor& x) { return (final_norm_ ? final_norm_->forward(x) : x).to(torch::kFloat32); }

  static void in_range(const Tensor& values, int64_t end, const char* what) {
    check(values.scalar_type() == torch::kInt64, "{}s must be int64", what);
    const auto low = values.min().item<int64_t>(), high = values.max().item<int64_t>();
    check(low >= 0 && high < end, "{} {} is outside 0 .. {}", what, low < 0 ? low : high, end - 1);
  }

  /// [B, T]. RoBERTa counts from padding + 1 and leaves padding out; the others count from the first real token of the
  /// row, so that padding on the left changes nothing.
  Tensor positions(const Tensor& ids, const Tensor& keep) const {
    if (spec_.padding >= 0) {
      Tensor counts = ids.ne(spec_.padding);
      if (keep.defined()) counts = counts & keep;
      return counts.cumsum(1) * counts + spec_.padding;
    }
    const Tensor count = torch::arange(ids.size(1), ids.options());
    if (!keep.defined()) return count.expand_as(ids);
    return (count - keep.to(torch::kInt64).argmax(1, true)).clamp_min(0);
  }

  Shared share(int64_t batch, int64_t tokens, const Tensor& keep, torch::Device device) {
    Shared s;
    // A finite number: a row of padding alone then attends evenly instead of becoming NaN.
    constexpr double kNever = -1e30;
    const auto options = torch::TensorOptions().dtype(dtype_).device(device);
    if (keep.defined())
      s.bias = torch::zeros({batch, 1, 1, tokens}, options).masked_fill(~keep.view({batch, 1, 1, tokens}), kNever);
    const Tensor at = torch::arange(tokens, torch::TensorOptions().dtype(torch::kInt64).device(device));
    if (!relative_.is_empty()) {
      const Tensor bias =
          relative_->rows(buckets(at.unsqueeze(0) - at.unsqueeze(1)), dtype_).permute({2, 0, 1}).unsqueeze(0);
      s.bias = s.bias ? *s.bias + bias : bias;
    }
    if (local_rope_) {
      const Tensor far = (at.unsqueeze(0) - at.unsqueeze(1)).abs() > spec_.window;
      const Tensor bias = torch::zeros({1, 1, tokens, tokens}, options).masked_fill(far, kNever);
      s.local_bias = s.bias ? torch::minimum(*s.bias, bias) : bias;
      s.local_angles = local_rope_->angles(at.unsqueeze(0));
    }
    if (rope_) s.angles = rope_->angles(at.unsqueeze(0));
    return s;
  }

  /// MPNet's buckets of key position minus query position: half for each direction, exact when near, logarithmic up to
  /// 128.
  static Tensor buckets(const Tensor& distance) {
    constexpr int64_t half = kBuckets / 2, exact = half / 2;
    const Tensor n = distance.abs();
    const Tensor far = (torch::log(n.to(torch::kFloat32) / static_cast<double>(exact)) /
                        std::log(128.0 / static_cast<double>(exact)) * static_cast<double>(half - exact))
                           .clamp_min(0.0)
                           .to(torch::kInt64) +
                       exact;
    return distance.gt(0).to(torch::kInt64) * half + torch::where(n < exact, n, far.clamp_max(half - 1));
  }

  Tensor attention(Block& b, const Tensor& x, const Shared& s) {
    const int64_t batch = x.size(0), tokens = x.size(1);
    const auto split = [&](const Tensor& t) {
      return t.view({batch, tokens, spec_.heads, spec_.head_dim}).transpose(1, 2);
    };
    Tensor q, k, v;
    if (!b.qkv.is_empty()) {
      const auto parts = b.qkv(x).chunk(3, -1);
      q = split(parts[0].contiguous());
      k = split(parts[1].contiguous());
      v = split(parts[2].contiguous());
    } else {
      q = split(b.q(x));
      k = split(b.k(x));
      v = split(b.v(x));
    }
    if (rope_) {
      const auto& rope = b.local ? local_rope_ : rope_;
      const auto& angles = b.local ? s.local_angles : s.angles;
      q = rope->rotate(q, angles);
      k = rope->rotate(k, angles);
    }
    const Tensor y = at::scaled_dot_product_attention(q, k, v, b.local ? s.local_bias : s.bias, 0.0, false,
                                                      1.0 / std::sqrt(static_cast<double>(spec_.head_dim)));
    return b.out(y.transpose(1, 2).reshape({batch, tokens, -1}));
  }

  Tensor feed_forward(Block& b, const Tensor& x) {
    if (!b.gate_up.is_empty()) {
      const auto parts = b.gate_up(x).chunk(2, -1);
      return b.down(activation_(parts[0]) * parts[1]);
    }
    if (!b.gate.is_empty()) return b.down(activation_(b.gate(x)) * b.up(x));
    return b.down(activation_(b.up(x)));
  }

  Tensor run(Block& b, const Tensor& x, const Shared& s) {
    if (spec_.pre_norm) {
      const Tensor y = x + attention(b, b.attention_norm ? b.attention_norm->forward(x) : x, s);
      return y + feed_forward(b, b.ffn_norm->forward(y));
    }
    const Tensor y = b.attention_norm->forward(attention(b, x, s) + x);
    return b.ffn_norm->forward(feed_forward(b, y) + y);
  }

  static constexpr int64_t kBuckets = 32;  // of MPNet, fixed in its code

  json config_;
  std::string prefix_;
  EncoderSpec spec_;
  Activation activation_;
  torch::Dtype dtype_ = torch::kFloat32;
  Linear word_{nullptr}, position_{nullptr}, type_{nullptr}, projection_{nullptr}, relative_{nullptr}, pooler_{nullptr};
  std::shared_ptr<LayerNorm> embedding_norm_, final_norm_;
  std::vector<Block> blocks_;
  std::shared_ptr<const Rope> rope_, local_rope_;
  std::shared_ptr<SentenceHead> head_;
};

}  // namespace

bool is_encoder(const json& config) {
  const auto known = encoder_families();
  const auto it = config.find("model_type");
  return it != config.end() && it->is_string() &&
         std::find(known.begin(), known.end(), it->get_ref<const std::string&>()) != known.end();
}

std::shared_ptr<EncoderModel> load_encoder(const Checkpoint& checkpoint, const LoadOptions& options) {
  return std::make_shared<Encoder>(checkpoint, options);
}

}  // namespace moiety
