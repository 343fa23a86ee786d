#include "moiety/nn/attention_tasks.h"

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/matmul.h"
#include "moiety/kernels/softmax.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/shortcut.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kQueries = 64;  // of a block
constexpr int64_t kKeys = 512;    // of a chunk, in the backward pass
// Of a tile of our products: where a block's view of the keys has a slope, rectangles keep to these.
constexpr int64_t kTileRows = kMatmulRows, kTileColumns = kMatmulColumns;

struct Range {
  int64_t first = 0, last = 0;  // [first, last)
  int64_t size() const { return std::max<int64_t>(0, last - first); }
  Range within(const Range& o) const { return {std::max(first, o.first), std::min(last, o.last)}; }
};

// Which keys a query sees.
class Sight {
 public:
  Sight(const Tensor& allowed, bool causal, int64_t tokens, int64_t length)
      : causal_(causal), tokens_(tokens), length_(length) {
    if (!allowed.defined()) return;
    allowed_ = allowed.contiguous();
    rows_.resize(static_cast<size_t>(allowed_.size(0) * tokens));
    parallel_for(0, static_cast<int64_t>(rows_.size()), std::max<int64_t>(1, 100'000 / length),
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) rows_[static_cast<size_t>(i)] = look(i);
                 });
  }

  // Between the first key and the last that query t sees; `some` [size] says which, unless null: all.
  Range row(int64_t b, int64_t t, const bool*& some) const {
    some = nullptr;
    if (!allowed_.defined()) return {0, causal_ ? t + 1 : length_};
    const int64_t i = (allowed_.size(0) == 1 ? 0 : b * tokens_) + t;
    const Row& row = rows_[static_cast<size_t>(i)];
    if (!row.all) some = mask() + i * length_ + row.range.first;
    return row.range;
  }

 private:
  struct Row {
    Range range;
    bool all = true;
  };

  const bool* mask() const { return allowed_.const_data_ptr<bool>(); }
  Row look(int64_t i) const {
    const bool* row = mask() + i * length_;
    Row r;
    const void* first = std::memchr(row, 1, static_cast<size_t>(length_));
    if (first == nullptr) return r;
    r.range.first = static_cast<const bool*>(first) - row;
    const auto eight_hidden = [&](int64_t end) {
      uint64_t bytes;
      std::memcpy(&bytes, row + end - 8, 8);
      return bytes == 0;
    };
    for (r.range.last = length_; r.range.last >= 8 && eight_hidden(r.range.last);) r.range.last -= 8;
    while (!row[r.range.last - 1]) --r.range.last;
    r.all = std::memchr(row + r.range.first, 0, static_cast<size_t>(r.range.size())) == nullptr;
    return r;
  }

  bool causal_;
  int64_t tokens_, length_;
  Tensor allowed_;
  std::vector<Row> rows_;
};

struct Rectangle {
  int64_t row, rows, key, keys;
};

// What the queries of a block see of some keys.
struct View {
  View(const Sight& sight, int64_t b, int64_t first, int64_t count, Range within) : keys{within.last, within.first} {
    for (int64_t r = 0; r < count; ++r) {
      Row& row = rows[r];
      const Range all = sight.row(b, first + r, row.seen);
      row.keys = all.within(within);
      if (row.keys.size() == 0) continue;
      if (row.seen != nullptr) row.seen += row.keys.first - all.first;
      keys = {std::min(keys.first, row.keys.first), std::max(keys.last, row.keys.last)};
    }
    Range common{0, keys.size()};  // to all of the rows
    for (int64_t r = 0; r < count; ++r) {
      Range& k = rows[r].keys;
      k = k.size() == 0 ? Range{} : Range{k.first - keys.first, k.last - keys.first};
      common = common.within(k);
    }
    for (int64_t key = 0, end; key < keys.size(); key = end) {
      int64_t top = 0, bottom = count;
      if (key >= common.first && key + kTileColumns <= common.last) {
        end = key + (common.last - key) / kTileColumns * kTileColumns;
      } else {
        end = std::min(key + kTileColumns, keys.size());
        const auto blind = [&](int64_t r) { return rows[r].keys.first >= end || rows[r].keys.last <= key; };
        while (top < bottom && blind(top)) ++top;
        while (top < bottom && blind(bottom - 1)) --bottom;
        if (top == bottom) continue;
        top -= top % kTileRows;
      }
      if (!parts.empty() && parts.back().row == top && parts.back().rows == bottom - top &&
          parts.back().key + parts.back().keys == key)
        parts.back().keys += end - key;
      else
        parts.push_back({top, bottom - top, key, end - key});
    }
  }

  struct Row {
    Range keys;        // from the first that it sees to the last, counted from the block's first
    const bool* seen;  // which of them, null: all
  };
  Range keys;  // from the first that any row sees to the last
  Row rows[kQueries];
  std::vector<Rectangle> parts;  // hold all that is seen
};

// [B, H, N, size] with features side by side.
template <class T>
struct Rows {
  explicit Rows(const Tensor& t) : data(t.defined() ? bits<T>(t) : nullptr), batch(0), head(0), stride(0), size(0) {
    if (!t.defined()) return;
    batch = t.stride(0), head = t.stride(1), stride = t.stride(2), size = t.size(3);
  }
  Bits<T>* at(int64_t b, int64_t h, int64_t n) const { return data + b * batch + h * head + n * stride; }
  MatrixView<Bits<T>> view(int64_t b, int64_t h, int64_t n, bool transposed = false) const {
    return {at(b, h, n), stride, transposed};
  }
  Bits<T>* data;
  int64_t batch, head, stride, size;
};

// Uninitialised memory of a thread, which grows and never shrinks.
template <class T>
class Room {
 public:
  T* get(int64_t n) {
    if (n > static_cast<int64_t>(data_.size())) data_.resize(static_cast<size_t>(n));
    return data_.data();
  }

 private:
  std::vector<T> data_;
};

struct Scratch {
  Room<float> scores, dp, sums, keys, values;
  Room<uint16_t> q, p, ds;
};

Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// Lines of a block lie this far apart: whole vectors, and not all in the same lines of a cache.
int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16 + 16;
}

struct Problem {
  int64_t batch, heads, shared, groups, tokens, length;
  float scale, softcap;
  Problem(const Tensor& q, const Tensor& k, double scale_, double softcap_)
      : batch(q.size(0)),
        heads(q.size(1)),
        shared(k.size(1)),
        groups(heads / shared),
        tokens(q.size(2)),
        length(k.size(2)),
        scale(static_cast<float>(scale_)),
        softcap(static_cast<float>(softcap_)) {}
  int64_t blocks() const { return (tokens + kQueries - 1) / kQueries; }
  int64_t chunks() const { return (length + kKeys - 1) / kKeys; }
  int64_t rows(int64_t block) const { return std::min(kQueries, tokens - block * kQueries); }
};

Tensor like_rows(int64_t batch, int64_t heads, int64_t tokens, int64_t size, const torch::TensorOptions& options) {
  return torch::empty_strided({batch, heads, tokens, size}, {tokens * heads * size, size, heads * size, 1}, options);
}

// `P` is the type that is multiplied in: bf16 also over f32, which is rounded block by block.
template <class T, class P>
class Forward {
 public:
  Forward(const Problem& p, const Sight& sight, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sinks,
          const Tensor& out, const Tensor& log_sums)
      : p_(p),
        sight_(sight),
        q_(q),
        k_(k),
        v_(v),
        out_(out),
        sinks_(sinks.defined() ? sinks.const_data_ptr<float>() : nullptr),
        log_sums_(log_sums.data_ptr<float>()) {}

  void run() const {
    const int64_t blocks = p_.blocks();
    // Of a head the last block first: it takes longest where the rule is causal.
    run_tasks(p_.batch * p_.heads * blocks, [&](int64_t i) {
      const int64_t head = i / blocks;
      block(head / p_.heads, head % p_.heads, blocks - 1 - i % blocks);
    });
  }

 private:
  void block(int64_t b, int64_t h, int64_t index) const {
    const int64_t first = index * kQueries, rows = p_.rows(index), shared = h / p_.groups;
    const View view(sight_, b, first, rows, {0, p_.length});
    const int64_t n = view.keys.size(), stride = padded(n), key = view.keys.first;
    Scratch& own = scratch();
    float* scores = own.scores.get(rows * stride);
    Bits<P>* p = nullptr;
    float* sums = nullptr;
    int64_t sums_stride = v_.size;
    if constexpr (std::is_same_v<P, float>)
      p = scores;
    else
      p = own.p.get(rows * stride);
    if constexpr (std::is_same_v<T, float>)
      sums = out_.at(b, h, first), sums_stride = out_.stride;
    else
      sums = own.sums.get(rows * v_.size);
    const auto q = queries(b, h, first, rows, own);
    for (const Rectangle& part : view.parts)
      matmul(part.rows, part.keys, q_.size, {q.data + part.row * q.stride, q.stride},
             k_.view(b, shared, key + part.key, true), scores + part.row * stride + part.key, stride);
    float factors[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      const auto& [range, seen] = view.rows[r];
      const int64_t from = range.first, count = range.size();
      Bits<P>* to = p + r * stride;
      const SoftmaxSums s =
          softmax_row({count, p_.scale, p_.softcap, seen}, scores + r * stride + from,
                      sinks_ != nullptr ? sinks_[h] : -std::numeric_limits<float>::infinity(), to + from);
      std::fill(to, to + from, Bits<P>{});
      std::fill(to + from + count, to + n, Bits<P>{});
      factors[r] = s.factor;
      log_sums_[(b * p_.heads + h) * p_.tokens + first + r] = s.log_sum;
    }
    const bool cleared = view.parts.empty() || view.parts[0].rows < rows;
    if (cleared)
      for (int64_t r = 0; r < rows; ++r) std::fill_n(sums + r * sums_stride, v_.size, 0.f);
    for (const Rectangle& part : view.parts)
      matmul(part.rows, v_.size, part.keys, {p + part.row * stride + part.key, stride},
             v_.view(b, shared, key + part.key), sums + part.row * sums_stride, sums_stride,
             cleared || &part != &view.parts[0]);
    for (int64_t r = 0; r < rows; ++r) scale_row(sums + r * sums_stride, factors[r], out_.at(b, h, first + r), v_.size);
  }

  // The queries of a block in the type that is multiplied in.
  MatrixView<Bits<P>> queries(int64_t b, int64_t h, int64_t first, int64_t rows, Scratch& own) const {
    if constexpr (std::is_same_v<T, P>) {
      return q_.view(b, h, first);
    } else {
      uint16_t* rounded = own.q.get(rows * q_.size);
      for (int64_t r = 0; r < rows; ++r) scale_row(q_.at(b, h, first + r), 1.f, rounded + r * q_.size, q_.size);
      return {rounded, q_.size};
    }
  }

  const Problem& p_;
  const Sight& sight_;
  Rows<T> q_, k_, v_, out_;
  const float* sinks_;
  float* log_sums_;
};

// A sum in f32 that ends in rows of T: in their place, or of bf16 beside them.
template <class T>
class Sum {
 public:
  Sum(const Rows<T>& to, int64_t b, int64_t h, int64_t first, int64_t count, Room<float>& room)
      : to_(to.data == nullptr ? nullptr : to.at(b, h, first)), stride_(to.stride), size_(to.size), count_(count) {
    if (to_ == nullptr) return;
    if constexpr (std::is_same_v<T, float>)
      data = to_, stride = stride_;
    else
      data = room.get(count * size_), stride = size_;
    for (int64_t r = 0; r < count; ++r) std::fill_n(data + r * stride, size_, 0.f);
  }
  void finish() const {
    if constexpr (!std::is_same_v<T, float>)
      if (to_ != nullptr)
        for (int64_t r = 0; r < count_; ++r) scale_row(data + r * stride, 1.f, to_ + r * stride_, size_);
  }
  float* data = nullptr;  // null: nobody asks for it
  int64_t stride = 0;

 private:
  Bits<T>* to_;
  int64_t stride_, size_, count_;
};

// The gradients of q belong to blocks of queries, those of k and v to chunks of keys. A task either does all of both
// for one row and one head of keys; or, so that many threads have work, one block or one chunk alone, which computes
// the probabilities and their gradients twice. The sums have the same terms in the same order either way.
template <class T>
class Backward {
 public:
  Backward(const Problem& p, const Sight& sight, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& dout,
           const Tensor& log_sums, const Tensor& deltas, const Tensor& dq, const Tensor& dk, const Tensor& dv)
      : p_(p),
        sight_(sight),
        q_(q),
        k_(k),
        v_(v),
        dout_(dout),
        dq_(dq),
        dk_(dk),
        dv_(dv),
        log_sums_(log_sums.const_data_ptr<float>()),
        deltas_(deltas.const_data_ptr<float>()) {}

  void run() const {
    const int64_t whole = p_.batch * p_.shared, threads = at::get_num_threads();
    const bool wants_q = dq_.data != nullptr, wants_keys = dk_.data != nullptr || dv_.data != nullptr;
    // Products: five to a whole task, three and four to its parts.
    const bool split = (whole + threads - 1) / threads * threads * 5 > whole * 7;
    if (!split) {
      run_tasks(whole, [&](int64_t i) {
        work(i / p_.shared, i % p_.shared, {0, p_.groups}, {0, p_.blocks()}, {0, p_.chunks()}, wants_q, wants_keys);
      });
      return;
    }
    const int64_t by_chunk = wants_keys ? whole * p_.chunks() : 0;
    const int64_t by_block = wants_q ? p_.batch * p_.heads * p_.blocks() : 0;
    run_tasks(by_chunk + by_block, [&](int64_t i) {
      if (i < by_chunk) {
        const int64_t head = i / p_.chunks(), chunk = i % p_.chunks();
        work(head / p_.shared, head % p_.shared, {0, p_.groups}, {0, p_.blocks()}, {chunk, chunk + 1}, false, true);
      } else {
        i -= by_chunk;
        const int64_t head = i / p_.blocks(), h = head % p_.heads, block = p_.blocks() - 1 - i % p_.blocks();
        work(head / p_.heads, h / p_.groups, {h % p_.groups, h % p_.groups + 1}, {block, block + 1}, {0, p_.chunks()},
             true, false);
      }
    });
  }

 private:
  struct Sums {
    float* data = nullptr;
    int64_t stride = 0;
  };

  void work(int64_t b, int64_t shared, Range groups, Range blocks, Range chunks, bool wants_q, bool wants_keys) const {
    Scratch& own = scratch();
    const Rows<T> none{Tensor()};
    const Range keys{chunks.first * kKeys, std::min(chunks.last * kKeys, p_.length)};
    const Sum<T> dk(wants_keys ? dk_ : none, b, shared, keys.first, keys.size(), own.keys);
    const Sum<T> dv(wants_keys ? dv_ : none, b, shared, keys.first, keys.size(), own.values);
    for (int64_t g = groups.first; g < groups.last; ++g)
      for (int64_t block = blocks.first; block < blocks.last; ++block) {
        const int64_t h = shared * p_.groups + g, first = block * kQueries, rows = p_.rows(block);
        const Sum<T> dq(wants_q ? dq_ : none, b, h, first, rows, own.sums);
        for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
          const View view(sight_, b, first, rows, {chunk * kKeys, std::min((chunk + 1) * kKeys, p_.length)});
          if (view.parts.empty()) continue;
          const auto at = [&](const Sum<T>& s) {
            return Sums{s.data == nullptr ? nullptr : s.data + (view.keys.first - keys.first) * s.stride, s.stride};
          };
          tile(b, h, first, rows, view, {dq.data, dq.stride}, at(dk), at(dv));
        }
        dq.finish();
      }
    dk.finish();
    dv.finish();
  }

  // Adds what a block of queries and the keys that it views have to do with each other.
  void tile(int64_t b, int64_t h, int64_t first, int64_t rows, const View& view, Sums dq, Sums dk, Sums dv) const {
    const int64_t n = view.keys.size(), stride = padded(n), shared = h / p_.groups, key = view.keys.first;
    const bool beyond_v = dq.data != nullptr || dk.data != nullptr;
    Scratch& own = scratch();
    float* scores = own.scores.get(rows * stride);
    float* dp = beyond_v ? own.dp.get(rows * stride) : nullptr;
    Bits<T>*p = nullptr, *ds = nullptr;
    if constexpr (std::is_same_v<T, float>)
      p = scores, ds = dp;
    else
      p = own.p.get(rows * stride), ds = own.ds.get(rows * stride);
    for (const auto& [row, count, from, keys] : view.parts) {
      const int64_t at = row * stride + from;
      matmul(count, keys, q_.size, q_.view(b, h, first + row), k_.view(b, shared, key + from, true), scores + at,
             stride);
      if (beyond_v)
        matmul(count, keys, v_.size, dout_.view(b, h, first + row), v_.view(b, shared, key + from, true), dp + at,
               stride);
    }
    const int64_t lines = (b * p_.heads + h) * p_.tokens + first;
    for (int64_t r = 0; r < rows; ++r) {
      const auto& [range, seen] = view.rows[r];
      const int64_t count = range.size(), from = r * stride + range.first;
      const auto clear = [&](Bits<T>* to) {
        std::fill(to + r * stride, to + from, Bits<T>{});
        std::fill(to + from + count, to + r * stride + n, Bits<T>{});
      };
      softmax_backward({count, p_.scale, p_.softcap, seen}, scores + from, beyond_v ? dp + from : nullptr,
                       log_sums_[lines + r], deltas_[lines + r], p + from, beyond_v ? ds + from : nullptr);
      clear(p);
      if (beyond_v) clear(ds);
    }
    for (const auto& [row, count, from, keys] : view.parts) {
      const int64_t at = row * stride + from;
      if (dv.data != nullptr)
        matmul(keys, v_.size, count, {p + at, stride, true}, dout_.view(b, h, first + row), dv.data + from * dv.stride,
               dv.stride, true);
      if (dk.data != nullptr)
        matmul(keys, q_.size, count, {ds + at, stride, true}, q_.view(b, h, first + row), dk.data + from * dk.stride,
               dk.stride, true);
      if (dq.data != nullptr)
        matmul(count, q_.size, keys, {ds + at, stride}, k_.view(b, shared, key + from), dq.data + row * dq.stride,
               dq.stride, true);
    }
  }

  const Problem& p_;
  const Sight& sight_;
  Rows<T> q_, k_, v_, dout_, dq_, dk_, dv_;
  const float *log_sums_, *deltas_;
};

// The sum of p * dp of every query, which is that of out * dout: [B, H, T].
template <class T>
Tensor deltas(const Problem& p, const Tensor& out, const Tensor& dout) {
  auto sums = torch::empty({p.batch, p.heads, p.tokens}, torch::kFloat32);
  const Rows<T> a(out), b(dout);
  float* to = sums.data_ptr<float>();
  parallel_for(0, sums.numel(), std::max<int64_t>(1, 32768 / a.size), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i % p.tokens, head = i / p.tokens, n = head / p.heads, h = head % p.heads;
      to[i] = row_dot(a.at(n, h, t), b.at(n, h, t), a.size);
    }
  });
  return sums;
}

template <class F>
void by_type(const Tensor& t, F f) {
  t.scalar_type() == torch::kFloat32 ? f(float{}) : f(at::BFloat16{});
}

Tensor plain_sinks(const Tensor& sinks) {
  return sinks.defined() ? sinks.to(torch::kCPU, torch::kFloat32).contiguous() : sinks;
}

std::pair<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& allowed, bool causal,
                                  const Tensor& sinks, double scale, double softcap, bool round_operands) {
  const Problem p(q, k, scale, softcap);
  const Sight sight(allowed, causal, p.tokens, p.length);
  const auto out = like_rows(p.batch, p.heads, p.tokens, v.size(3), q.options());
  const auto log_sums = torch::empty({p.batch, p.heads, p.tokens}, torch::kFloat32);
  const auto run = [&]<class T, class P>(T, P) {
    Forward<T, P>(p, sight, q, k, v, plain_sinks(sinks), out, log_sums).run();
  };
  if (q.scalar_type() == torch::kBFloat16)
    run(at::BFloat16{}, at::BFloat16{});
  else if (round_operands && isa() == Isa::Avx512)
    run(float{}, at::BFloat16{});
  else
    run(float{}, float{});
  return {out, log_sums};
}

class Attend : public torch::autograd::Function<Attend> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& given_sinks, const std::optional<Tensor>& given_allowed,
                        bool causal, double scale, double softcap) {
    const Tensor sinks = given_sinks.value_or(Tensor()), allowed = given_allowed.value_or(Tensor());
    const auto [out, log_sums] = moiety::forward(q, k, v, allowed, causal, sinks, scale, softcap, false);
    context->save_for_backward({q, k, v, sinks, allowed, out, log_sums});
    context->saved_data["causal"] = causal;
    context->saved_data["scale"] = scale;
    context->saved_data["softcap"] = softcap;
    return out;
  }

  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &sinks = saved[3], &allowed = saved[4], &out = saved[5],
                 &log_sums = saved[6];
    const Problem p(q, k, context->saved_data["scale"].toDouble(), context->saved_data["softcap"].toDouble());
    const Sight sight(allowed, context->saved_data["causal"].toBool(), p.tokens, p.length);
    const auto dout = grads[0].stride(3) == 1 ? grads[0] : grads[0].contiguous();
    const auto gradient = [&](size_t i) {
      const Tensor& t = saved[i];
      if (!context->needs_input_grad(i)) return Tensor();
      return t.is_non_overlapping_and_dense() ? torch::empty_like(t)
                                              : like_rows(t.size(0), t.size(1), t.size(2), t.size(3), t.options());
    };
    const auto dq = gradient(0), dk = gradient(1), dv = gradient(2);
    Tensor dsinks;
    by_type(q, [&](auto one) {
      using T = decltype(one);
      const auto sums = deltas<T>(p, out, dout);
      if (dq.defined() || dk.defined() || dv.defined())
        Backward<T>(p, sight, q, k, v, dout, log_sums, sums, dq, dk, dv).run();
      if (sinks.defined() && context->needs_input_grad(3)) {
        const auto share = torch::exp(sinks.to(torch::kFloat32).view({1, -1, 1}) - log_sums);
        dsinks = -(share * sums).sum(-1).sum(0).to(sinks.scalar_type());
      }
    });
    return {dq, dk, dv, dsinks, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

bool runs_by_tasks(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& allowed, bool causal) {
  const auto type = q.scalar_type();
  if ((type != torch::kFloat32 && type != torch::kBFloat16) || !matmul_is_fast()) return false;
  for (const Tensor& t : {q, k, v})
    if (!t.is_cpu() || t.scalar_type() != type || t.stride(3) != 1 || t.numel() == 0) return false;
  if (allowed.defined()) return allowed.is_cpu() && allowed.scalar_type() == torch::kBool;
  return !causal || q.size(2) == k.size(2);
}

Tensor attend_by_tasks(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& allowed, bool causal,
                       const AttentionOptions& options) {
  if (may_shorten({q, k, v, options.sinks}))
    return forward(q, k, v, allowed, causal, options.sinks, options.scale, options.softcap, options.round_operands)
        .first;
  const auto given = [](const Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; };
  return Attend::apply(q, k, v, given(options.sinks), given(allowed), causal, options.scale, options.softcap);
}

}  // namespace moiety
