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
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

constexpr int64_t kMostRows = LinearImpl::kDotRows;
constexpr int64_t kPieces = 2;       // of what is left of products, for each member
constexpr int64_t kWorksLayer = 12;  // a bound of the pieces of work in one layer

// Small tensors in f32, converted for this token where a model holds them in another type.
class Floats {
 public:
  void begin() { used_ = 0; }
  /// False: a tensor that cannot be read here. An undefined one is null.
  bool take(const torch::Tensor& t, const float*& to) {
    to = nullptr;
    if (!t.defined()) return true;
    if (plain_f32(t)) {
      to = t.const_data_ptr<float>();
      return true;
    }
    if (!t.is_cpu() || !t.is_contiguous() || (t.scalar_type() != torch::kBFloat16 && t.scalar_type() != torch::kHalf))
      return false;
    if (used_ == kept_.size()) kept_.emplace_back();
    auto& v = kept_[used_++];
    v.resize(static_cast<size_t>(t.numel()));
    dequantize_row(format_of(t.scalar_type()), static_cast<const std::byte*>(t.const_data_ptr()), v.data(), t.numel());
    to = v.data();
    return true;
  }

 private:
  std::vector<std::vector<float>> kept_;  // one behind another moves no numbers
  size_t used_ = 0;
};

struct NormPlan {
  const float* weight = nullptr;  // null: no norm
  float offset = 0.f, eps = 0.f;
  int64_t size = 0;
  // False: a norm that is not planned.
  bool take(const std::shared_ptr<Norm>& norm, Floats& floats) {
    if (!norm) return true;
    const auto* rms = dynamic_cast<const RmsNorm*>(norm.get());
    if (rms == nullptr || rms->weight.dim() != 1 || !floats.take(rms->weight, weight)) return false;
    offset = static_cast<float>(rms->offset());
    eps = static_cast<float>(rms->eps());
    size = rms->weight.size(0);
    return true;
  }
  void run(const float* x, float* out, int64_t n) const { rms_norm(x, weight, offset, eps, out, n); }
};

// A matrix as products read it: packed blocks, or plain numbers as they lie.
struct Rows {
  const PackedMatrix* packed = nullptr;
  PlainRows plain;
  int64_t out = 0, in = 0;
  ActivationKind kind() const { return packed == nullptr ? ActivationKind::Float : activation_kind(packed->format()); }
  int64_t groups() const { return packed_groups(out); }
};

// A matrix with the bias behind it.
struct MatrixPlan {
  LinearImpl* linear = nullptr;
  Rows rows;
  ActivationKind kind = ActivationKind::Float;
  const float* bias = nullptr;
  bool can(Linear l, Floats& floats) {
    linear = l.get();
    if (l->streamed() || !l->attached().empty()) return false;
    rows = {nullptr, {}, l->out(), l->in()};
    if (l->packs())
      kind = activation_kind(l->mapped()->format);
    else if ((rows.plain = l->plain_rows()).data == nullptr)
      return false;
    return floats.take(l->bias, bias);
  }
  bool pack(const torch::Tensor& x) {
    if (rows.plain.data != nullptr) return true;
    rows.packed = linear->packed_for(x);
    return rows.packed != nullptr;
  }
};

struct GatedPlan {
  MatrixPlan gate, up, down;
  GateTimes times = nullptr;
  bool can(const FeedForward& f, Floats& floats) {
    times = gate_times(f.act());
    return times != nullptr && !f.gate.is_empty() && gate.can(f.gate, floats) && up.can(f.up, floats) &&
           down.can(f.down, floats) && gate.bias == nullptr && up.bias == nullptr && down.bias == nullptr &&
           gate.kind == up.kind;
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
  const float* of(int64_t expert) const { return all == nullptr || expert < 0 ? nullptr : all + expert * width; }
};

struct MixturePlan {
  TopKRouter* router = nullptr;
  GatedExperts* experts = nullptr;
  StackBias gate_bias, up_bias, down_bias;
  GatedPlan shared;                    // times null: none
  const float* shared_gate = nullptr;  // [d]
  float routed_scale = 1.f, shared_scale = 1.f;
  bool can(const Mixture& m, Floats& floats) {
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
      if (!shared.can(*m.shared, floats)) return false;
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

  bool can(const Block& b, int64_t d, Floats& floats) {
    if (b.placement() == Placement::parallel || b.ffn->whole_half()) return false;
    residual = static_cast<float>(b.residual_scale());
    const auto* a = dynamic_cast<const Attention*>(b.attention.get());
    if (a == nullptr || !before_attention.take(b.before_attention, floats) ||
        !after_attention.take(b.after_attention, floats) || !before_ffn.take(b.before_ffn, floats) ||
        !after_ffn.take(b.after_ffn, floats))
      return false;
    attention = &a->parts;
    const AttentionParts& p = a->parts;
    if (!q.can(p.q, floats) || !k.can(p.k, floats) || !v.can(p.v, floats) || !o.can(p.o, floats)) return false;
    if (!q_norm.take(p.q_norm, floats) || !k_norm.take(p.k_norm, floats)) return false;
    size = p.head_dim;
    heads = p.q->out() / size;
    kv_heads = p.k->out() / size;
    if (p.v->out() != p.k->out() || p.q->in() != d || p.o->out() != d) return false;
    if (q_norm.weight != nullptr && q_norm.size != (p.norm_all_heads ? p.q->out() : size)) return false;
    if (k_norm.weight != nullptr && k_norm.size != (p.norm_all_heads ? p.k->out() : size)) return false;
    if (!floats.take(p.options.sinks, sinks)) return false;
    if (const auto* f = dynamic_cast<const FeedForward*>(b.ffn.get())) return dense.can(*f, floats);
    const auto* m = dynamic_cast<const Mixture*>(b.ffn.get());
    is_mixture = m != nullptr;
    return is_mixture && mixture.can(*m, floats);
  }

  // Whether some matrix is of plain numbers.
  bool plain() const {
    const auto is = [](const MatrixPlan& m) { return m.linear != nullptr && m.kind == ActivationKind::Float; };
    const GatedPlan& gated = is_mixture ? mixture.shared : dense;
    return is(q) || is(k) || is(v) || is(o) || is(gated.gate) || is(gated.up) || is(gated.down);
  }
  bool pack(const torch::Tensor& x) {
    if (!q.pack(x) || !k.pack(x) || !v.pack(x) || !o.pack(x)) return false;
    return is_mixture ? mixture.shared.times == nullptr || mixture.shared.pack(x) : dense.pack(x);
  }
};

// Rows of activations for a product: in 8 bits, or beside plain numbers as they are, one behind another.
struct Input {
  const QuantizedTiles* tiles = nullptr;
  const float* x = nullptr;
  int64_t count = 0;
};

// Rows of one gated layer that run together: all rows, or those that chose an expert.
struct Unit {
  Rows gate, up, down;
  const GateTimes* times;
  int64_t count;                    // pairs
  int64_t begin = 0, expert = -1;   // its first pair; which expert it is, if it is one
  const int64_t* tokens = nullptr;  // [count], null: pair i is row i
  int64_t width = 0, between = 0;   // where its rows of that width stand in the buffers of gate and up
  Input x;
};

struct Job {
  Rows matrix;
  Input x;
  float* y;
  int64_t stride;
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
  std::vector<Job> jobs;
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

  Input input(Own& own, const Rows& m) {
    if (m.packed == nullptr) return {nullptr, own.source, rows_};
    return {own.tiles.get(m.packed->format(), rows_, m.in, [&](QuantizedTiles& t) {
      for (int64_t i = 0; i < t.tiles(); ++i) t.fill(i, own.source, m.in);
    })};
  }

  // Most groups of rows belong to a member from the start, side by side in memory; the rest go to who is through first.
  struct Share {
    int64_t groups = 0, each;
    Share(const std::vector<Job>& jobs, int64_t members) {
      for (const Job& j : jobs) groups += j.matrix.groups();
      each = groups * 4 / (5 * members);
    }
  };

  static void product(const Job& j, int64_t first, int64_t last) {
    const Rows& m = j.matrix;
    if (m.packed != nullptr)
      packed_products(m.packed->format(), m.packed->data(), m.out, m.in, first, last, *j.x.tiles, j.y, j.stride);
    else
      plain_products(m.plain, m.in, first * kPackedRows, std::min(last * kPackedRows, m.out), j.x.x, j.x.count, j.y,
                     j.stride);
  }

  static void part(const std::vector<Job>& jobs, int64_t first, int64_t last) {
    int64_t at = 0;
    for (const Job& j : jobs) {
      const int64_t n = j.matrix.groups(), a = std::max(first, at), b = std::min(last, at + n);
      if (a < b) product(j, a - at, b - at);
      at += n;
    }
  }

  // Runs the jobs together with the other members.
  static void products(Team::Member& m, const std::vector<Job>& jobs) {
    const Share share(jobs, m.count());
    part(jobs, m.index() * share.each, (m.index() + 1) * share.each);
    const int64_t begin = share.each * m.count(), rest = share.groups - begin;
    for (int64_t first = 0, last = 0; m.take(rest, rest / (m.count() * kPieces), first, last);)
      part(jobs, begin + first, begin + last);
    m.next();
    m.wait();
  }

  // Asks for the memory that this member's share of the jobs begins with: it arrives while members wait.
  static void soon(Team::Member& m, const std::vector<Job>& jobs) {
    int64_t at = m.index() * Share(jobs, m.count()).each;
    for (const Job& j : jobs) {
      if (at < j.matrix.groups()) {
        const PackedMatrix* packed = j.matrix.packed;
        if (packed != nullptr) packed_prefetch(packed->format(), packed->data(), packed->cols(), at);
        return;
      }
      at -= j.matrix.groups();
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
    own.jobs.push_back({l.q.rows, input(own, l.q.rows), shared_->q.data(), l.q.rows.out});
    own.jobs.push_back({l.k.rows, input(own, l.k.rows), shared_->k.data(), l.k.rows.out});
    own.jobs.push_back({l.v.rows, input(own, l.v.rows), shared_->v.data(), l.v.rows.out});
    products(m, own.jobs);

    own.jobs.clear();
    own.jobs.push_back({l.o.rows, {}, shared_->out.data(), d_});
    soon(m, own.jobs);
    for (int64_t i = 0, end = 0; m.take(rows_ * l.kv_heads, 1, i, end);)
      attend_head(own, l, i / l.kv_heads, i % l.kv_heads);
    m.next();
    m.wait();

    set_input(own, shared_->mixed.data());
    own.jobs[0].x = input(own, l.o.rows);
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
      add({g.gate.rows, g.up.rows, g.down.rows, &g.times, rows_}, g.up.rows.out);
    };
    const MixturePlan& mixture = l.mixture;
    if (l.is_mixture) {
      route(m, own, mixture);
      int64_t begin = 0;
      for (int64_t e = 0; e < mixture.router->experts(); ++e) {
        const int64_t count = own.place[static_cast<size_t>(e)];
        if (count == 0) continue;
        Unit u{{}, {}, {}, &mixture.experts->times(), count};
        u.expert = e;
        u.tokens = own.tokens.data() + begin;
        add(u, mixture.experts->up->out());
        begin += count;
      }
      if (mixture.shared.times != nullptr) all_rows(mixture.shared);
      gather(m, own, mixture);
    } else {
      all_rows(l.dense);
      own.units[0].x = input(own, l.dense.gate.rows);
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
      const Input rows = u.down.packed == nullptr ? Input{nullptr, shared_->gate.data() + u.between, u.count}
                                                  : Input{&shared_->between[static_cast<size_t>(i)]};
      own.jobs.push_back({u.down, rows, shared_->pairs.data() + u.begin * d_, d_});
    }
    soon(m, own.jobs);
    for (int64_t i = 0, end = 0; m.take(units, 1, i, end);) {
      const Unit& u = own.units[static_cast<size_t>(i)];
      float *g = shared_->gate.data() + u.between, *up = shared_->up.data() + u.between;
      add_bias(mixture.gate_bias.of(u.expert), u.count, u.width, g);
      add_bias(mixture.up_bias.of(u.expert), u.count, u.width, up);
      (*u.times)(g, up, u.count * u.width);
      if (u.down.packed == nullptr) continue;
      QuantizedTiles& t = shared_->between[static_cast<size_t>(i)];
      t.resize(u.down.kind(), u.count, u.width);
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
      return Rows{packed, {}, s->out(), s->in()};
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
        t.resize(u.gate.kind(), u.count, d_);
        for (int64_t tile = 0; tile < t.tiles(); ++tile) t.fill(tile, own.source, d_, u.tokens);
      }
      m.next();
      m.wait();
    }
    for (int64_t i = 0; i < units; ++i) {
      Unit& u = own.units[static_cast<size_t>(i)];
      u.x = rows_ == 1 || u.tokens == nullptr ? input(own, u.gate) : Input{&shared_->in[static_cast<size_t>(i)]};
    }
  }

  // What the mixture gives row b.
  const float* sum(Own& own, const MixturePlan& p, int64_t b) {
    const int64_t k = p.router->options.top_k;
    own.parts.clear();
    own.scales.clear();
    float* biased = room(own.biased, k * d_);
    for (const Unit& u : own.units) {
      const float* bias = p.down_bias.of(u.expert);
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
  if (x.size(1) != 1 || x.size(0) > kMostRows || blocks.empty() || !x.is_cpu() || pass.cache == nullptr ||
      pass.training || pass.trace != nullptr || !pass.edits.empty() || pass.recompute_blocks)
    return {};
  if (torch::GradMode::is_enabled() || !may_shorten({}) || context.padded()) return {};
  if (x.scalar_type() != torch::kFloat32 && x.scalar_type() != torch::kBFloat16) return {};
  const int64_t d = x.size(2);
  static thread_local std::vector<LayerPlan> layers;
  static thread_local Floats floats;
  layers.assign(blocks.size(), LayerPlan());
  floats.begin();
  // Experts that are left on disk run by modules, with the same bits as those in memory: beside plain numbers, which
  // modules round and add up in other ways, mixtures are left to them.
  bool plain = x.scalar_type() != torch::kFloat32, mixtures = false;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!layers[i].can(*blocks[i], d, floats)) return {};
    plain = plain || layers[i].plain();
    mixtures = mixtures || layers[i].is_mixture;
    if (plain && (mixtures || x.size(0) > kPlainRows)) return {};
  }
  const auto rows = x.to(torch::kFloat32).contiguous();
  for (LayerPlan& l : layers)
    if (!l.pack(rows)) return {};
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
  return TokenRun(layers, rows).run().to(x.scalar_type());
}

}  // namespace moiety
