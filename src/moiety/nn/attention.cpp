#include "moiety/nn/attention.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"
#include "moiety/nn/attention_tasks.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/shortcut.h"

namespace moiety {

AttentionContext::AttentionContext(torch::Tensor positions, int64_t past, torch::Tensor padding, torch::Tensor segments)
    : batch_(positions.size(0)),
      tokens_(positions.size(1)),
      past_(past),
      positions_(std::move(positions)),
      padding_(std::move(padding)),
      segments_(std::move(segments)) {}

const std::pair<torch::Tensor, torch::Tensor>& AttentionContext::angles(const Rope& rope) const {
  const auto it = angles_.find(&rope);
  return it != angles_.end() ? it->second : angles_.emplace(&rope, rope.angles(positions_)).first->second;
}

const torch::Tensor& AttentionContext::allowed(int64_t window) const {
  const int64_t total = past_ + tokens_;
  if (window >= total) window = 0;  // the window holds everything
  const auto [it, fresh] = allowed_.try_emplace(window);
  if (!fresh) return it->second;
  const bool plain = !padding_.defined() && !segments_.defined() && window == 0;
  if (plain && (past_ == 0 || tokens_ == 1)) return it->second;
  const auto options = torch::TensorOptions().dtype(torch::kInt64).device(positions_.device());
  const auto q = torch::arange(past_, total, options).unsqueeze(1), k = torch::arange(total, options).unsqueeze(0);
  auto allowed = k <= q;
  if (window > 0) allowed = allowed & (k > q - window);
  allowed = allowed.view({1, 1, tokens_, total});
  if (padding_.defined()) allowed = allowed & padding_.view({batch_, 1, 1, total});
  if (segments_.defined()) {
    check(past_ == 0, "packed sequences cannot continue a cache: give each sequence a row of its own");
    allowed = allowed & (segments_.view({batch_, 1, tokens_, 1}) == segments_.view({batch_, 1, 1, tokens_}));
  }
  // A padded query sees itself: a row with nothing to look at would be NaN and spread.
  it->second = allowed | (k == q);
  return it->second;
}

namespace {

constexpr int64_t kFewTokens = 8;
constexpr int64_t kMostWidened = int64_t{1} << 21;  // numbers

CacheRows as_rows(const torch::Tensor& t) {
  return {t, Format::F32, t.size(3)};
}

// A few new tokens a row, no graph; positions side by side in memory, as the cache has them.
bool runs_by_rows(const torch::Tensor& q, const CacheRows& k, const CacheRows& v, const AttentionOptions& options) {
  if (q.size(2) > kFewTokens || !q.is_cpu() || q.scalar_type() != torch::kFloat32) return false;
  for (const CacheRows* rows : {&k, &v}) {
    const torch::Tensor& t = rows->data;
    if (!t.is_cpu() || rows->format == Format::F64 || t.stride(3) != 1 || t.stride(2) != t.size(3)) return false;
  }
  return may_shorten({q, k.data, v.data, options.sinks});
}

torch::Tensor attend_by_rows(const torch::Tensor& q, const CacheRows& k, const CacheRows& v,
                             const torch::Tensor& allowed, const AttentionOptions& options) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), shared = k.data.size(1);
  const int64_t length = k.data.size(2), groups = heads / shared;
  const auto rows = q.transpose(1, 2).contiguous();
  const auto sinks = options.sinks.defined() ? options.sinks.to(torch::kFloat32).contiguous() : torch::Tensor();
  const auto seen = allowed.defined() ? allowed.contiguous() : torch::Tensor();
  auto out = torch::empty({batch, tokens, heads, v.size}, q.options());
  const int64_t grain = std::max<int64_t>(1, 100'000 / (tokens * groups * length * (k.size + v.size)));
  parallel_for(0, batch * shared, grain, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> scratch;
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / shared, h = i % shared;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t row = (b * tokens + t) * heads + h * groups;
        AttendRow a{};
        a.q = rows.const_data_ptr<float>() + row * k.size;
        a.k = k.at(b, h);
        a.v = v.at(b, h);
        a.k_format = k.format;
        a.v_format = v.format;
        a.heads = groups;
        a.size = k.size;
        a.v_size = v.size;
        a.length = length - tokens + t + 1;
        a.scale = static_cast<float>(options.scale);
        a.softcap = static_cast<float>(options.softcap);
        a.seen = seen.defined() ? seen.const_data_ptr<bool>() + ((seen.size(0) == 1 ? 0 : b * tokens) + t) * length
                                : nullptr;
        a.sinks = sinks.defined() ? sinks.const_data_ptr<float>() + h * groups : nullptr;
        scratch.resize(static_cast<size_t>(attend_scratch(a)));
        attend_row(a, scratch.data(), out.data_ptr<float>() + row * v.size);
      }
    }
  });
  return out.transpose(1, 2);
}

torch::Tensor composite(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const torch::Tensor& allowed, bool causal, const AttentionOptions& options) {
  const int64_t groups = q.size(1) / k.size(1);
  if (options.softcap == 0.0 && !options.sinks.defined()) {
    const std::optional<torch::Tensor> m = allowed.defined() ? std::optional<torch::Tensor>(allowed) : std::nullopt;
    return at::scaled_dot_product_attention(q, k, v, m, 0.0, !allowed.defined() && causal, options.scale, groups > 1);
  }
  const auto expand = [&](const torch::Tensor& t) { return groups == 1 ? t : t.repeat_interleave(groups, 1); };
  auto logits = (at::matmul(q, expand(k).transpose(2, 3)) * options.scale).to(torch::kFloat32);
  if (options.softcap != 0.0) logits = torch::tanh(logits / options.softcap) * options.softcap;
  if (allowed.defined()) {
    logits = logits.masked_fill(~allowed, -std::numeric_limits<float>::infinity());
  } else if (causal) {
    const auto future = torch::ones({q.size(2), k.size(2)}, logits.options().dtype(torch::kBool)).triu(1);
    logits = logits.masked_fill(future, -std::numeric_limits<float>::infinity());
  }
  if (options.sinks.defined()) {
    const auto sinks =
        options.sinks.to(torch::kFloat32).view({1, -1, 1, 1}).expand({q.size(0), q.size(1), q.size(2), 1});
    const auto p = torch::softmax(torch::cat({logits, sinks}, -1), -1);
    return at::matmul(p.narrow(-1, 0, logits.size(-1)).to(v.scalar_type()), expand(v));
  }
  return at::matmul(torch::softmax(logits, -1).to(v.scalar_type()), expand(v));
}

torch::Tensor attend_by_blocks(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const torch::Tensor& allowed, bool causal, const AttentionOptions& options) {
  return runs_by_tasks(q, k, v, allowed, causal) ? attend_by_tasks(q, k, v, allowed, causal, options)
                                                 : composite(q, k, v, allowed, causal, options);
}

}  // namespace

torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                     const AttentionContext& context, const AttentionOptions& options) {
  const auto& allowed = context.allowed(options.window);
  if (q.size(2) == 1 && k.scalar_type() == torch::kFloat32 && v.scalar_type() == torch::kFloat32 &&
      runs_by_rows(q, as_rows(k), as_rows(v), options))
    return attend_by_rows(q, as_rows(k), as_rows(v), allowed, options);
  return attend_by_blocks(q, k, v, allowed, context.causal(), options);
}

torch::Tensor attend(const torch::Tensor& q, const CacheRows& k, const CacheRows& v, const AttentionContext& context,
                     const AttentionOptions& options) {
  const auto type = q.scalar_type();
  if (k.is(type) && v.is(type)) return attend(q, k.data, v.data, context, options);
  const auto& allowed = context.allowed(options.window);
  if (runs_by_rows(q, k, v, options)) return attend_by_rows(q, k, v, allowed, options);
  const int64_t batch = q.size(0), shared = k.data.size(1), groups = q.size(1) / shared;
  const int64_t each = k.data.size(2) * (k.size + v.size);  // numbers of one head
  const int64_t most_heads = std::clamp<int64_t>(kMostWidened / each, 1, shared);
  const int64_t most_rows = most_heads < shared ? 1 : std::clamp<int64_t>(kMostWidened / (each * shared), 1, batch);
  std::vector<torch::Tensor> rows;
  for (int64_t b = 0; b < batch; b += most_rows) {
    const int64_t n = std::min(most_rows, batch - b);
    const auto seen = allowed.defined() && allowed.size(0) > 1 ? allowed.narrow(0, b, n) : allowed;
    std::vector<torch::Tensor> heads;
    for (int64_t h = 0; h < shared; h += most_heads) {
      const int64_t m = std::min(most_heads, shared - h);
      AttentionOptions part = options;
      if (part.sinks.defined()) part.sinks = part.sinks.narrow(0, h * groups, m * groups);
      heads.push_back(attend_by_blocks(q.narrow(0, b, n).narrow(1, h * groups, m * groups),
                                       k.narrow(b, n, h, m).widened(type), v.narrow(b, n, h, m).widened(type), seen,
                                       context.causal(), part));
    }
    rows.push_back(heads.size() == 1 ? heads[0] : torch::cat(heads, 1));
  }
  return rows.size() == 1 ? rows[0] : torch::cat(rows);
}

std::vector<NamedMatrix> Attention::matrices() const {
  return {{"q_proj", 0, parts.q}, {"k_proj", 0, parts.k}, {"v_proj", 0, parts.v}, {"o_proj", 1, parts.o}};
}

std::vector<NamedMatrix> LatentAttention::matrices() const {
  return {{"q_proj", 0, parts.q},     {"q_a_proj", 0, parts.q_a},   {"kv_a_proj_with_mqa", 0, parts.kv_a},
          {"q_b_proj", 1, parts.q_b}, {"kv_b_proj", 2, parts.kv_b}, {"o_proj", 3, parts.o}};
}

Attention::Attention(AttentionParts p) : parts(std::move(p)) {
  register_module("q_proj", parts.q);
  register_module("k_proj", parts.k);
  register_module("v_proj", parts.v);
  register_module("o_proj", parts.o);
  if (parts.q_norm) register_module("q_norm", parts.q_norm);
  if (parts.k_norm) register_module("k_norm", parts.k_norm);
  if (parts.options.sinks.defined())
    parts.options.sinks = register_parameter("sinks", parts.options.sinks, parts.options.sinks.requires_grad());
}

torch::Tensor Attention::forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) {
  const int64_t batch = x.size(0), tokens = x.size(1);
  const auto projected = project({parts.q, parts.k, parts.v}, x, pass);
  auto q = projected[0], k = projected[1], v = projected[2];
  if (parts.norm_all_heads) {
    if (parts.q_norm) q = parts.q_norm->forward(q);
    if (parts.k_norm) k = parts.k_norm->forward(k);
  }
  if (parts.clip > 0.0) {
    q = q.clamp(-parts.clip, parts.clip);
    k = k.clamp(-parts.clip, parts.clip);
    v = v.clamp(-parts.clip, parts.clip);
  }
  q = q.view({batch, tokens, -1, parts.head_dim});
  k = k.view({batch, tokens, -1, parts.head_dim});
  const auto norm = [&] {
    if (parts.norm_all_heads) return;
    if (parts.q_norm) q = parts.q_norm->forward(q);
    if (parts.k_norm) k = parts.k_norm->forward(k);
  };
  if (!parts.norm_after_rope) norm();
  q = q.transpose(1, 2);
  k = k.transpose(1, 2);
  v = v.view({batch, tokens, -1, parts.head_dim}).transpose(1, 2);
  if (parts.rope) {
    const auto& angles = context.angles(*parts.rope);
    q = parts.rope->rotate(q, angles);
    k = parts.rope->rotate(k, angles);
  }
  if (parts.norm_after_rope) norm();
  AttentionOptions options = parts.options;
  options.round_operands = parts.o->packs();
  torch::Tensor y;
  if (pass.cache) {
    const auto [keys, values] = pass.cache->store(pass.slot, k, v);
    y = attend(q, keys, values, context, options);
  } else {
    y = attend(q, k, v, context, options);
  }
  return project(parts.o, y.transpose(1, 2).reshape({batch, tokens, -1}), pass);
}

LatentAttention::LatentAttention(LatentAttentionParts p) : parts(std::move(p)) {
  if (!parts.q.is_empty()) {
    register_module("q_proj", parts.q);
  } else {
    register_module("q_a_proj", parts.q_a);
    register_module("q_a_layernorm", parts.q_a_norm);
    register_module("q_b_proj", parts.q_b);
  }
  register_module("kv_a_proj_with_mqa", parts.kv_a);
  register_module("kv_a_layernorm", parts.kv_a_norm);
  register_module("kv_b_proj", parts.kv_b);
  register_module("o_proj", parts.o);
}

torch::Tensor LatentAttention::forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) {
  const int64_t batch = x.size(0), tokens = x.size(1), heads = parts.heads;
  const auto projected = project({parts.q.is_empty() ? parts.q_a : parts.q, parts.kv_a}, x, pass);
  const auto q = (parts.q.is_empty() ? project(parts.q_b, parts.q_a_norm->forward(projected[0]), pass) : projected[0])
                     .view({batch, tokens, heads, parts.nope_dim + parts.rope_dim})
                     .transpose(1, 2);
  const auto& compressed = projected[1];
  auto latent = parts.kv_a_norm->forward(compressed.narrow(-1, 0, parts.rank)).unsqueeze(1);
  auto k_rope = compressed.narrow(-1, parts.rank, parts.rope_dim).unsqueeze(1);
  const auto& angles = context.angles(*parts.rope);
  const auto q_rope = parts.rope->rotate(q.narrow(-1, parts.nope_dim, parts.rope_dim), angles);
  k_rope = parts.rope->rotate(k_rope, angles);
  if (pass.cache) std::tie(latent, k_rope) = pass.cache->append(pass.slot, latent, k_rope);
  const int64_t total = latent.size(2);
  const auto kv = project(parts.kv_b, latent.squeeze(1), pass)
                      .view({batch, total, heads, parts.nope_dim + parts.v_dim})
                      .transpose(1, 2);
  const auto k =
      torch::cat({kv.narrow(-1, 0, parts.nope_dim), k_rope.expand({batch, heads, total, parts.rope_dim})}, -1);
  const auto v = kv.narrow(-1, parts.nope_dim, parts.v_dim);
  const auto y =
      attend(torch::cat({q.narrow(-1, 0, parts.nope_dim), q_rope}, -1), k, v, context,
             {.scale = parts.scale, .window = 0, .softcap = 0.0, .sinks = {}, .round_operands = parts.o->packs()});
  return project(parts.o, y.transpose(1, 2).reshape({batch, tokens, -1}), pass);
}

}  // namespace moiety
