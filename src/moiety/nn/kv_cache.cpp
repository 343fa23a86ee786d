#include "moiety/nn/kv_cache.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

torch::ScalarType type_of(Format format) {
  return is_block(format) ? torch::kUInt8 : torch_dtype(format);
}

CacheRows empty_rows(std::optional<Format> wanted, const torch::TensorOptions& computed, int64_t size,
                     const char* what) {
  CacheRows rows;
  rows.format = wanted.value_or(format_of(torch::typeMetaToScalarType(computed.dtype())));
  rows.size = size;
  const int64_t block = info(rows.format).block;
  check(size % block == 0,
        "a cache of Q8_0 has blocks of {} numbers, and {} of this model have {} a head: keep them as F16, BF16 or F32",
        block, what, size);
  check(block == 1 || computed.device().is_cpu(),
        "a cache of Q8_0 is read by the CPU only: keep {} as F16, BF16 or F32 on {}", what, computed.device().str());
  return rows;
}

// Runs body(b, h, t) for all positions of [B, H, T], together on all threads where they are many.
template <class Body>
void for_positions(const torch::Tensor& t, int64_t size, const Body& body) {
  const int64_t heads = t.size(1), time = t.size(2);
  parallel_for(0, t.size(0) * heads * time, std::max<int64_t>(1, 20'000 / std::max<int64_t>(1, size)),
               [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) body(i / time / heads, i / time % heads, i % time);
               });
}

// Position `at` and those behind it = from [B, H, T, D].
void put(const CacheRows& to, int64_t at, const torch::Tensor& from) {
  const int64_t time = from.size(2), size = from.size(3);
  const bool graph = torch::GradMode::is_enabled() && from.requires_grad();
  check(!graph || to.format != Format::Q8_0, "no gradient flows through a cache of Q8_0: keep it as F16, BF16 or F32");
  const bool checked = to.format == Format::F16 || to.format == Format::Q8_0;
  // A few tokens: torch would spend longer on looking at the shapes than on copying.
  if (from.is_cpu() && from.scalar_type() == torch::kFloat32 && from.stride(3) == 1 && !graph &&
      (checked || time <= 8)) {
    const float* source = from.const_data_ptr<float>();
    const int64_t bytes = row_bytes(to.format, size);
    for_positions(from, size, [&](int64_t b, int64_t h, int64_t t) {
      quantize_row(to.format, source + b * from.stride(0) + h * from.stride(1) + t * from.stride(2),
                   to.at(b, h) + (at + t) * bytes, size);
    });
    return;
  }
  if (checked && from.is_cpu() && !graph) return put(to, at, from.to(torch::kFloat32).contiguous());
  to.data.narrow(2, at, time).copy_(from);
}

}  // namespace

CacheRows CacheRows::narrow(int64_t row, int64_t rows, int64_t head, int64_t heads) const {
  return {data.narrow(0, row, rows).narrow(1, head, heads), format, size};
}

torch::Tensor CacheRows::widened(torch::ScalarType type) const {
  if (is(type)) return data;
  if (format != Format::Q8_0) return data.to(type);
  auto wide = torch::empty({data.size(0), data.size(1), data.size(2), size}, torch::kFloat32);
  float* out = wide.data_ptr<float>();
  const int64_t bytes = row_bytes(format, size);
  for_positions(data, size, [&](int64_t b, int64_t h, int64_t t) {
    dequantize_row(format, at(b, h) + t * bytes, out + ((b * data.size(1) + h) * data.size(2) + t) * size, size);
  });
  return wide.to(type);
}

std::byte* CacheRows::at(int64_t row, int64_t head) const {
  return static_cast<std::byte*>(data.data_ptr()) +
         (row * data.stride(0) + head * data.stride(1)) * static_cast<int64_t>(data.element_size());
}

KvCache::KvCache(int64_t slots, CacheFormats formats) : slots_(slots), formats_(formats) {}

KvCache::Slot& KvCache::grow(int64_t slot, int64_t rows, int64_t heads, int64_t tokens, int64_t size, int64_t v_size,
                             const torch::TensorOptions& computed) {
  if (slot >= static_cast<int64_t>(slots_.size())) slots_.resize(slot + 1);
  Slot& s = slots_[slot];
  const bool fresh = !s.k.data.defined();
  if (fresh) {
    s.k = empty_rows(formats_.k, computed, size, "keys");
    s.v = empty_rows(formats_.v, computed, v_size, "values");
  }
  const int64_t total = s.length + tokens, held = fresh ? 0 : s.k.data.size(2);
  check(fresh || s.k.data.size(0) == rows, "the cache holds {} rows but this pass has {}", fresh ? 0 : s.k.data.size(0),
        rows);
  if (held < total) {
    // Grow by half: appends stay cheap and little is wasted.
    const int64_t capacity = std::max<int64_t>(total, fresh ? total + 64 : held * 3 / 2);
    const auto grow = [&](CacheRows& kept) {
      const int64_t width = kept.format == Format::Q8_0 ? row_bytes(kept.format, kept.size) : kept.size;
      auto larger = torch::empty({rows, heads, capacity, width}, computed.dtype(type_of(kept.format)));
      if (s.length > 0) larger.narrow(2, 0, s.length).copy_(kept.data.narrow(2, 0, s.length));
      kept.data = larger;
    };
    grow(s.k);
    grow(s.v);
  }
  s.length = total;
  return s;
}

std::pair<CacheRows, CacheRows> KvCache::extend(int64_t slot, int64_t rows, int64_t heads, int64_t tokens, int64_t size,
                                                int64_t v_size, const torch::TensorOptions& computed) {
  const Slot& s = grow(slot, rows, heads, tokens, size, v_size, computed);
  const auto view = [&](const CacheRows& kept) {
    return CacheRows{kept.data.narrow(2, 0, s.length), kept.format, kept.size};
  };
  return {view(s.k), view(s.v)};
}

std::pair<CachePlace, CachePlace> KvCache::extend_in_place(int64_t slot, int64_t rows, int64_t heads, int64_t tokens,
                                                           int64_t size, int64_t v_size,
                                                           const torch::TensorOptions& computed) {
  const Slot& s = grow(slot, rows, heads, tokens, size, v_size, computed);
  const auto place = [&](const CacheRows& kept) {
    const auto bytes = static_cast<int64_t>(kept.data.element_size());
    return CachePlace{kept.at(0, 0), kept.data.stride(0) * bytes, kept.data.stride(1) * bytes, s.length, kept.format};
  };
  return {place(s.k), place(s.v)};
}

std::pair<CacheRows, CacheRows> KvCache::store(int64_t slot, const torch::Tensor& k, const torch::Tensor& v) {
  const int64_t tokens = k.size(2);
  auto held = extend(slot, k.size(0), k.size(1), tokens, k.size(3), v.size(3), k.options());
  const int64_t at = slots_[slot].length - tokens;
  put(held.first, at, k);
  put(held.second, at, v);
  return held;
}

std::pair<torch::Tensor, torch::Tensor> KvCache::append(int64_t slot, const torch::Tensor& k, const torch::Tensor& v) {
  const auto [keys, values] = store(slot, k, v);
  return {keys.widened(k.scalar_type()), values.widened(v.scalar_type())};
}

std::vector<torch::Tensor> KvCache::state(int64_t slot, int64_t rows) const {
  if (length_ == 0) return {};
  const Slot s = slot < static_cast<int64_t>(slots_.size()) ? slots_[slot] : Slot();
  // A pass that ended in an error has left a state behind tokens that do not count.
  const State& kept = s.now.length > length_ ? s.before : s.now;
  check(kept.length == length_ && !kept.tensors.empty(), "the cache holds no state behind its {} tokens", length_);
  check(kept.tensors[0].size(0) == rows, "the cache holds {} rows but this pass has {}", kept.tensors[0].size(0), rows);
  return kept.tensors;
}

void KvCache::set_state(int64_t slot, std::vector<torch::Tensor> state, int64_t tokens) {
  if (slot >= static_cast<int64_t>(slots_.size())) slots_.resize(slot + 1);
  Slot& s = slots_[slot];
  if (s.now.length <= length_) s.before = std::move(s.now);
  s.now = {std::move(state), length_ + tokens};
}

void KvCache::advance(int64_t tokens, const torch::Tensor& mask, const torch::Tensor& next_position) {
  length_ += tokens;
  mask_ = mask;
  next_ = next_position;
}

void KvCache::crop(int64_t length) {
  check(length >= 0 && length <= length_, "the cache holds {} tokens and cannot be cropped to {}", length_, length);
  check(
      can_crop(length),
      "the cache holds {} tokens and cannot be cropped to {}: layers that keep a state in place of keys and values can "
      "only begin anew",
      length_, length);
  for (Slot& s : slots_) {
    s.length = std::min(s.length, length);  // also what a pass left that ended in an error
    if (s.now.length > length) s.now = length > 0 ? std::move(s.before) : State();
    if (s.before.length >= length) s.before = State();
  }
  if (length == length_) return;
  if (next_.defined()) {
    const auto gone = mask_.defined() ? mask_.slice(1, length).sum(1) : torch::full_like(next_, length_ - length);
    next_ = next_ - gone.to(next_.scalar_type());
  }
  if (mask_.defined()) mask_ = mask_.slice(1, 0, length).contiguous();
  length_ = length;
}

bool KvCache::can_crop(int64_t length) const {
  if (length < 0 || length > length_) return false;
  return length == 0 || std::all_of(slots_.begin(), slots_.end(), [&](const Slot& s) {
           return s.now.tensors.empty() || s.now.length == length || s.before.length == length;
         });
}

void KvCache::select(const torch::Tensor& rows) {
  for (Slot& s : slots_) {
    if (s.k.data.defined()) {
      s.k.data = s.k.data.index_select(0, rows);
      s.v.data = s.v.data.index_select(0, rows);
    }
    for (State* state : {&s.now, &s.before})
      for (torch::Tensor& t : state->tensors) t = t.index_select(0, rows);
  }
  if (mask_.defined()) mask_ = mask_.index_select(0, rows);
  if (next_.defined()) next_ = next_.index_select(0, rows);
}

KvCache KvCache::fork() const {
  KvCache copy = *this;  // states are replaced and never written to: copies may share them
  for (Slot& s : copy.slots_)
    if (s.k.data.defined()) {
      s.k.data = s.k.data.clone();
      s.v.data = s.v.data.clone();
    }
  return copy;
}

int64_t KvCache::bytes() const {
  int64_t total = 0;
  for (const Slot& s : slots_) {
    if (s.k.data.defined()) total += static_cast<int64_t>(s.k.data.nbytes() + s.v.data.nbytes());
    for (const State* state : {&s.now, &s.before})
      for (const torch::Tensor& t : state->tensors) total += static_cast<int64_t>(t.nbytes());
  }
  return total;
}

}  // namespace moiety
