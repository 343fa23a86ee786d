#include "moiety/nn/kv_cache.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {
namespace {

// to [B, H, C, D] from position `at` on = from [B, H, T, D].
void put(const torch::Tensor& to, int64_t at, const torch::Tensor& from) {
  const int64_t time = from.size(2), size = from.size(3);
  const bool plain = from.is_cpu() && from.scalar_type() == torch::kFloat32 && to.scalar_type() == torch::kFloat32 &&
                     from.stride(3) == 1;
  // A few tokens: torch would spend longer on looking at the shapes than on copying.
  if (!plain || time > 8) {
    to.narrow(2, at, time).copy_(from);
    return;
  }
  const float* source = from.const_data_ptr<float>();
  float* target = to.data_ptr<float>();
  for (int64_t b = 0; b < from.size(0); ++b)
    for (int64_t h = 0; h < from.size(1); ++h)
      for (int64_t t = 0; t < time; ++t)
        std::copy_n(source + b * from.stride(0) + h * from.stride(1) + t * from.stride(2), size,
                    target + ((b * to.size(1) + h) * to.size(2) + at + t) * size);
}

}  // namespace

KvCache::KvCache(int64_t slots) : slots_(slots) {}

std::pair<torch::Tensor, torch::Tensor> KvCache::extend(int64_t slot, int64_t rows, int64_t heads, int64_t tokens,
                                                        int64_t size, int64_t v_size,
                                                        const torch::TensorOptions& options) {
  if (slot >= static_cast<int64_t>(slots_.size())) slots_.resize(slot + 1);
  Slot& s = slots_[slot];
  const int64_t total = s.length + tokens;
  check(!s.k.defined() || s.k.size(0) == rows, "the cache holds {} rows but this pass has {}",
        s.k.defined() ? s.k.size(0) : 0, rows);
  if (!s.k.defined() || s.k.size(2) < total) {
    // Grow by half: appends stay cheap and little is wasted.
    const int64_t capacity = std::max<int64_t>(total, s.k.defined() ? s.k.size(2) * 3 / 2 : total + 64);
    const auto grow = [&](torch::Tensor& old, int64_t width) {
      auto fresh = torch::empty({rows, heads, capacity, width}, options);
      if (s.length > 0) fresh.narrow(2, 0, s.length).copy_(old.narrow(2, 0, s.length));
      old = fresh;
    };
    grow(s.k, size);
    grow(s.v, v_size);
  }
  s.length = total;
  return {s.k.narrow(2, 0, total), s.v.narrow(2, 0, total)};
}

std::pair<torch::Tensor, torch::Tensor> KvCache::append(int64_t slot, const torch::Tensor& k, const torch::Tensor& v) {
  const int64_t tokens = k.size(2);
  auto held = extend(slot, k.size(0), k.size(1), tokens, k.size(3), v.size(3), k.options());
  const Slot& s = slots_[slot];
  put(s.k, s.length - tokens, k);
  put(s.v, s.length - tokens, v);
  return held;
}

void KvCache::advance(int64_t tokens, const torch::Tensor& mask, const torch::Tensor& next_position) {
  length_ += tokens;
  mask_ = mask;
  next_ = next_position;
}

void KvCache::crop(int64_t length) {
  check(length >= 0 && length <= length_, "the cache holds {} tokens and cannot be cropped to {}", length_, length);
  if (length == length_) return;
  for (Slot& s : slots_) s.length = std::min(s.length, length);
  if (next_.defined()) {
    const auto gone = mask_.defined() ? mask_.slice(1, length).sum(1) : torch::full_like(next_, length_ - length);
    next_ = next_ - gone.to(next_.scalar_type());
  }
  if (mask_.defined()) mask_ = mask_.slice(1, 0, length).contiguous();
  length_ = length;
}

void KvCache::select(const torch::Tensor& rows) {
  for (Slot& s : slots_)
    if (s.k.defined()) {
      s.k = s.k.index_select(0, rows);
      s.v = s.v.index_select(0, rows);
    }
  if (mask_.defined()) mask_ = mask_.index_select(0, rows);
  if (next_.defined()) next_ = next_.index_select(0, rows);
}

KvCache KvCache::fork() const {
  KvCache copy = *this;
  for (Slot& s : copy.slots_)
    if (s.k.defined()) {
      s.k = s.k.clone();
      s.v = s.v.clone();
    }
  return copy;
}

int64_t KvCache::bytes() const {
  int64_t total = 0;
  for (const Slot& s : slots_)
    if (s.k.defined()) total += static_cast<int64_t>(s.k.nbytes() + s.v.nbytes());
  return total;
}

}  // namespace moiety
