// Loops that the compiler vectorises, included by swiglu*.cpp, each built for another instruction set. Everything is in
// an unnamed namespace so that no copy is shared between them.
#include <cstdint>

#include "moiety/kernels/exponential.h"
#include "moiety/kernels/load_store.h"
#include "moiety/kernels/swiglu_kernels.h"

namespace moiety {
namespace {

constexpr int kLanes = 16;

template <class T>
[[gnu::always_inline]] inline float swiglu_backward_at(T g_, T u_, T t_, float share, T* h_, T* dg_, T* du_) {
  const float g = load(g_), u = load(u_), t = load(t_);
  const float s = 1.f / (1.f + exponential(-g)), a = g * s, h = a * u, weighted = t * share;
  store(share * h, h_);
  store(weighted * a, du_);
  store(weighted * u * (s + a * (1.f - s)), dg_);
  return t * h;
}

template <class T>
float swiglu_backward_loop(const T* g, const T* u, const T* t, float share, T* h, T* dg, T* du, int64_t n) {
  // One sum a lane: the order of additions is the same for every instruction set.
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    // Through local arrays: dg may be t, and the compiler must not have to ask.
    T lh[kLanes], ldg[kLanes], ldu[kLanes];
    for (int k = 0; k < kLanes; ++k)
      sums[k] += swiglu_backward_at(g[i + k], u[i + k], t[i + k], share, lh + k, ldg + k, ldu + k);
    if (h != nullptr) __builtin_memcpy(h + i, lh, sizeof lh);
    __builtin_memcpy(dg + i, ldg, sizeof ldg);
    __builtin_memcpy(du + i, ldu, sizeof ldu);
  }
  for (int k = 0; i < n; ++i, ++k) {
    T last;
    sums[k] += swiglu_backward_at(g[i], u[i], t[i], share, &last, dg + i, du + i);
    if (h != nullptr) h[i] = last;
  }
  float sum = 0.f;
  for (const float s : sums) sum += s;
  return sum;
}

template <class T>
void weighted_sum_loop(const T* const* rows, const float* weights, int64_t count, T* out, int64_t n) {
  constexpr int64_t kBlock = 256;
  float sums[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    for (int64_t i = 0; i < size; ++i) sums[i] = 0.f;
    for (int64_t r = 0; r < count; ++r) {
      const float w = weights == nullptr ? 1.f : weights[r];
      const T* row = rows[r] + begin;
      for (int64_t i = 0; i < size; ++i) sums[i] += w * load(row[i]);
    }
    for (int64_t i = 0; i < size; ++i) store(sums[i], out + begin + i);
  }
}

constexpr SwigluKernels kSwiglu = {{swiglu_backward_loop<float>, weighted_sum_loop<float>},
                                   {swiglu_backward_loop<uint16_t>, weighted_sum_loop<uint16_t>}};

}  // namespace
}  // namespace moiety
