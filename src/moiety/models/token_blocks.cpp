#include "moiety/models/token_blocks.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/kernels/swiglu.h"
#include "moiety/kernels/token.h"
#include "moiety/models/decoder.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/packed_gated.h"
#include "moiety/nn/shortcut.h"
#include "moiety/nn/team.h"

namespace moiety {
namespace {

constexpr int64_t kMostRows = LinearImpl::kDotRows;
constexpr int64_t kPieces = 2;       // of what is left of products, for each member
constexpr int64_t kWorksLayer = 12;  // a bound of the pieces of work in one layer

struct NormPlan {
  const float* weight = nullptr;  // null: no norm
  float offset = 0.f, eps = 0.f;
  int64_t size = 0;
  // False: a norm that is not planned.
  bool take(const std::shared_ptr<Norm>& norm) {
    if (!norm) return true;
    const auto* rms = dynamic_cast<const RmsNorm*>(norm.get());
    if (rms == nullptr || rms->weight.dim() != 1 || !plain_f32(rms->weight)) return false;
    weight = rms->weight.const_data_ptr<float>();
    offset = static_cast<float>(rms->offset());
    eps = static_cast<float>(rms->eps());
    size = rms->weight.size(0);
    return true;
  }
  void run(const float* x, float* out, int64_t n) const { rms_norm(x, weight, offset, eps, out, n); }
};

// A matrix with the bias behind it.
struct MatrixPlan {
  LinearImpl* linear = nullptr;
  const PackedMatrix* packed = nullptr;
  const float* bias = nullptr;
  bool can(Linear l) {
    linear = l.get();
    if (!l->packs() || l->streamed() || !l->attached().empty()) return false;
    if (!l->bias.defined()) return true;
    if (!plain_f32(l->bias)) return false;
    bias = l->bias.const_data_ptr<float>();
    return true;
  }
  bool pack(const torch::Tensor& x) {
    packed = linear->packed_for(x);
    return packed != nullptr;
  }
};

// Products of both take the same activations.
bool alike(const Linear& a, const Linear& b) {
  return activation_kind(a->mapped()->format) == activation_kind(b->mapped()->format);
}

struct GatedPlan {
  MatrixPlan gate, up, down;
  GateTimes times = nullptr;
  bool can(const FeedForward& f) {
    times = gate_times(f.act());
    return times != nullptr && !f.gate.is_empty() && gate.can(f.gate) && up.can(f.up) && down.can(f.down) &&
           gate.bias == nullptr && up.bias == nullptr && down.bias == nullptr && alike(f.gate, f.up);
  }
  bool pack(const torch::Tensor& x) { return gate.pack(x) && up.pack(x) && down.pack(x); }
};

// Biases of all experts' rows of one kind.
struct StackBias {
  const float* all = nullptr;  // [E, width], null: none
  int64_t width = 0;
  bool take(const LinearStack& s) {
    width = s->out();
    if (!s->bias.defined()) return true;
    if (!plain_f32(s->bias)) return false;
    all = s->bias.const_data_ptr<float>();
    return true;
  }
  const float* of(int64_t expert) const { return all == nullptr ? nullptr : all + expert * width; }
};

struct MixturePlan {
  TopKRouter* router = nullptr;
  GatedExperts* experts = nullptr;
  StackBias gate_bias, up_bias, down_bias;
  GatedPlan shared;                    // times null: none
  const float* shared_gate = nullptr;  // [d]
  float routed_scale = 1.f, shared_scale = 1.f;
  bool can(const Mixture& m) {
    router = dynamic_cast<TopKRouter*>(m.router.get());
    experts = dynamic_cast<GatedExperts*>(m.experts.get());
    if (router == nullptr || experts == nullptr || m.bias.defined() || m.expert_map.defined() ||
        m.capacity_factor > 0.0 || !router->chooses_by_rows())
      return false;
    if (!router->projection->by_dots()) return false;
    if (experts->times() == nullptr || experts->adapted()) return false;
    if (!gate_bias.take(experts->gate) || !up_bias.take(experts->up) || !down_bias.take(experts->down)) return false;
    const auto gate = experts->gate->packed_kinds(), up = experts->up->packed_kinds();
    if (!gate || !up || !experts->down->packed_kinds() || *gate != *up) return false;
    if (static_cast<int64_t>(gate->size()) != router->experts()) return false;
    if (m.shared) {
      if (!shared.can(*m.shared)) return false;
      if (!m.shared_gate.is_empty()) {
        if (!m.shared_gate->by_dots() || m.shared_gate->bias.defined()) return false;
        shared_gate = m.shared_gate->weight.const_data_ptr<float>();
      }
    }
    routed_scale = static_cast<float>(m.routed_scale);
    shared_scale = static_cast<float>(m.shared_scale);
    return true;
  }
};

struct LayerPlan {
  NormPlan before_attention, after_attention, before_ffn, after_ffn, q_norm, k_norm;
  float residual = 1.f;
  const AttentionParts* attention = nullptr;
  MatrixPlan q, k, v, o;
  int64_t heads = 0, kv_heads = 0, size = 0;
  const float *cosine = nullptr, *sine = nullptr, *sinks = nullptr;
  int64_t half = 0, angle_stride = 0;
  GatedPlan dense;  // or
  MixturePlan mixture;
  bool is_mixture = false;
  CachePlace held_k, held_v;  // the new position included

  bool can(const Block& b, int64_t d) {
    if (b.placement() == Placement::parallel || b.ffn->whole_half()) return false;
    residual = static_cast<float>(b.residual_scale());
    const auto* a = dynamic_cast<const Attention*>(b.attention.get());
    if (a == nullptr || !before_attention.take(b.before_attention) || !after_attention.take(b.after_attention) ||
        !before_ffn.take(b.before_ffn) || !after_ffn.take(b.after_ffn))
      return false;
    attention = &a->parts;
    const AttentionParts& p = a->parts;
    if (!q.can(p.q) || !k.can(p.k) || !v.can(p.v) || !o.can(p.o)) return false;
    if (!q_norm.take(p.q_norm) || !k_norm.take(p.k_norm)) return false;
    size = p.head_dim;
    heads = p.q->out() / size;
    kv_heads = p.k->out() / size;
    if (p.v->out() != p.k->out() || p.q->in() != d || p.o->out() != d) return false;
    if (q_norm.weight != nullptr && q_norm.size != (p.norm_all_heads ? p.q->out() : size)) return false;
    if (k_norm.weight != nullptr && k_norm.size != (p.norm_all_heads ? p.k->out() : size)) return false;
    if (p.options.sinks.defined()) {
      if (!plain_f32(p.options.sinks)) return false;
      sinks = p.options.sinks.const_data_ptr<float>();
    }
    if (const auto* f = dynamic_cast<const FeedForward*>(b.ffn.get())) return dense.can(*f);
    const auto* m = dynamic_cast<const Mixture*>(b.ffn.get());
    is_mixture = m != nullptr;
    return is_mixture && mixture.can(*m);
  }

  bool pack(const torch::Tensor& x) {
    if (!q.pack(x) || !k.pack(x) || !v.pack(x) || !o.pack(x)) return false;
    return is_mixture ? mixture.shared.times == nullptr || mixture.shared.pack(x) : dense.pack(x);
  }
};

// Rows of one gated layer that run together: all rows, or those that chose an expert.
struct Unit {
  const PackedMatrix *gate, *up, *down;
  const GateTimes* times;
  int64_t count;                   // pairs
  int64_t begin = 0, expert = -1;  // its first pair; which expert it is, if it is one
  const float *gate_bias = nullptr, *up_bias = nullptr;
  const int64_t* tokens = nullptr;  // [count], null: pair i is row i
  int64_t width = 0, between = 0;   // where its rows of that width stand in the buffers of gate and up
  const QuantizedTiles* x = nullptr;
};

// What all members write to and read from.
struct Shared {
  std::vector<float> q, k, v, mixed, out, logits, gate, up, pairs;
  std::vector<QuantizedTiles> in, between;  // by unit
};

// What a member has to itself: every member follows the rows of the residual stream on its own, so that nobody waits
// for them.
struct Own {
  std::vector<float> x, h, y, scratch, heads, fresh, row, scores, gates, pair_gates, scales, biased;
  std::vector<const float*> parts;
  std::vector<int64_t> chosen, tokens, place;
  std::vector<Unit> units;
  std::vector<PackedJob> jobs;
  TilesByKind tiles;
  const float* source = nullptr;
};

template <class T>
T* room(std::vector<T>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(static_cast<size_t>(n));
  return v.data();
}

class TokenRun {
 public:
  TokenRun(std::vector<LayerPlan>& layers, const torch::Tensor& x)
      : layers_(layers), input_(x), rows_(x.size(0)), d_(x.size(2)), result_(torch::empty_like(x)) {
    static thread_local Shared shared;
    shared_ = &shared;
    for (const LayerPlan& l : layers_) {
      room(shared.q, rows_ * l.heads * l.size);
      room(shared.mixed, rows_ * l.heads * l.size);
      room(shared.k, rows_ * l.kv_heads * l.size);
      room(shared.v, rows_ * l.kv_heads * l.size);
      int64_t pairs = rows_, wide = 0, units = 1;
      if (l.is_mixture) {
        const int64_t k = l.mixture.router->options.top_k, n = l.mixture.router->experts();
        room(shared.logits, rows_ * n);
        wide = rows_ * k * l.mixture.experts->up->out();
        if (l.mixture.shared.times != nullptr) wide += rows_ * l.mixture.shared.up.linear->out();
        pairs = rows_ * (k + 1);
        units = std::min(n, rows_ * k) + 1;
      } else {
        wide = rows_ * l.dense.up.linear->out();
      }
      room(shared.gate, wide);
      room(shared.up, wide);
      room(shared.pairs, pairs * d_);
      room(shared.in, units);
      room(shared.between, units);
    }
    room(shared.out, rows_ * d_);
  }

  torch::Tensor run() {
    Team team(static_cast<int64_t>(layers_.size()) * kWorksLayer);
    team.run([this](Team::Member& m) { member(m); });
    return result_;
  }

 private:
  void member(Team::Member& m) {
    static thread_local Own own;
    float* x = room(own.x, rows_ * d_);
    std::copy_n(input_.const_data_ptr<float>(), rows_ * d_, x);
    room(own.h, rows_ * d_);
    room(own.y, rows_ * d_);
    for (const LayerPlan& l : layers_) {
      attend(m, own, l);
      feed(m, own, l);
    }
    if (m.index() == 0) std::copy_n(x, rows_ * d_, result_.data_ptr<float>());
  }

  // The rows that the next products take: [rows, n].
  void set_input(Own& own, const float* x) {
    own.source = x;
    own.tiles.forget();
  }

  const QuantizedTiles* input(Own& own, const PackedMatrix& m) {
    return own.tiles.get(m.format(), rows_, m.cols(), [&](QuantizedTiles& t) {
      for (int64_t i = 0; i < t.tiles(); ++i) t.fill(i, own.source, m.cols());
    });
  }

  // Most groups of rows belong to a member from the start, side by side in memory; the rest go to who is through first.
  struct Share {
    int64_t groups = 0, each;
    Share(const std::vector<PackedJob>& jobs, int64_t members) {
      for (const PackedJob& j : jobs) groups += j.matrix->groups();
      each = groups * 4 / (5 * members);
    }
  };

  static void part(const std::vector<PackedJob>& jobs, int64_t first, int64_t last) {
    int64_t at = 0;
    for (const PackedJob& j : jobs) {
      const int64_t n = j.matrix->groups(), a = std::max(first, at), b = std::min(last, at + n);
      if (a < b)
        packed_products(j.matrix->format(), j.matrix->data(), j.matrix->rows(), j.matrix->cols(), a - at, b - at, *j.x,
                        j.y, j.stride);
      at += n;
    }
  }

  // Runs the jobs together with the other members.
  static void products(Team::Member& m, const std::vector<PackedJob>& jobs) {
    const Share share(jobs, m.count());
    part(jobs, m.index() * share.each, (m.index() + 1) * share.each);
    const int64_t begin = share.each * m.count(), rest = share.groups - begin;
    for (int64_t first = 0, last = 0; m.take(rest, rest / (m.count() * kPieces), first, last);)
      part(jobs, begin + first, begin + last);
    m.next();
    m.wait();
  }

  // Asks for the memory that this member's share of the jobs begins with: it arrives while members wait.
  static void soon(Team::Member& m, const std::vector<PackedJob>& jobs) {
    int64_t at = m.index() * Share(jobs, m.count()).each;
    for (const PackedJob& j : jobs) {
      if (at < j.matrix->groups()) return packed_prefetch(j.matrix->format(), j.matrix->data(), j.matrix->cols(), at);
      at -= j.matrix->groups();
    }
  }

  // One head of a row of q or k, ready to be attended with: bias, norms, clip and rotation as the module has them.
  void prepare(Own& own, const LayerPlan& l, const MatrixPlan& matrix, const NormPlan& norm, const float* row,
               int64_t heads, int64_t head, int64_t b, float* out) {
    const AttentionParts& p = *l.attention;
    const int64_t n = l.size;
    const float* from = row + head * n;
    float* whole = room(own.row, heads * n + n);
    if (p.norm_all_heads && norm.weight != nullptr) {
      for (int64_t i = 0; i < heads * n; ++i) whole[i] = row[i] + (matrix.bias ? matrix.bias[i] : 0.f);
      norm.run(whole, whole, heads * n);
      from = whole + head * n;
    } else if (matrix.bias != nullptr) {
      for (int64_t i = 0; i < n; ++i) whole[i] = from[i] + matrix.bias[head * n + i];
      from = whole;
    }
    float* temporary = whole + heads * n;
    if (p.clip > 0.0) {
      clip(from, static_cast<float>(p.clip), temporary, n);
      from = temporary;
    }
    const bool by_head = norm.weight != nullptr && !p.norm_all_heads;
    if (by_head && !p.norm_after_rope) {
      norm.run(from, temporary, n);
      from = temporary;
    }
    if (l.cosine != nullptr)
      rotate_head(from, l.cosine + b * l.angle_stride, l.sine + b * l.angle_stride, l.half, p.rope->interleaved(), out,
                  n);
    else
      std::copy_n(from, n, out);
    if (by_head && p.norm_after_rope) norm.run(out, out, n);
  }

  static void clip(const float* x, float limit, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::clamp(x[i], -limit, limit);
  }

  void attend(Team::Member& m, Own& own, const LayerPlan& l) {
    float* x = own.x.data();
    normed(own, l.before_attention);
    own.jobs.clear();
    own.jobs.push_back({l.q.packed, input(own, *l.q.packed), shared_->q.data(), l.q.packed->rows()});
    own.jobs.push_back({l.k.packed, input(own, *l.k.packed), shared_->k.data(), l.k.packed->rows()});
    own.jobs.push_back({l.v.packed, input(own, *l.v.packed), shared_->v.data(), l.v.packed->rows()});
    products(m, own.jobs);

    own.jobs.clear();
    own.jobs.push_back({l.o.packed, nullptr, shared_->out.data(), d_});
    soon(m, own.jobs);
    for (int64_t i = 0, end = 0; m.take(rows_ * l.kv_heads, 1, i, end);)
      attend_head(own, l, i / l.kv_heads, i % l.kv_heads);
    m.next();
    m.wait();

    set_input(own, shared_->mixed.data());
    own.jobs[0].x = input(own, *l.o.packed);
    products(m, own.jobs);
    for (int64_t b = 0; b < rows_; ++b) {
      const float* a = shared_->out.data() + b * d_;
      float* y = own.y.data() + b * d_;
      if (l.o.bias != nullptr) {
        for (int64_t i = 0; i < d_; ++i) y[i] = a[i] + l.o.bias[i];
        a = y;
      }
      if (l.after_attention.weight != nullptr) {
        l.after_attention.run(a, y, d_);
        a = y;
      }
      for (int64_t i = 0; i < d_; ++i) x[b * d_ + i] += l.residual * a[i];
    }
  }

  void attend_head(Own& own, const LayerPlan& l, int64_t b, int64_t j) {
    const AttentionParts& p = *l.attention;
    const int64_t n = l.size, groups = l.heads / l.kv_heads;
    float* heads = room(own.heads, groups * n);
    for (int64_t g = 0; g < groups; ++g)
      prepare(own, l, l.q, l.q_norm, shared_->q.data() + b * l.heads * n, l.heads, j * groups + g, b, heads + g * n);
    const int64_t key_bytes = row_bytes(l.held_k.format, n), value_bytes = row_bytes(l.held_v.format, n);
    float* key = room(own.fresh, 2 * n);
    float* value = key + n;
    prepare(own, l, l.k, l.k_norm, shared_->k.data() + b * l.kv_heads * n, l.kv_heads, j, b, key);
    const float* from = shared_->v.data() + (b * l.kv_heads + j) * n;
    for (int64_t i = 0; i < n; ++i) value[i] = from[i] + (l.v.bias ? l.v.bias[j * n + i] : 0.f);
    if (p.clip > 0.0) clip(value, static_cast<float>(p.clip), value, n);
    quantize_row(l.held_k.format, key, l.held_k.at(b, j) + (l.held_k.length - 1) * key_bytes, n);
    quantize_row(l.held_v.format, value, l.held_v.at(b, j) + (l.held_k.length - 1) * value_bytes, n);
    const int64_t first = p.options.window > 0 ? std::max<int64_t>(0, l.held_k.length - p.options.window) : 0;
    AttendRow a{};
    a.q = heads;
    a.k = l.held_k.at(b, j) + first * key_bytes;
    a.v = l.held_v.at(b, j) + first * value_bytes;
    a.k_format = l.held_k.format;
    a.v_format = l.held_v.format;
    a.heads = groups;
    a.size = a.v_size = n;
    a.length = l.held_k.length - first;
    a.scale = static_cast<float>(p.options.scale);
    a.softcap = static_cast<float>(p.options.softcap);
    a.sinks = l.sinks == nullptr ? nullptr : l.sinks + j * groups;
    attend_row(a, room(own.scratch, attend_scratch(a)), shared_->mixed.data() + (b * l.heads + j * groups) * n);
  }

  // The residual stream through a norm becomes the input of products.
  void normed(Own& own, const NormPlan& norm) {
    if (norm.weight == nullptr) return set_input(own, own.x.data());
    for (int64_t b = 0; b < rows_; ++b) norm.run(own.x.data() + b * d_, own.h.data() + b * d_, d_);
    set_input(own, own.h.data());
  }

  void feed(Team::Member& m, Own& own, const LayerPlan& l) {
    normed(own, l.before_ffn);
    own.units.clear();
    int64_t pairs = 0, wide = 0;
    const auto add = [&](Unit u, int64_t width) {
      u.begin = pairs;
      u.between = wide;
      u.width = width;
      own.units.push_back(u);
      pairs += u.count;
      wide += u.count * width;
    };
    const auto all_rows = [&](const GatedPlan& g) {
      add({g.gate.packed, g.up.packed, g.down.packed, &g.times, rows_}, g.up.packed->rows());
    };
    const MixturePlan& mixture = l.mixture;
    if (l.is_mixture) {
      route(m, own, mixture);
      int64_t begin = 0;
      for (int64_t e = 0; e < mixture.router->experts(); ++e) {
        const int64_t count = own.place[static_cast<size_t>(e)];
        if (count == 0) continue;
        Unit u{nullptr, nullptr, nullptr, &mixture.experts->times(), count};
        u.expert = e;
        u.gate_bias = mixture.gate_bias.of(e);
        u.up_bias = mixture.up_bias.of(e);
        u.tokens = own.tokens.data() + begin;
        add(u, mixture.experts->up->out());
        begin += count;
      }
      if (mixture.shared.times != nullptr) all_rows(mixture.shared);
      gather(m, own, mixture);
    } else {
      all_rows(l.dense);
      own.units[0].x = input(own, *l.dense.gate.packed);
    }

    own.jobs.clear();
    for (const Unit& u : own.units) {
      own.jobs.push_back({u.gate, u.x, shared_->gate.data() + u.between, u.width});
      own.jobs.push_back({u.up, u.x, shared_->up.data() + u.between, u.width});
    }
    products(m, own.jobs);

    const auto units = static_cast<int64_t>(own.units.size());
    own.jobs.clear();
    for (int64_t i = 0; i < units; ++i) {
      const Unit& u = own.units[static_cast<size_t>(i)];
      own.jobs.push_back({u.down, &shared_->between[static_cast<size_t>(i)], shared_->pairs.data() + u.begin * d_, d_});
    }
    soon(m, own.jobs);
    for (int64_t i = 0, end = 0; m.take(units, 1, i, end);) {
      const Unit& u = own.units[static_cast<size_t>(i)];
      float *g = shared_->gate.data() + u.between, *up = shared_->up.data() + u.between;
      add_bias(u.gate_bias, u.count, u.width, g);
      add_bias(u.up_bias, u.count, u.width, up);
      (*u.times)(g, up, u.count * u.width);
      QuantizedTiles& t = shared_->between[static_cast<size_t>(i)];
      t.resize(activation_kind(u.down->format()), u.count, u.width);
      for (int64_t tile = 0; tile < t.tiles(); ++tile) t.fill(tile, g, u.width);
    }
    m.next();
    m.wait();
    products(m, own.jobs);
    for (int64_t b = 0; b < rows_; ++b) {
      const float* f = l.is_mixture ? sum(own, mixture, b) : shared_->pairs.data() + b * d_;
      if (l.after_ffn.weight != nullptr) {
        float* y = own.y.data() + b * d_;
        l.after_ffn.run(f, y, d_);
        f = y;
      }
      float* x = own.x.data() + b * d_;
      for (int64_t i = 0; i < d_; ++i) x[i] += l.residual * f[i];
    }
  }

  // Chooses experts for all rows and sorts the pairs by expert: own.place [E] counts, own.tokens and own.pair_gates by
  // pair.
  void route(Team::Member& m, Own& own, const MixturePlan& p) {
    const int64_t n = p.router->experts(), k = p.router->options.top_k;
    float* logits = shared_->logits.data();
    for (int64_t first = 0, last = 0; m.take(n, n / (2 * m.count()), first, last);)
      for (int64_t b = 0; b < rows_; ++b) p.router->row_logits(own.source + b * d_, first, last, logits + b * n);
    m.next();
    m.wait();
    int64_t* chosen = room(own.chosen, rows_ * k);
    float* gates = room(own.gates, rows_ * k);
    for (int64_t b = 0; b < rows_; ++b)
      p.router->choose_row(logits + b * n, room(own.scores, n), chosen + b * k, gates + b * k);
    own.place.assign(static_cast<size_t>(n), 0);
    room(own.tokens, rows_ * k);
    room(own.pair_gates, rows_ * k);
    for (int64_t i = 0; i < rows_ * k; ++i) ++own.place[static_cast<size_t>(chosen[i])];
    int64_t pair = 0;
    for (int64_t e = 0; e < n; ++e)
      for (int64_t i = 0; own.place[static_cast<size_t>(e)] > 0 && i < rows_ * k; ++i)
        if (chosen[i] == e) {
          own.tokens[static_cast<size_t>(pair)] = i / k;
          own.pair_gates[static_cast<size_t>(pair++)] = gates[i];
        }
  }

  // The packed matrices of the chosen experts, and the rows that each takes in 8 bits. One row is the same for all of
  // them.
  void gather(Team::Member& m, Own& own, const MixturePlan& p) {
    const auto units = static_cast<int64_t>(own.units.size());
    GatedExperts& all = *p.experts;
    const auto matrix = [&](LinearStack& s, int64_t e) {
      const PackedMatrix* packed = s->matrices()[static_cast<size_t>(e)]->packed_for(input_);
      check(packed != nullptr, "a matrix of expert {} cannot be packed", e);
      return packed;
    };
    // What is not packed yet is packed by who comes first: each begins with experts of its own.
    for (int64_t i = 0; i < units; ++i) {
      Unit& u = own.units[static_cast<size_t>((i + m.index() * units / m.count()) % units)];
      if (u.expert < 0) continue;
      u.gate = matrix(all.gate, u.expert);
      u.up = matrix(all.up, u.expert);
      u.down = matrix(all.down, u.expert);
    }
    if (rows_ > 1) {
      for (int64_t i = 0, end = 0; m.take(units, 1, i, end);) {
        const Unit& u = own.units[static_cast<size_t>(i)];
        if (u.tokens == nullptr) continue;
        QuantizedTiles& t = shared_->in[static_cast<size_t>(i)];
        t.resize(activation_kind(u.gate->format()), u.count, d_);
        for (int64_t tile = 0; tile < t.tiles(); ++tile) t.fill(tile, own.source, d_, u.tokens);
      }
      m.next();
      m.wait();
    }
    for (int64_t i = 0; i < units; ++i) {
      Unit& u = own.units[static_cast<size_t>(i)];
      u.x = rows_ == 1 || u.tokens == nullptr ? input(own, *u.gate) : &shared_->in[static_cast<size_t>(i)];
    }
  }

  // What the mixture gives row b.
  const float* sum(Own& own, const MixturePlan& p, int64_t b) {
    const int64_t k = p.router->options.top_k;
    own.parts.clear();
    own.scales.clear();
    float* biased = room(own.biased, k * d_);
    for (const Unit& u : own.units) {
      const float* bias = u.expert < 0 ? nullptr : p.down_bias.of(u.expert);
      for (int64_t pair = u.begin; u.expert >= 0 && pair < u.begin + u.count; ++pair) {
        if (own.tokens[static_cast<size_t>(pair)] != b) continue;
        const float* part = shared_->pairs.data() + pair * d_;
        if (bias != nullptr) {
          for (int64_t i = 0; i < d_; ++i) biased[i] = part[i] + bias[i];
          part = biased;
          biased += d_;
        }
        own.parts.push_back(part);
        own.scales.push_back(own.pair_gates[static_cast<size_t>(pair)]);
      }
    }
    float* y = own.y.data() + b * d_;
    weighted_sum(own.parts.data(), own.scales.data(), k, y, d_);
    if (p.routed_scale != 1.f)
      for (int64_t i = 0; i < d_; ++i) y[i] *= p.routed_scale;
    if (p.shared.times != nullptr) {
      float scale = p.shared_scale;
      if (p.shared_gate != nullptr) {
        float z = 0.f;
        rows_times(p.shared_gate, 1, d_, own.source + b * d_, &z);
        scale /= 1.f + std::exp(-z);
      }
      const float* s = shared_->pairs.data() + (rows_ * k + b) * d_;
      for (int64_t i = 0; i < d_; ++i) y[i] += scale * s[i];
    }
    return y;
  }

  std::vector<LayerPlan>& layers_;
  const torch::Tensor& input_;
  int64_t rows_, d_;
  torch::Tensor result_;
  Shared* shared_;
};

}  // namespace

torch::Tensor run_token_blocks(const std::vector<std::shared_ptr<Block>>& blocks, const torch::Tensor& x,
                               const AttentionContext& context, Pass& pass) {
  if (x.size(1) != 1 || x.size(0) > kMostRows || blocks.empty() || !plain_f32(x) || pass.cache == nullptr ||
      pass.training || pass.trace != nullptr || !pass.edits.empty() || pass.recompute_blocks)
    return {};
  if (torch::GradMode::is_enabled() || !may_shorten({}) || context.padded()) return {};
  const int64_t d = x.size(2);
  static thread_local std::vector<LayerPlan> layers;
  layers.assign(blocks.size(), LayerPlan());
  for (size_t i = 0; i < blocks.size(); ++i)
    if (!layers[i].can(*blocks[i], d)) return {};
  for (LayerPlan& l : layers)
    if (!l.pack(x)) return {};
  for (size_t i = 0; i < blocks.size(); ++i) {
    LayerPlan& l = layers[i];
    if (l.attention->rope) {
      const auto& [cosine, sine] = context.angles(*l.attention->rope);
      l.cosine = cosine.const_data_ptr<float>();
      l.sine = sine.const_data_ptr<float>();
      l.half = l.attention->rope->dim() / 2;
      l.angle_stride = cosine.size(0) == 1 ? 0 : l.half;
    }
    std::tie(l.held_k, l.held_v) =
        pass.cache->extend_in_place(static_cast<int64_t>(i), x.size(0), l.kv_heads, 1, l.size, l.size, x.options());
  }
  return TokenRun(layers, x).run();
}

}  // namespace moiety
