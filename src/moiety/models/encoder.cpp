// One bidirectional encoder for BERT (MiniLM), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, MPNet, Nomic BERT
// and ModernBERT. Families differ in tensor names and in a handful of switches; parameters keep the checkpoint's own
// names.
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/models/model.h"
#include "moiety/models/sentence.h"
#include "moiety/models/weights_source.h"
#include "moiety/nn/activation.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/norm.h"
#include "moiety/nn/rope.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

/// Tensor names of a family, without the prefix that models with a head put before them. "" means the family has no
/// such part.
struct Names {
  std::string word, position, type, embedding_norm, projection, relative, final_norm, pooler;
  std::string layer;  ///< before the layer's number
  std::string q, k, v, qkv, out, attention_norm, up, gate, gate_up, down, ffn_norm;
};

Names bert_names() {
  Names n;
  n.word = "embeddings.word_embeddings";
  n.position = "embeddings.position_embeddings";
  n.type = "embeddings.token_type_embeddings";
  n.embedding_norm = "embeddings.LayerNorm";
  n.pooler = "pooler.dense";
  n.layer = "encoder.layer.";
  n.q = "attention.self.query";
  n.k = "attention.self.key";
  n.v = "attention.self.value";
  n.out = "attention.output.dense";
  n.attention_norm = "attention.output.LayerNorm";
  n.up = "intermediate.dense";
  n.down = "output.dense";
  n.ffn_norm = "output.LayerNorm";
  return n;
}

Names electra_names() {
  Names n = bert_names();
  n.projection = "embeddings_project";
  n.pooler = "";
  return n;
}

Names mpnet_names() {
  Names n = bert_names();
  n.type = "";
  n.q = "attention.attn.q";
  n.k = "attention.attn.k";
  n.v = "attention.attn.v";
  n.out = "attention.attn.o";
  n.attention_norm = "attention.LayerNorm";
  n.relative = "encoder.relative_attention_bias";
  return n;
}

Names distilbert_names() {
  Names n = bert_names();
  n.type = n.pooler = "";
  n.layer = "transformer.layer.";
  n.q = "attention.q_lin";
  n.k = "attention.k_lin";
  n.v = "attention.v_lin";
  n.out = "attention.out_lin";
  n.attention_norm = "sa_layer_norm";
  n.up = "ffn.lin1";
  n.down = "ffn.lin2";
  n.ffn_norm = "output_layer_norm";
  return n;
}

/// As the model's authors publish it: q, k and v in one matrix.
Names nomic_names() {
  Names n;
  n.word = "embeddings.word_embeddings";
  n.type = "embeddings.token_type_embeddings";
  n.embedding_norm = "emb_ln";
  n.layer = "encoder.layers.";
  n.qkv = "attn.Wqkv";
  n.out = "attn.out_proj";
  n.attention_norm = "norm1";
  n.up = "mlp.fc11";
  n.gate = "mlp.fc12";
  n.down = "mlp.fc2";
  n.ffn_norm = "norm2";
  return n;
}

/// As transformers names the modules.
Names nomic_transformers_names() {
  Names n = nomic_names();
  n.embedding_norm = "embeddings.LayerNorm";
  n.layer = "layers.";
  n.qkv = "";
  n.q = "self_attn.q_proj";
  n.k = "self_attn.k_proj";
  n.v = "self_attn.v_proj";
  n.out = "self_attn.o_proj";
  n.attention_norm = "post_attention_layernorm";
  n.up = "mlp.up_proj";
  n.gate = "mlp.gate_proj";
  n.down = "mlp.down_proj";
  n.ffn_norm = "post_mlp_layernorm";
  return n;
}

Names modernbert_names() {
  Names n;
  n.word = "embeddings.tok_embeddings";
  n.embedding_norm = "embeddings.norm";
  n.final_norm = "final_norm";
  n.layer = "layers.";
  n.qkv = "attn.Wqkv";
  n.out = "attn.Wo";
  n.attention_norm = "attn_norm";
  n.gate_up = "mlp.Wi";
  n.down = "mlp.Wo";
  n.ffn_norm = "mlp_norm";
  return n;
}

/// What config.json says, in one vocabulary.
struct Spec {
  std::string family;
  int64_t vocabulary = 0, hidden = 0, embedding = 0, heads = 0, head_dim = 0, layers = 0, intermediate = 0,
          positions = 0, types = 0;
  double eps = 1e-12;
  std::string activation = "gelu";
  int64_t padding =
      -1;  ///< RoBERTa and MPNet: positions start behind this id and padding stays on it; -1: they start at 0
  bool pre_norm = false;
  bool rotary = false;
  int64_t window = 0;       ///< ModernBERT: distance that its local layers see
  std::vector<bool> local;  ///< per layer
  json rope, local_rope;    ///< rope parameters
};

const std::vector<std::string>& families() {
  static const std::vector<std::string> names = {"bert",    "roberta", "xlm-roberta", "camembert", "distilbert",
                                                 "electra", "mpnet",   "nomic_bert",  "modernbert"};
  return names;
}

std::string family_of(const json& config) {
  const auto it = config.find("model_type");
  return it != config.end() && it->is_string() ? it->get<std::string>() : "";
}

int64_t integer(const json& config, std::initializer_list<const char*> keys,
                std::optional<int64_t> fallback = std::nullopt) {
  for (const char* key : keys) {
    const auto it = config.find(key);
    if (it == config.end() || it->is_null()) continue;
    check(it->is_number_integer(), "config.json: {} must be a whole number, not {}", key, it->dump());
    const auto value = it->get<int64_t>();
    check(value >= 0 && value <= std::numeric_limits<int32_t>::max(), "config.json: {} is {}, outside 0 .. 2147483647",
          key, value);
    return value;
  }
  check(fallback.has_value(), "config.json has no {}", *keys.begin());
  return *fallback;
}

double real(const json& config, const char* key, double fallback) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return fallback;
  check(it->is_number(), "config.json: {} must be a number, not {}", key, it->dump());
  return it->get<double>();
}

std::string text(const json& config, const char* key, const std::string& fallback) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return fallback;
  check(it->is_string(), "config.json: {} must be a string, not {}", key, it->dump());
  return it->get<std::string>();
}

json object(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return json::object();
  check(it->is_object(), "config.json: {} must be an object, not {}", key, it->dump());
  return *it;
}

Spec read_spec(const json& config) {
  Spec s;
  s.family = family_of(config);
  check(std::find(families().begin(), families().end(), s.family) != families().end(),
        "config.json: model_type `{}` is not an encoder that moiety knows{}; known are {}", shown(s.family),
        did_you_mean(s.family, families()), list_of(families(), "and"));
  const bool distil = s.family == "distilbert", nomic = s.family == "nomic_bert", modern = s.family == "modernbert";
  s.vocabulary = integer(config, {"vocab_size"});
  s.hidden = integer(config, {"hidden_size", "dim", "n_embd"});
  s.heads = integer(config, {"num_attention_heads", "n_heads", "n_head"});
  s.layers = integer(config, {"num_hidden_layers", "n_layers", "n_layer"});
  s.intermediate = integer(config, {distil ? "hidden_dim" : "intermediate_size", "n_inner"});
  s.positions = integer(config, {"max_position_embeddings", "n_positions"});
  s.types = integer(config, {"type_vocab_size"}, 0);
  s.embedding = s.family == "electra" ? integer(config, {"embedding_size"}, s.hidden) : s.hidden;
  check(s.hidden > 0 && s.heads > 0 && s.hidden % s.heads == 0,
        "config.json: hidden_size {} must be a positive multiple of num_attention_heads {}", s.hidden, s.heads);
  s.head_dim = integer(config, {"head_dim"}, s.hidden / s.heads);
  check(s.head_dim > 0, "config.json: head_dim is 0");
  s.activation = distil   ? text(config, "activation", "gelu")
                 : modern ? text(config, "hidden_activation", "gelu")
                          : text(config, "hidden_act", nomic ? "silu" : "gelu");
  // Nomic's own config.json names the gated activation.
  const std::string own = text(config, "activation_function", "");
  if (nomic && own == "swiglu") s.activation = "silu";
  if (nomic && own == "geglu") s.activation = "gelu";
  s.eps = distil   ? 1e-12
          : modern ? real(config, "norm_eps", 1e-5)
                   : real(config, "layer_norm_eps", real(config, "layer_norm_epsilon", 1e-12));
  if (s.family == "roberta" || s.family == "xlm-roberta" || s.family == "camembert")
    s.padding = integer(config, {"pad_token_id"}, 1);
  if (s.family == "mpnet") s.padding = 1;  // fixed in the model, whatever the config says
  const std::string kind = text(config, "position_embedding_type", "absolute");
  check(kind == "absolute", "config.json: position_embedding_type '{}' is not supported; only 'absolute' is", kind);
  if (nomic) {
    s.rotary = true;
    s.rope = object(config, "rope_parameters");
    if (!s.rope.contains("rope_theta"))
      s.rope["rope_theta"] = real(config, "rotary_emb_base", real(config, "rope_theta", 1000.0));
    const double fraction = real(config, "rotary_emb_fraction", 1.0);
    check(fraction == 1.0, "config.json: rotary_emb_fraction {} is not supported; only 1 is", fraction);
    check(!config.value("rotary_emb_interleaved", false) && !config.value("prenorm", false),
          "config.json: rotary_emb_interleaved and prenorm are not supported in nomic_bert");
  }
  if (modern) {
    s.rotary = s.pre_norm = true;
    s.window = integer(config, {"local_attention"}, 128) / 2;
    const json both = object(config, "rope_parameters");
    s.rope = object(both, "full_attention");
    s.local_rope = object(both, "sliding_attention");
    if (!s.rope.contains("rope_theta")) s.rope["rope_theta"] = real(config, "global_rope_theta", 160000.0);
    if (!s.local_rope.contains("rope_theta")) s.local_rope["rope_theta"] = real(config, "local_rope_theta", 10000.0);
    const auto kinds = config.find("layer_types");
    if (kinds != config.end() && !kinds->is_null()) {
      check(kinds->is_array() && static_cast<int64_t>(kinds->size()) == s.layers,
            "config.json: layer_types must be a list of {} names, one a layer", s.layers);
      for (const auto& k : *kinds) {
        check(k == "sliding_attention" || k == "full_attention",
              "config.json: layer_types holds {}; known are full_attention, sliding_attention", k.dump());
        s.local.push_back(k == "sliding_attention");
      }
    }
  }
  return s;
}

/// RoPE of one kind of layer.
std::shared_ptr<const Rope> make_rope(const Spec& s, const json& parameters) {
  RopeConfig config;
  config.theta = real(parameters, "rope_theta", 10000.0);
  config.type = text(parameters, "rope_type", text(parameters, "type", "default"));
  config.parameters = parameters;
  config.head_dim = s.head_dim;
  config.max_positions = s.positions;
  return std::make_shared<Rope>(config);
}

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

class Encoder : public EncoderModel {
 public:
  Encoder(const Checkpoint& checkpoint, const LoadOptions& options)
      : config_(checkpoint.config()), spec_(read_spec(config_)), activation_(activation(spec_.activation)) {
    const Names n = names(checkpoint);
    WeightsSource weights(checkpoint, options, prefix_of(checkpoint, n.word));
    dtype_ = weights.dtype();
    Parts parts(weights, *this);
    word_ = parts.linear(n.word, spec_.vocabulary, spec_.embedding);
    if (!n.position.empty()) position_ = parts.linear(n.position, spec_.positions, spec_.embedding);
    if (!n.type.empty() && spec_.types > 0) type_ = parts.linear(n.type, spec_.types, spec_.embedding);
    embedding_norm_ = parts.norm(n.embedding_norm, spec_.embedding, spec_.eps);
    if (!n.projection.empty() && spec_.embedding != spec_.hidden)
      projection_ = parts.linear(n.projection, spec_.hidden, spec_.embedding);
    if (!n.relative.empty()) {
      const int64_t rows = integer(config_, {"relative_attention_num_buckets"}, kBuckets);
      check(rows >= kBuckets,
            "config.json: relative_attention_num_buckets is {}, fewer than the {} that the model uses", rows, kBuckets);
      relative_ = parts.linear(n.relative, rows, spec_.heads);
    }
    const int64_t inner = spec_.heads * spec_.head_dim, every = integer(config_, {"global_attn_every_n_layers"}, 3);
    check(every > 0, "config.json: global_attn_every_n_layers is 0");
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
      b.local = spec_.window > 0 && (spec_.local.empty() ? i % every != 0 : bool(spec_.local[i]));
      blocks_.push_back(std::move(b));
    }
    if (!n.final_norm.empty()) final_norm_ = parts.norm(n.final_norm, spec_.hidden, spec_.eps);
    if (!n.pooler.empty() && parts.has(n.pooler + ".weight"))
      pooler_ = parts.linear(n.pooler, spec_.hidden, spec_.hidden);
    if (spec_.rotary) rope_ = make_rope(spec_, spec_.rope);
    if (spec_.window > 0) local_rope_ = make_rope(spec_, spec_.local_rope);
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
    Tensor x = word_->rows(ids, dtype_);
    if (!type_.is_empty()) {
      if (types.defined()) {
        check(types.sizes() == ids.sizes(), "the token types must be [{}, {}] like the ids", batch, tokens);
        in_range(types, spec_.types, "token type");
      }
      x = x + type_->rows(types.defined() ? types : torch::zeros_like(ids), dtype_);
    } else {
      check(!types.defined() || !types.any().item<bool>(), "{} has no token types, all must be 0", spec_.family);
    }
    if (!position_.is_empty()) x = x + position_->rows(positions(ids, keep), dtype_);
    x = embedding_norm_->forward(x);
    if (!projection_.is_empty()) x = projection_(x);
    const Shared shared = share(batch, tokens, keep, x.device());
    for (auto& b : blocks_) x = run(b, x, shared);
    if (final_norm_) x = final_norm_->forward(x);
    return x.to(torch::kFloat32);
  }

  Tensor embed(const Tensor& ids, const Tensor& mask) override { return head_->forward(forward(ids, mask, {}), mask); }

  Tensor pooled(const Tensor& hidden) override {
    check(!pooler_.is_empty(), "this {} checkpoint has no pooler ('pooler.dense')", spec_.family);
    return torch::tanh(pooler_(hidden.select(1, 0).to(dtype_))).to(torch::kFloat32);
  }

  int64_t max_length() const override { return std::max<int64_t>(0, spec_.positions - (spec_.padding + 1)); }
  const json& config() const override { return config_; }

 private:
  Names names(const Checkpoint& checkpoint) const {
    if (spec_.family == "electra") return electra_names();
    if (spec_.family == "mpnet") return mpnet_names();
    if (spec_.family == "distilbert") return distilbert_names();
    if (spec_.family == "modernbert") return modernbert_names();
    if (spec_.family == "nomic_bert") {
      for (const auto& t : checkpoint.tensors())
        if (t.name.ends_with("self_attn.q_proj.weight")) return nomic_transformers_names();
      return nomic_names();
    }
    return bert_names();
  }

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
  Spec spec_;
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
  return std::find(families().begin(), families().end(), family_of(config)) != families().end();
}

std::vector<std::string> encoder_families() {
  return families();
}

std::shared_ptr<EncoderModel> load_encoder(const Checkpoint& checkpoint, const LoadOptions& options) {
  return std::make_shared<Encoder>(checkpoint, options);
}

}  // namespace moiety
