#include "moiety/models/decoder.h"

#include <torch/torch.h>

#include <algorithm>
#include <regex>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/moduleformer_names.h"
#include "moiety/io/peft.h"
#include "moiety/models/image_tokens.h"
#include "moiety/models/model_parts.h"
#include "moiety/models/token_blocks.h"
#include "moiety/models/weights_source.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"
#include "moiety/nn/recompute.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using std::string;

// What transformers calls a tensor of a new model of this family, from the name that most families give it.
string family_name(const string& family, string name) {
  using Pairs = std::vector<std::pair<const char*, const char*>>;
  static const Pairs phi = {
      {".self_attn.o_proj.", ".self_attn.dense."}, {".mlp.up_proj.", ".mlp.fc1."}, {".mlp.down_proj.", ".mlp.fc2."}};
  static const Pairs router = {{".mlp.gate.", ".mlp.router."}};
  static const Pairs granite = {{".mlp.gate.", ".block_sparse_moe.router."},
                                {".mlp.experts.", ".block_sparse_moe.experts."},
                                {".mlp.shared_experts.gate_up_proj.", ".shared_mlp.input_linear."},
                                {".mlp.shared_experts.down_proj.", ".shared_mlp.output_linear."}};
  static const std::map<string, Pairs> families = {
      {"phi", phi},
      {"starcoder2", {{".mlp.up_proj.", ".mlp.c_fc."}, {".mlp.down_proj.", ".mlp.c_proj."}}},
      {"gpt_oss", router},
      {"phimoe", router},
      {"granitemoe", granite},
      {"granitemoeshared", granite},
      {"qwen2_moe", {{".mlp.shared_experts.", ".mlp.shared_expert."}}},
      {"hunyuan_v1_dense",
       {{".self_attn.q_norm.", ".self_attn.query_layernorm."}, {".self_attn.k_norm.", ".self_attn.key_layernorm."}}},
      {"glm4",
       {{".post_attention_layernorm.", ".post_self_attn_layernorm."},
        {".pre_feedforward_layernorm.", ".post_attention_layernorm."},
        {".post_feedforward_layernorm.", ".post_mlp_layernorm."}}}};
  if (family == "phi" && name.rfind("norm.", 0) == 0) return "final_layer" + name;
  const auto pairs = families.find(family);
  if (pairs == families.end()) return name;
  for (const auto& [from, to] : pairs->second) {
    const auto at = name.find(from);
    if (at == string::npos) continue;
    return name.replace(at, std::char_traits<char>::length(from), to);
  }
  return name;
}

bool fused_qkv(const DecoderConfig& c) {
  return c.family == "phi3";
}

bool fused_gate_up(const DecoderConfig& c) {
  return c.family == "phi3" || c.family == "glm" || c.family == "glm4" || c.family.rfind("granitemoe", 0) == 0;
}

std::shared_ptr<Norm> make_norm(WeightsSource& w, const string& name, std::vector<int64_t> shape, NormKind kind,
                                double eps) {
  switch (kind) {
    case NormKind::rms:
      return std::make_shared<RmsNorm>(w.tensor(name + ".weight", shape, 1.0), eps);
    case NormKind::rms_offset:
      return std::make_shared<RmsNorm>(w.tensor(name + ".weight", shape, 0.0), eps, 1.0);
    case NormKind::layer_plain:
      return std::make_shared<LayerNorm>(torch::Tensor(), torch::Tensor(), eps);
    default:
      break;
  }
  auto weight = w.tensor(name + ".weight", shape, 1.0);
  torch::Tensor bias;
  if (w.has(name + ".bias", kind == NormKind::layer)) bias = w.tensor(name + ".bias", shape, 0.0);
  return std::make_shared<LayerNorm>(weight, bias, eps);
}

// A norm over each head: its own kind of weights in every family.
std::shared_ptr<Norm> make_head_norm(WeightsSource& w, const string& at, const DecoderConfig& c, const char* which,
                                     int64_t heads) {
  const string q = which;
  if (c.qk_norm_per_head_layer) {
    if (w.has(at + q + "_norm.weight", c.family != "stablelm"))
      return make_norm(w, at + q + "_norm", {heads, c.head_dim}, NormKind::layer_without_bias, c.norm_eps);
    // StableLM keeps one norm a head.
    std::vector<torch::Tensor> rows;
    const auto row = [&](int64_t h) { return at + q + "_layernorm.norms." + std::to_string(h) + ".weight"; };
    for (int64_t h = 0; h < heads; ++h)
      rows.push_back(w.random() ? torch::ones({c.head_dim}) : w.values(w.view(row(h), {c.head_dim})));
    const auto weight = w.parameter(torch::stack(rows));
    for (int64_t h = 0; h < heads; ++h) w.store(row(h), [weight, h] { return weight[h]; });
    return std::make_shared<LayerNorm>(weight, torch::Tensor(), c.norm_eps);
  }
  const string name = w.pick({at + q + "_norm.weight", at + (q == "q" ? "query" : "key") + "_layernorm.weight"});
  const NormKind kind = c.norm == NormKind::rms_offset ? NormKind::rms_offset : NormKind::rms;
  return make_norm(w, name.substr(0, name.size() - 7), {c.qk_norm_all_heads ? heads * c.head_dim : c.head_dim}, kind,
                   c.norm_eps);
}

// The expansion of the latent, [H * (nope + v), rank]. Newer GGUF files hold it in two halves, keys transposed.
Linear make_kv_b(WeightsSource& w, const string& at, const DecoderConfig& c) {
  const auto& m = c.mla;
  if (w.random() || !w.has(at + "k_b_proj", false))
    return w.linear(at + "kv_b_proj", m.rank, c.heads * (m.nope + m.v), false);
  const auto keys = w.values(w.view(at + "k_b_proj", {c.heads, m.rank, m.nope})).transpose(1, 2);
  const auto values = w.values(w.view(at + "v_b_proj", {c.heads, m.v, m.rank}));
  const auto joined = w.parameter(torch::cat({keys, values}, 1).reshape({c.heads * (m.nope + m.v), m.rank}));
  w.store(at + "kv_b_proj.weight", [joined] { return joined; });
  return Linear(joined);
}

std::shared_ptr<AttentionBase> make_attention(WeightsSource& w, const string& layer, const DecoderConfig& c,
                                              const LayerConfig& l,
                                              const std::vector<std::shared_ptr<const Rope>>& ropes) {
  const string at = layer + "self_attn.";
  if (c.latent) {
    const auto& m = c.mla;
    LatentAttentionParts p;
    if (m.q_rank > 0) {
      p.q_a = w.linear(at + "q_a_proj", c.hidden, m.q_rank, c.o_bias);
      p.q_a_norm = make_norm(w, at + "q_a_layernorm", {m.q_rank}, NormKind::rms, 1e-6);
      p.q_b = w.linear(at + "q_b_proj", m.q_rank, c.heads * c.head_dim, false);
    } else {
      p.q = w.linear(at + "q_proj", c.hidden, c.heads * c.head_dim, false);
    }
    p.kv_a = w.linear(at + "kv_a_proj_with_mqa", c.hidden, m.rank + m.rope, c.o_bias);
    p.kv_a_norm = make_norm(w, at + "kv_a_layernorm", {m.rank}, NormKind::rms, 1e-6);
    p.kv_b = make_kv_b(w, at, c);
    p.o = w.linear(at + "o_proj", c.heads * m.v, c.hidden, c.o_bias);
    p.rope = ropes[0];
    p.heads = c.heads;
    p.nope_dim = m.nope;
    p.rope_dim = m.rope;
    p.v_dim = m.v;
    p.rank = m.rank;
    p.scale = c.attention_scale;
    return std::make_shared<LatentAttention>(std::move(p));
  }
  AttentionParts p;
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  if (w.has(at + "qkv_proj.weight", fused_qkv(c))) {
    p.q = w.rows(at + "qkv_proj", c.hidden, q + 2 * kv, 0, q, c.qkv_bias);
    p.k = w.rows(at + "qkv_proj", c.hidden, q + 2 * kv, q, kv, c.qkv_bias);
    p.v = w.rows(at + "qkv_proj", c.hidden, q + 2 * kv, q + kv, kv, c.qkv_bias);
  } else {
    p.q = w.linear(at + "q_proj", c.hidden, q, c.qkv_bias);
    p.k = w.linear(at + "k_proj", c.hidden, kv, c.qkv_bias);
    p.v = w.linear(at + "v_proj", c.hidden, kv, c.qkv_bias);
  }
  const string o = w.pick({at + "o_proj.weight", at + "dense.weight"});
  p.o = w.linear(o.substr(0, o.size() - 7), q, c.hidden, c.o_bias);
  if (c.qk_norm) {
    p.q_norm = make_head_norm(w, at, c, "q", c.heads);
    p.k_norm = make_head_norm(w, at, c, "k", c.kv_heads);
    p.norm_all_heads = c.qk_norm_all_heads;
    p.norm_after_rope = c.qk_norm_after_rope;
  }
  if (l.rope >= 0) p.rope = ropes.at(l.rope);
  p.head_dim = c.head_dim;
  p.clip = c.clip_qkv;
  p.options = {.scale = c.attention_scale, .window = l.window, .softcap = c.attention_softcap, .sinks = {}};
  if (c.sinks) p.options.sinks = w.tensor(at + "sinks", {c.heads}, 0.0);
  return std::make_shared<Attention>(std::move(p));
}

std::shared_ptr<FeedForward> make_feed_forward(WeightsSource& w, const string& at, const DecoderConfig& c,
                                               int64_t width) {
  const Activation act = activation(c.act);
  for (const char* fused : {"gate_up_proj", "input_linear"})
    if (w.has(at + fused + ".weight", fused_gate_up(c))) {
      auto gate = w.rows(at + fused, c.hidden, 2 * width, 0, width, c.mlp_bias),
           up = w.rows(at + fused, c.hidden, 2 * width, width, width, c.mlp_bias);
      const string down = w.pick({at + "down_proj.weight", at + "output_linear.weight"});
      return std::make_shared<FeedForward>(gate, up,
                                           w.linear(down.substr(0, down.size() - 7), width, c.hidden, c.mlp_bias), act);
    }
  Linear gate{nullptr};
  if (c.gated) gate = w.linear(at + "gate_proj", c.hidden, width, c.mlp_bias);
  const string up = w.pick({at + "up_proj.weight", at + "c_fc.weight", at + "fc1.weight"});
  const string down =
      w.pick({at + "down_proj.weight", at + "c_proj.weight", at + "fc2.weight", at + "output_linear.weight"});
  auto u = w.linear(up.substr(0, up.size() - 7), c.hidden, width, c.mlp_bias);
  return std::make_shared<FeedForward>(gate, u, w.linear(down.substr(0, down.size() - 7), width, c.hidden, c.mlp_bias),
                                       act);
}

// E matrices [out, in] that lie in one stored stack, rows [begin, begin + out) of each element.
LinearStack stack_of(WeightsSource& w, const TensorView& stack, int64_t begin, int64_t out, torch::Tensor bias) {
  const int64_t experts = stack.shape[0];
  if (!is_block(stack.format) && !w.leave_experts())
    return LinearStack(w.parameter(w.values(stack).narrow(1, begin, out)), bias);
  std::vector<Linear> list;
  for (int64_t e = 0; e < experts; ++e)
    list.push_back(w.expert_matrix(slice_rows(select_first(stack, e), begin, begin + out)));
  return LinearStack(std::move(list), bias);
}

struct ExpertStacks {
  LinearStack gate{nullptr}, up{nullptr}, down{nullptr};
};

void store_stack(WeightsSource& w, const string& name, const LinearStack& s, int64_t begin = 0) {
  w.store(
      name, [s] { return stored_matrices(s); }, 1, begin);
}

// gpt-oss stores x W: [E, d, 2f] with gate and up columns alternating, and [E, f, d].
void store_gpt_oss(WeightsSource& w, const string& at, const ExpertStacks& s) {
  const auto pairs = [](const torch::Tensor& gate, const torch::Tensor& up) {
    return torch::stack({gate, up}, -1).flatten(-2);
  };
  w.store(at + "gate_up_proj",
          [=] { return pairs(stored_matrices(s.gate).transpose(1, 2), stored_matrices(s.up).transpose(1, 2)); });
  w.store(at + "gate_up_proj_bias", [=] { return pairs(s.gate->bias, s.up->bias); });
  w.store(at + "down_proj", [=] { return stored_matrices(s.down).transpose(1, 2); });
  w.store(at + "down_proj_bias", [=] { return s.down->bias; });
}

// gpt-oss in MXFP4: NAME_blocks [E, rows, in/32, 16] with neighbouring nibbles, NAME_scales [E, rows, in/32]. Returns
// rows `first`, `first + step`, ... of every expert (gate and up rows alternate), written as GGUF-style blocks when
// they are used.
LinearStack mxfp4_stack(WeightsSource& w, const string& name, int64_t experts, int64_t rows, int64_t in, int64_t first,
                        int64_t step, torch::Tensor bias) {
  check(in % 32 == 0, "tensor '{}_blocks': {} inputs are not a multiple of 32", name, in);
  const auto blocks = w.view(name + "_blocks", {experts, rows, in / 32, 16}),
             scales = w.view(name + "_scales", {experts, rows, in / 32});
  const int64_t out = rows / step, per_row = in / 32;
  TensorInfo info;
  info.name = name;
  info.format = Format::MXFP4;
  info.shape = {out, in};
  std::vector<Linear> list;
  for (int64_t e = 0; e < experts; ++e)
    list.push_back(w.made_matrix(info, [=] {
      auto bytes = std::make_shared<std::vector<std::byte>>(info.bytes());
      for (int64_t r = 0; r < out; ++r)
        for (int64_t b = 0; b < per_row; ++b) {
          const int64_t at = (e * rows + first + r * step) * per_row + b;
          mxfp4_to_gguf(blocks.data.data() + at * 16, scales.data[at], bytes->data() + (r * per_row + b) * 17);
        }
      return TensorView{info, *bytes, bytes};
    }));
  return LinearStack(std::move(list), bias);
}

ExpertStacks gpt_oss_experts(WeightsSource& w, const string& at, int64_t experts, int64_t hidden, int64_t width) {
  const auto bias = w.bias_values(w.view(at + "gate_up_proj_bias", {experts, 2 * width})).view({experts, width, 2});
  const auto gate_bias = w.bias_parameter(bias.select(2, 0).contiguous()),
             up_bias = w.bias_parameter(bias.select(2, 1).contiguous());
  const auto down_bias = w.tensor(at + "down_proj_bias", {experts, hidden}, 0.0);
  ExpertStacks s;
  if (w.has(at + "gate_up_proj_blocks", false)) {
    s.gate = mxfp4_stack(w, at + "gate_up_proj", experts, 2 * width, hidden, 0, 2, gate_bias);
    s.up = mxfp4_stack(w, at + "gate_up_proj", experts, 2 * width, hidden, 1, 2, up_bias);
    s.down = mxfp4_stack(w, at + "down_proj", experts, hidden, width, 0, 1, down_bias);
    return s;
  }
  // Stored as x W: [E, d, 2f] with gate and up columns alternating, and [E, f, d].
  const auto gate_up =
      w.values(w.view(at + "gate_up_proj", {experts, hidden, 2 * width})).view({experts, hidden, width, 2});
  const auto columns = [&](const torch::Tensor& t) { return w.parameter(t.transpose(1, 2).contiguous()); };
  s.gate = LinearStack(columns(gate_up.select(3, 0)), gate_bias);
  s.up = LinearStack(columns(gate_up.select(3, 1)), up_bias);
  s.down = LinearStack(columns(w.values(w.view(at + "down_proj", {experts, width, hidden}))), down_bias);
  return s;
}

ExpertStacks make_experts(WeightsSource& w, const string& layer, const string& mlp, const DecoderConfig& c,
                          const MixtureConfig& m) {
  const int64_t experts = m.matrices > 0 ? m.matrices : m.experts, hidden = c.hidden, width = m.width;
  // Stacks of a GGUF file stand under `mlp` in every family.
  const string at = w.has(layer + "mlp.experts.gate_proj", false) ? layer + "mlp.experts." : mlp + "experts.";
  ExpertStacks s;
  if (w.random()) {
    torch::Tensor gb, ub, db;
    if (m.clamped) {
      gb = w.bias_parameter(torch::zeros({experts, width}));
      ub = w.bias_parameter(torch::zeros({experts, width}));
      db = w.bias_parameter(torch::zeros({experts, hidden}));
    }
    s.gate = LinearStack(w.random_matrix({experts, width, hidden}), gb);
    s.up = LinearStack(w.random_matrix({experts, width, hidden}), ub);
    s.down = LinearStack(w.random_matrix({experts, hidden, width}), db);
    if (m.clamped) {
      store_gpt_oss(w, at, s);
    } else {
      store_stack(w, at + "gate_up_proj", s.gate);
      store_stack(w, at + "gate_up_proj", s.up, width);
      store_stack(w, at + "down_proj", s.down);
    }
    return s;
  }
  // Separate gate, up and down stacks (GGUF).
  if (w.has(at + "gate_proj", false)) {
    const auto bias = [&](const char* name, int64_t out) {
      return w.has(at + name, false) ? w.tensor(at + name, {experts, out}, 0.0) : torch::Tensor();
    };
    s.gate = stack_of(w, w.view(at + "gate_proj", {experts, width, hidden}), 0, width, bias("gate_proj_bias", width));
    s.up = stack_of(w, w.view(at + "up_proj", {experts, width, hidden}), 0, width, bias("up_proj_bias", width));
    s.down = stack_of(w, w.view(at + "down_proj", {experts, hidden, width}), 0, hidden, bias("down_proj_bias", hidden));
    store_stack(w, at + "gate_proj", s.gate);
    store_stack(w, at + "up_proj", s.up);
    store_stack(w, at + "down_proj", s.down);
    return s;
  }
  if (m.clamped) {
    s = gpt_oss_experts(w, at, experts, hidden, width);
    store_gpt_oss(w, at, s);
    return s;
  }
  // Gate and up fused in one stack (current transformers; GraniteMoE always).
  for (const auto& [fused, down] : {std::pair{at + "gate_up_proj", at + "down_proj"},
                                    std::pair{mlp + "input_linear.weight", mlp + "output_linear.weight"}})
    if (w.has(fused, false)) {
      const auto view = w.view(fused, {experts, 2 * width, hidden});
      s.gate = stack_of(w, view, 0, width, {});
      s.up = stack_of(w, view, width, width, {});
      s.down = stack_of(w, w.view(down, {experts, hidden, width}), 0, hidden, {});
      store_stack(w, fused, s.gate);
      store_stack(w, fused, s.up, width);
      store_stack(w, down, s.down);
      return s;
    }
  // One tensor an expert and projection.
  const auto separate = [&](const std::vector<string>& names, int64_t out, int64_t in) {
    std::vector<Linear> list;
    std::vector<string> picked;
    for (int64_t e = 0; e < experts; ++e) {
      std::vector<string> candidates;
      for (const string& name : names) candidates.push_back(at + std::to_string(e) + "." + name + ".weight");
      picked.push_back(w.pick(candidates));
      list.push_back(w.expert_matrix(w.view(picked.back(), {out, in})));
    }
    LinearStack stack{nullptr};
    if (!w.trainable() || list[0]->quantized()) {
      stack = LinearStack(std::move(list));
    } else {
      std::vector<torch::Tensor> weights;
      for (const Linear& l : list) weights.push_back(l->weight.detach());
      stack = LinearStack(torch::stack(weights).requires_grad_(true));
    }
    for (int64_t e = 0; e < experts; ++e) w.store(picked[e], [stack, e] { return stored_matrix(stack, e); });
    return stack;
  };
  s.gate = separate({"gate_proj", "w1"}, width, hidden);
  s.up = separate({"up_proj", "w3"}, width, hidden);
  s.down = separate({"down_proj", "w2"}, hidden, width);
  return s;
}

struct MixtureParts {
  std::shared_ptr<Router> router;
  Linear projection{nullptr};
  std::shared_ptr<Experts> experts;
  std::shared_ptr<FeedForward> shared;
  Linear shared_gate{nullptr};
};

MixtureParts mixture_parts(WeightsSource& w, const string& layer, const DecoderConfig& c, const MixtureConfig& m) {
  const string router =
      w.pick({layer + "mlp.gate.weight", layer + "block_sparse_moe.gate.weight", layer + "mlp.router.weight",
              layer + "block_sparse_moe.router.layer.weight", layer + "block_sparse_moe.router.weight"});
  const string mlp = layer + (router.find("block_sparse_moe") != string::npos ? "block_sparse_moe." : "mlp.");
  const string router_name = router.substr(0, router.size() - 7);
  // The router computes in f32 whatever the weights are.
  Linear projection{nullptr};
  if (w.random()) {
    Linear fresh(c.hidden, m.experts, m.router_bias);
    for (auto& t : fresh->parameters()) t.set_requires_grad(w.trainable());
    projection = fresh;
    w.store(router_name + ".weight", [fresh] { return fresh->weight; });
    if (m.router_bias) w.store(router_name + ".bias", [fresh] { return fresh->bias; });
  } else {
    projection = w.linear(router_name, c.hidden, m.experts, m.router_bias);
  }
  std::shared_ptr<Router> r;
  if (m.sparse_mixer) {
    r = std::make_shared<SparseMixerRouter>(projection, m.router.top_k, m.sparse_mixer_jitter);
  } else {
    torch::Tensor bias;
    const string bias_name = mlp + "gate.e_score_correction_bias";
    if (m.choice_bias || c.added_choice_bias) {
      const bool stored = w.has(bias_name, false);
      check(stored || w.random() || (w.may_create && !m.choice_bias),
            "the model needs tensor '{}' [{}], which is not there", bias_name, m.experts);
      bias = stored ? dequantize(w.view(bias_name, {m.experts})) : torch::zeros({m.experts});
      bias = bias.to(w.device());
    }
    const auto top = std::make_shared<TopKRouter>(projection, m.router, bias);
    if (bias.defined()) w.store(bias_name, [top] { return top->choice_bias; });
    r = top;
  }
  r->of_family = true;
  r->set_balance(m.balance);
  const ExpertStacks s = make_experts(w, layer, mlp, c, m);
  std::shared_ptr<Experts> experts;
  if (m.clamped)
    experts = std::make_shared<ClampedExperts>(s.gate, s.up, s.down, m.clamp_alpha, m.clamp_limit);
  else
    experts = std::make_shared<GatedExperts>(s.gate, s.up, s.down, activation(c.act));
  std::shared_ptr<FeedForward> shared;
  Linear shared_gate{nullptr};
  if (m.shared_width > 0) {
    string at = mlp + "shared_experts.";
    for (const string& candidate : {mlp + "shared_experts.", mlp + "shared_expert.", layer + "shared_mlp."})
      if (w.has(candidate + "down_proj.weight", false) || w.has(candidate + "output_linear.weight", false))
        at = candidate;
    DecoderConfig plain = c;
    plain.gated = true;
    shared = make_feed_forward(w, at, plain, m.shared_width);
    if (m.shared_gate) shared_gate = w.linear(mlp + "shared_expert_gate", c.hidden, 1, false);
  }
  return {r, projection, experts, shared, shared_gate};
}

std::shared_ptr<FeedForwardBase> make_mixture(WeightsSource& w, const string& layer, const DecoderConfig& c,
                                              int64_t index) {
  const MixtureConfig m = c.mixture_of(index);
  const auto p = mixture_parts(w, layer, c, m);
  auto mixture = std::make_shared<Mixture>(p.router, p.experts, p.shared, p.shared_gate);
  mixture->jitter = c.moe.jitter;
  if (!m.expert_map.empty()) mixture->expert_map = torch::tensor(m.expert_map, torch::kInt64).to(w.device());
  return mixture;
}

DenseLayer dense_layer(WeightsSource& w, const string& at, const DecoderConfig& c) {
  const int64_t d = c.hidden, f = c.intermediate;
  if (w.random() || !c.gated) return {};
  if (w.has(at + "gate_proj.weight", false))
    return {w.values(w.view(at + "gate_proj.weight", {f, d})), w.values(w.view(at + "up_proj.weight", {f, d})),
            w.values(w.view(at + "down_proj.weight", {d, f}))};
  if (!w.has(at + "gate_up_proj.weight", false)) return {};
  const auto both = w.values(w.view(at + "gate_up_proj.weight", {2 * f, d}));
  return {both.narrow(0, 0, f), both.narrow(0, f, f), w.values(w.view(at + "down_proj.weight", {d, f}))};
}

// Calls the factory of a part with everything that it may need to know.
template <class Make>
auto make_part(const PartEntry& entry, WeightsSource& w, const string& layer, const string& site, int64_t index,
               const DecoderConfig& c, ModelParts& parts, std::shared_ptr<Norm> norm) {
  NamedWeights own(w, layer + site), model(w, "");
  PartSite at{.own = own, .model = model, .shared = parts.shared};
  at.layer = index;
  at.layers = static_cast<int64_t>(c.layers.size());
  at.hidden = c.hidden;
  at.width = c.intermediate;
  at.heads = c.heads;
  at.act = c.act;
  at.init_std = c.init_std;
  at.norm_eps = c.norm_eps;
  at.choice_bias = c.added_choice_bias;
  at.norm = std::move(norm);
  at.dense = [&] { return dense_layer(w, layer + "mlp.", c); };
  at.mixture = [&]() -> std::shared_ptr<FamilyMixture> {
    if (!c.layers[static_cast<size_t>(index)].mixture) return nullptr;
    const MixtureConfig m = c.mixture_of(index);
    check(m.expert_map.empty(), "it cannot stand over experts that several rows of the router share");
    const auto p = mixture_parts(w, layer, c, m);
    return std::make_shared<FamilyMixture>(
        FamilyMixture{p.projection, p.router, p.experts, p.shared, p.shared_gate, c.moe.jitter});
  };
  try {
    return factory<Make>(get_method("part", entry.slug))(at, entry.settings);
  } catch (const Error& e) {
    fail("part {} in layer {}: {}", entry.slug, index, e.what());
  }
}

std::vector<SiteMatrix> matrices_of(const AttentionBase& attention, const FeedForwardBase& ffn) {
  std::vector<SiteMatrix> out;
  const auto add = [&](const string& half, const NamedMatrix& m, int first) {
    if (!m.linear.is_empty()) out.push_back({m.name, half, first + m.input, m.linear});
  };
  int inputs = 0;
  for (const NamedMatrix& m : attention.matrices()) {
    add("self_attn", m, 0);
    inputs = std::max(inputs, m.input + 1);
  }
  if (const auto* f = dynamic_cast<const FeedForward*>(&ffn)) {
    for (const NamedMatrix& m :
         {NamedMatrix{"gate_proj", 0, f->gate}, {"up_proj", 0, f->up}, {"down_proj", 1, f->down}})
      add("mlp", m, inputs);
  }
  return out;
}

std::vector<SiteStack> stacks_of(const FeedForwardBase& ffn) {
  const auto* m = dynamic_cast<const Mixture*>(&ffn);
  auto* e = m == nullptr ? nullptr : dynamic_cast<GatedExperts*>(m->experts.get());
  if (e == nullptr) return {};
  return {{"experts.gate_up_proj", {e->gate.get(), e->up.get()}}, {"experts.down_proj", {e->down.get()}}};
}

std::shared_ptr<Block> make_block(WeightsSource& w, int64_t index, const DecoderConfig& c, ModelParts& parts,
                                  const std::vector<std::shared_ptr<const Rope>>& ropes) {
  const LayerConfig& l = c.layers[static_cast<size_t>(index)];
  const string layer = "layers." + std::to_string(index) + ".";
  const auto norm = [&](const char* name) { return make_norm(w, layer + name, {c.hidden}, c.norm, c.norm_eps); };
  std::shared_ptr<Norm> before_attention, after_attention, before_ffn, after_ffn;
  switch (c.placement) {
    case Placement::pre:
      before_attention = norm("input_layernorm");
      before_ffn = norm("post_attention_layernorm");
      break;
    case Placement::post:
      after_attention = norm("post_attention_layernorm");
      after_ffn = norm("post_feedforward_layernorm");
      break;
    case Placement::parallel:
      before_attention = norm("input_layernorm");
      break;
    case Placement::sandwich:
      before_attention = norm("input_layernorm");
      if (w.has(layer + "post_self_attn_layernorm.weight", false)) {  // GLM-4 names
        after_attention = norm("post_self_attn_layernorm");
        before_ffn = norm("post_attention_layernorm");
        after_ffn = norm("post_mlp_layernorm");
      } else {
        after_attention = norm("post_attention_layernorm");
        before_ffn = norm("pre_feedforward_layernorm");
        after_ffn = norm("post_feedforward_layernorm");
      }
      break;
  }
  std::shared_ptr<AttentionBase> attention;
  if (const PartEntry* part = parts.at("attention", index))
    attention = make_part<MakeAttention>(*part, w, layer, "self_attn.", index, c, parts, before_attention);
  else
    attention = make_attention(w, layer, c, l, ropes);
  std::shared_ptr<FeedForwardBase> ffn;
  if (const PartEntry* part = parts.at("ffn", index)) {
    ffn = make_part<MakeFeedForward>(*part, w, layer, "mlp.", index, c, parts, before_ffn);
    if (ffn->whole_half()) {
      check(c.placement == Placement::pre,
            "part {} takes a whole half of a block, which only blocks of the order norm, layer, "
            "residual allow; those of {} are built otherwise",
            part->slug, c.family);
      before_ffn = nullptr;
    }
  } else if (l.mixture)
    ffn = make_mixture(w, layer, c, index);
  else
    ffn = make_feed_forward(w, layer + "mlp.", c, c.intermediate);
  attach_parts(w, {layer, "model." + layer, index}, parts, matrices_of(*attention, *ffn), stacks_of(*ffn));
  return std::make_shared<Block>(c.placement, c.residual_scale, attention, ffn, before_attention, after_attention,
                                 before_ffn, after_ffn);
}

// Compressed experts as their authors' config names them: a part of every mixture that no other part takes.
bool names_compressed_experts(const nlohmann::json& json) {
  const auto use = json.find("use_ce");
  check(use == json.end() || use->is_boolean() || use->is_null(), "config.json: 'use_ce' is {}, not true or false",
        use == json.end() ? "" : use->dump());
  return use != json.end() && *use == true;
}

std::vector<PartEntry> parts_of(const nlohmann::json& json, const DecoderConfig& c) {
  auto entries = parse_parts(json, static_cast<int64_t>(c.layers.size()));
  if (!names_compressed_experts(json)) return entries;
  PartEntry entry;
  entry.slug = "compressed-experts";
  entry.site = "ffn";
  entry.settings = nlohmann::json::object();
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const auto layer = static_cast<int64_t>(i);
    const bool taken = std::any_of(entries.begin(), entries.end(), [&](const PartEntry& e) {
      return e.site == "ffn" && std::binary_search(e.layers.begin(), e.layers.end(), layer);
    });
    if (c.layers[i].mixture && !taken) entry.layers.push_back(layer);
  }
  check(!entry.layers.empty() || !entries.empty(),
        "config.json: 'use_ce' asks for compressed experts, and no layer is a mixture");
  if (const auto n = json.find("n_ce"); n != json.end() && !n->is_null()) entry.settings["n_ce"] = *n;
  if (!entry.layers.empty()) entries.push_back(std::move(entry));
  return entries;
}

std::shared_ptr<CausalModel> assemble(WeightsSource& w, const nlohmann::json& json, const DecoderConfig& c) {
  std::vector<std::shared_ptr<const Rope>> ropes;
  for (const RopeConfig& r : c.ropes) ropes.push_back(std::make_shared<const Rope>(r));
  ModelParts parts{parts_of(json, c), static_cast<int64_t>(c.layers.size()), {}, {}};
  w.biases_learn = biases_learn(moiety::parts_of(json));
  const auto embed = w.linear("embed_tokens", c.hidden, c.vocab, false);
  std::vector<std::shared_ptr<Block>> blocks;
  for (size_t i = 0; i < c.layers.size(); ++i)
    blocks.push_back(make_block(w, static_cast<int64_t>(i), c, parts, ropes));
  const string final_norm =
      c.norm == NormKind::layer_plain ? "norm" : w.pick({"norm.weight", "final_layernorm.weight"});
  check_placed(parts);
  const auto norm = make_norm(w, final_norm.substr(0, final_norm.find('.')), {c.hidden}, c.norm, c.norm_eps);
  Linear head = embed;
  if (!c.tied) head = w.linear("lm_head", c.hidden, c.vocab, c.head_bias);
  const auto layers = static_cast<int64_t>(c.layers.size());
  w.check_all_used([&](const string& name) {
    static const std::regex beside(
        "(^|.*\\.)(rotary_emb\\.inv_freq|masked_bias|vision_tower\\..*|visual\\..*|vision_model\\..*|multi_modal_"
        "projector\\..*|audio_tower\\..*)$"
        "|^moiety\\.rope_freqs$"
        // Low-precision copies of experts (offload/).
        "|^gguf\\.blk\\.[0-9]+\\.ffn_(gate|up|down)_exps\\.low\\.weight$");
    static const std::regex layer(".*layers\\.([0-9]{1,9})\\..*");
    std::smatch found;
    if (std::regex_match(name, beside)) return true;
    if (c.tied && name.find("lm_head.weight") != string::npos) return true;
    // Blocks behind the last are extra heads that predict several tokens (DeepSeek-V3).
    return std::regex_match(name, found, layer) && std::stoll(found[1]) >= layers;
  });
  auto decoder = std::make_shared<Decoder>(json, c, embed, std::move(blocks), norm, head, w.dtype());
  decoder->stored_tensors = w.stored();
  return decoder;
}

}  // namespace

Block::Block(Placement placement, double residual_scale, std::shared_ptr<AttentionBase> a,
             std::shared_ptr<FeedForwardBase> f, std::shared_ptr<Norm> ba, std::shared_ptr<Norm> aa,
             std::shared_ptr<Norm> bf, std::shared_ptr<Norm> af)
    : placement_(placement), residual_scale_(residual_scale) {
  attention = register_module("self_attn", std::move(a));
  ffn = register_module("mlp", std::move(f));
  if (ba) before_attention = register_module("input_layernorm", std::move(ba));
  // Hugging Face calls the norm before the feed-forward layer "post_attention" where there is none after attention.
  if (aa) after_attention = register_module("post_attention_layernorm", std::move(aa));
  if (bf)
    before_ffn =
        register_module(after_attention ? "pre_feedforward_layernorm" : "post_attention_layernorm", std::move(bf));
  if (af) after_ffn = register_module("post_feedforward_layernorm", std::move(af));
}

torch::Tensor Block::forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) {
  const auto scaled = [&](const torch::Tensor& t) { return residual_scale_ == 1.0 ? t : t * residual_scale_; };
  const auto normed = before_attention ? before_attention->forward(x) : x;
  auto a = attention->forward(normed, context, pass);
  if (placement_ == Placement::parallel) return x + scaled(a) + scaled(ffn->forward(normed, pass));
  if (after_attention) a = after_attention->forward(a);
  const auto h = x + scaled(a);
  if (ffn->whole_half()) return ffn->forward(h, pass);
  auto f = ffn->forward(before_ffn ? before_ffn->forward(h) : h, pass);
  if (after_ffn) f = after_ffn->forward(f);
  return h + scaled(f);
}

Decoder::Decoder(nlohmann::json config, DecoderConfig p, Linear e, std::vector<std::shared_ptr<Block>> blocks,
                 std::shared_ptr<Norm> n, Linear h, torch::Dtype dtype)
    : parsed(std::move(p)), layers(std::move(blocks)), json_(std::move(config)), dtype_(dtype) {
  embed = register_module("embed_tokens", std::move(e));
  for (size_t i = 0; i < layers.size(); ++i) register_module("layer" + std::to_string(i), layers[i]);
  norm = register_module("norm", std::move(n));
  head = h.get() == embed.get() ? embed : register_module("lm_head", std::move(h));
}

int64_t Decoder::experts(int64_t block) const {
  check(block >= 0 && block < blocks(), "block {} does not exist: the model has {}", block, blocks());
  return layers[static_cast<size_t>(block)]->ffn->expert_count();
}

torch::Tensor Decoder::embedded(const torch::Tensor& ids) {
  if (ids.device().is_cpu() && ids.numel() > 0) {
    const auto all = ids.contiguous();
    const int64_t* first = all.const_data_ptr<int64_t>();
    const auto [low, high] = std::minmax_element(first, first + all.numel());
    check(*low >= 0 && *high < parsed.vocab, "token ids must lie between 0 and {}; found {} to {}", parsed.vocab - 1,
          *low, *high);
  }
  const auto x = embed->rows(ids, dtype_);
  return parsed.embedding_scale != 1.0 ? x * torch::scalar_tensor(parsed.embedding_scale, x.options()) : x;
}

namespace {

// Positions [B, T] of new tokens that all count, behind `next` [B], or behind `past` ones where that is undefined.
torch::Tensor behind(const torch::Tensor& ids, const torch::Tensor& next, int64_t past) {
  const int64_t batch = ids.size(0), tokens = ids.size(1);
  const auto whole = ids.options().dtype(torch::kInt64);
  if (!ids.is_cpu() || (next.defined() && !next.is_contiguous())) {
    const auto counted = torch::arange(tokens, whole).unsqueeze(0).expand({batch, tokens});
    return next.defined() ? counted + next.unsqueeze(1) : counted + past;
  }
  // By loops: a decoded token comes here, and torch's operations are not in the caches behind all the weights.
  auto positions = torch::empty({batch, tokens}, whole);
  int64_t* to = positions.data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = next.defined() ? next.const_data_ptr<int64_t>()[b] : past;
    for (int64_t t = 0; t < tokens; ++t) *to++ = first + t;
  }
  return positions;
}

// The position behind the last of every row, [B].
torch::Tensor next_of(const torch::Tensor& positions) {
  if (!positions.is_cpu() || !positions.is_contiguous() || positions.scalar_type() != torch::kInt64)
    return std::get<0>(positions.max(1)) + 1;
  const int64_t batch = positions.size(0), tokens = positions.size(1);
  auto next = torch::empty({batch}, positions.options());
  const int64_t* row = positions.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b, row += tokens)
    next.data_ptr<int64_t>()[b] = *std::max_element(row, row + tokens) + 1;
  return next;
}

}  // namespace

torch::Tensor Decoder::finished(const torch::Tensor& products) const {
  auto logits = products.to(torch::kFloat32);
  if (parsed.logits_scale != 1.0) logits = logits * parsed.logits_scale;
  if (parsed.logits_softcap != 0.0) logits = torch::tanh(logits / parsed.logits_softcap) * parsed.logits_softcap;
  return logits;
}

torch::Tensor Decoder::hidden(const torch::Tensor& ids, Pass& pass) {
  check(ids.dim() == 2 && ids.scalar_type() == torch::kInt64, "token ids must be int64 [batch, time]");
  const int64_t batch = ids.size(0), tokens = ids.size(1), past = pass.cache ? pass.cache->length() : 0;
  check(tokens > 0 && batch > 0, "a pass needs at least one token");
  auto x = with_placed_vectors(embedded(ids), pass);
  const auto whole = ids.options().dtype(torch::kInt64);
  const auto past_mask = pass.cache ? pass.cache->mask() : torch::Tensor();
  torch::Tensor padding;
  if (pass.mask.defined() || past_mask.defined()) {
    const auto truth = ids.options().dtype(torch::kBool);
    padding = torch::cat({past_mask.defined() ? past_mask : torch::ones({batch, past}, truth),
                          pass.mask.defined() ? pass.mask.to(torch::kBool) : torch::ones({batch, tokens}, truth)},
                         1);
  }
  torch::Tensor positions = pass.positions;
  if (!positions.defined() && pass.segments.defined()) {
    // Every sequence of a packed row counts from 0.
    const auto index = torch::arange(tokens, whole).expand({batch, tokens});
    auto starts = torch::ones_like(ids, torch::kBool);
    if (tokens > 1) starts.slice(1, 1).copy_(pass.segments.slice(1, 1) != pass.segments.slice(1, 0, tokens - 1));
    positions = index - std::get<0>(torch::where(starts, index, torch::zeros_like(index)).cummax(1));
  } else if (!positions.defined() && pass.mask.defined()) {
    positions = pass.mask.to(torch::kInt64).cumsum(1) - 1;
    if (pass.cache && pass.cache->next_position().defined())
      positions = positions + pass.cache->next_position().unsqueeze(1);
    positions = positions.clamp_min(0);
  } else if (!positions.defined()) {
    positions = behind(ids, pass.cache ? pass.cache->next_position() : torch::Tensor(), past);
  }
  const auto context = std::make_shared<const AttentionContext>(positions, past, padding, pass.segments);
  const bool recomputed = pass.recompute_blocks && torch::GradMode::is_enabled();
  const auto short_way = run_token_blocks(layers, x, *context, pass);
  if (short_way.defined()) x = short_way;
  for (int64_t i = 0; i < blocks() && !short_way.defined(); ++i) {
    pass.block = i;
    int64_t repeats = 1;
    for (const auto& edit : pass.edits) repeats *= edit->repeats(i, pass);
    for (int64_t r = 0; r < repeats; ++r) {
      pass.round = r;
      pass.slot = r * blocks() + i;
      if (recomputed)
        x = recompute(x, pass, [block = layers[i], context](const torch::Tensor& input, Pass& again) {
          return block->forward(input, *context, again);
        });
      else
        x = layers[i]->forward(x, *context, pass);
    }
  }
  pass.round = 0;
  pass.finish();
  if (pass.cache) {
    // Counted from the real tokens: a row that has seen nothing but padding still stands at its start.
    const auto& before = pass.cache->next_position();
    torch::Tensor next;
    if (pass.positions.defined() || !pass.mask.defined())
      next = next_of(positions);
    else
      next = pass.mask.to(torch::kInt64).sum(1) + (before.defined() ? before : torch::zeros({batch}, whole));
    pass.cache->advance(tokens, padding, next);
  }
  return norm->forward(x);
}

torch::Tensor Decoder::forward(const torch::Tensor& ids, Pass& pass) {
  auto x = hidden(ids, pass);
  if (pass.last_logits_only && x.size(1) > 1) x = x.narrow(1, x.size(1) - 1, 1);
  return finished(head(x));
}

std::vector<StoredTensor> CausalModel::stored() const {
  fail("this model cannot be written: it does not say what its tensors are called");
}

std::shared_ptr<CausalModel> load_causal(const Checkpoint& checkpoint, const LoadOptions& options) {
  return load_causal(checkpoint, checkpoint.config(), options);
}

std::shared_ptr<CausalModel> load_causal(const Checkpoint& checkpoint, const nlohmann::json& config,
                                         const LoadOptions& options) {
  const DecoderConfig parsed = parse_decoder_config(config);
  WeightsSource source(checkpoint, options);
  // Parts that the checkpoint was saved with have their tensors in it; parts that are added to it start new.
  const auto own = [](const nlohmann::json& c) { return c.value("moiety", nlohmann::json()); };
  source.may_create = own(config) != own(checkpoint.config()) || names_compressed_experts(config);
  return assemble(source, config, parsed);
}

std::shared_ptr<CausalModel> make_causal(const nlohmann::json& given, const LoadOptions& options) {
  const nlohmann::json config = moduleformer_config(given);
  const DecoderConfig parsed = parse_decoder_config(config);
  WeightsSource source(parsed.init_std, options);
  source.rename = [&](const string& name) { return family_name(parsed.family, name); };
  return assemble(source, config, parsed);
}

}  // namespace moiety
