// Loops that the compiler vectorises, included by scan*.cpp, each built for another instruction set. Everything is in
// an unnamed namespace so that no copy is shared between them. A vector is kScanLanes channels of one token.
#include <cstdint>

#include "moiety/kernels/exponential.h"
#include "moiety/kernels/scan_kernels.h"

namespace moiety {
namespace {

constexpr int64_t kLanes = kScanLanes;

// Some of the channels of a row of numbers; lanes beyond the last are 0.
[[gnu::always_inline]] inline void load_lanes(const float* from, int64_t count, float* to) {
  if (count == kLanes) {
    __builtin_memcpy(to, from, kLanes * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < kLanes; ++k) to[k] = k < count ? from[k] : 0.f;
}
[[gnu::always_inline]] inline void store_lanes(const float* from, int64_t count, float* to) {
  if (count == kLanes) {
    __builtin_memcpy(to, from, kLanes * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < count; ++k) to[k] = from[k];
}

// One token: `factors`, null or [states][kLanes], gets what the state was multiplied by.
[[gnu::always_inline]] inline void step(const float* u, const float* dt, const float* a, int64_t stride, const float* b,
                                        const float* c, int64_t states, int64_t count, bool fresh, float* h, float* y,
                                        float* factors) {
  float lu[kLanes], ldt[kLanes], in[kLanes], sum[kLanes];
  load_lanes(u, count, lu);
  load_lanes(dt, count, ldt);
  const float keep = fresh ? 0.f : 1.f;
  for (int64_t k = 0; k < kLanes; ++k) {
    in[k] = ldt[k] * lu[k];
    sum[k] = 0.f;
  }
  for (int64_t n = 0; n < states; ++n) {
    float la[kLanes], f[kLanes], s[kLanes];
    load_lanes(a + n * stride, count, la);
    __builtin_memcpy(s, h + n * kLanes, sizeof s);
    const float bn = b[n], cn = c[n];
    for (int64_t k = 0; k < kLanes; ++k) {
      f[k] = keep * exponential(ldt[k] * la[k]);
      s[k] = f[k] * s[k] + in[k] * bn;
      sum[k] += cn * s[k];
    }
    __builtin_memcpy(h + n * kLanes, s, sizeof s);
    if (factors != nullptr) __builtin_memcpy(factors + n * kLanes, f, sizeof f);
  }
  if (y != nullptr) store_lanes(sum, count, y);
}

[[gnu::always_inline]] inline ScanToken what_of(const ScanRow& row, int64_t t) {
  return row.what == nullptr ? ScanToken::step : row.what[t];
}

void scan_forward_loop(const ScanRow& row, int64_t first, int64_t last, float* h, float* y, float* kept) {
  const int64_t d = row.channels, states = row.states;
  for (int64_t begin = first; begin < last; begin += kLanes) {
    const int64_t count = last - begin < kLanes ? last - begin : kLanes;
    // The state of these channels, packed where it changes.
    constexpr int64_t kMost = 256;
    float own[kMost * kLanes];
    for (int64_t n = 0; n < states; ++n) load_lanes(h + n * d + begin, count, own + n * kLanes);
    for (int64_t t = 0; t < row.tokens; ++t) {
      if (kept != nullptr && t % kScanChunk == 0)
        for (int64_t n = 0; n < states; ++n)
          store_lanes(own + n * kLanes, count, kept + (t / kScanChunk * states + n) * d + begin);
      const ScanToken what = what_of(row, t);
      if (what == ScanToken::skip) {
        for (int64_t k = 0; k < count; ++k) y[t * d + begin + k] = 0.f;
        continue;
      }
      step(row.u + t * d + begin, row.dt + t * d + begin, row.a + begin, d, row.b + t * states, row.c + t * states,
           states, count, what == ScanToken::fresh, own, y + t * d + begin, nullptr);
    }
    for (int64_t n = 0; n < states; ++n) store_lanes(own + n * kLanes, count, h + n * d + begin);
  }
}

// The scratch of the backward pass, in vectors: states before and behind every token of a chunk, the factors between
// them, sums of db and dc, and the gradients of state and a of every vector of the group.
struct ScanScratch {
  float *h, *f, *db, *dc, *g, *da;
  ScanScratch(float* from, int64_t states) {
    const int64_t all = states * kLanes, chunk = kScanChunk * all, group = kScanGroup / kLanes * all;
    h = from;
    f = h + chunk + all;
    db = f + chunk;
    dc = db + chunk;
    g = dc + chunk;
    da = g + group;
  }
};

[[gnu::always_inline]] inline float sum_of(const float* lanes) {
  float sum = 0.f;
  for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// Back through the tokens of one chunk, for one vector of channels.
[[gnu::always_inline]] inline void chunk_backward(const ScanRow& row, int64_t from, int64_t to, int64_t begin,
                                                  int64_t count, const float* dy, const ScanScratch& s, float* g,
                                                  float* da, const ScanGradients& out) {
  const int64_t d = row.channels, states = row.states, all = states * kLanes;
  for (int64_t t = from; t < to; ++t) {
    float* h = s.h + (t - from + 1) * all;
    __builtin_memcpy(h, h - all, sizeof(float) * static_cast<size_t>(all));
    const ScanToken what = what_of(row, t);
    if (what != ScanToken::skip)
      step(row.u + t * d + begin, row.dt + t * d + begin, row.a + begin, d, row.b + t * states, row.c + t * states,
           states, count, what == ScanToken::fresh, h, nullptr, s.f + (t - from) * all);
  }
  for (int64_t t = to - 1; t >= from; --t) {
    float lu[kLanes], ldt[kLanes], ldy[kLanes], in[kLanes], din[kLanes], ddt[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) din[k] = ddt[k] = 0.f;
    if (what_of(row, t) == ScanToken::skip) {
      store_lanes(din, count, out.du + t * d + begin);
      store_lanes(ddt, count, out.ddt + t * d + begin);
      continue;
    }
    load_lanes(row.u + t * d + begin, count, lu);
    load_lanes(row.dt + t * d + begin, count, ldt);
    load_lanes(dy + t * d + begin, count, ldy);
    for (int64_t k = 0; k < kLanes; ++k) in[k] = ldt[k] * lu[k];
    const float *h = s.h + (t - from) * all, *f = s.f + (t - from) * all;
    float *db = s.db + (t - from) * all, *dc = s.dc + (t - from) * all;
    for (int64_t n = 0; n < states; ++n) {
      float la[kLanes], lg[kLanes], lda[kLanes], ldb[kLanes], ldc[kLanes];
      load_lanes(row.a + n * d + begin, count, la);
      __builtin_memcpy(lg, g + n * kLanes, sizeof lg);
      __builtin_memcpy(lda, da + n * kLanes, sizeof lda);
      __builtin_memcpy(ldb, db + n * kLanes, sizeof ldb);
      __builtin_memcpy(ldc, dc + n * kLanes, sizeof ldc);
      const float *before = h + n * kLanes, *behind = before + all, *factor = f + n * kLanes;
      const float bn = row.b[t * states + n], cn = row.c[t * states + n];
      for (int64_t k = 0; k < kLanes; ++k) {
        const float gh = lg[k] + cn * ldy[k];
        ldc[k] += ldy[k] * behind[k];
        ldb[k] += gh * in[k];
        din[k] += gh * bn;
        const float back = gh * factor[k], q = back * before[k];  // q: of dt a
        ddt[k] += q * la[k];
        lda[k] += q * ldt[k];
        lg[k] = back;
      }
      __builtin_memcpy(g + n * kLanes, lg, sizeof lg);
      __builtin_memcpy(da + n * kLanes, lda, sizeof lda);
      __builtin_memcpy(db + n * kLanes, ldb, sizeof ldb);
      __builtin_memcpy(dc + n * kLanes, ldc, sizeof ldc);
    }
    for (int64_t k = 0; k < kLanes; ++k) {
      ddt[k] += din[k] * lu[k];
      din[k] *= ldt[k];
    }
    store_lanes(din, count, out.du + t * d + begin);
    store_lanes(ddt, count, out.ddt + t * d + begin);
  }
}

void scan_backward_loop(const ScanRow& row, int64_t first, int64_t last, const float* dy, const float* kept, float* dh,
                        const ScanGradients& out, float* scratch) {
  const int64_t d = row.channels, states = row.states, all = states * kLanes;
  const ScanScratch s(scratch, states);
  const auto vectors = [&](const auto& body) {
    for (int64_t v = 0, begin = first; begin < last; ++v, begin += kLanes)
      body(begin, last - begin < kLanes ? last - begin : kLanes, s.g + v * all, s.da + v * all);
  };
  vectors([&](int64_t begin, int64_t count, float* g, float* da) {
    for (int64_t n = 0; n < states; ++n) load_lanes(dh + n * d + begin, count, g + n * kLanes);
    for (int64_t i = 0; i < all; ++i) da[i] = 0.f;
  });
  const int64_t chunks = (row.tokens + kScanChunk - 1) / kScanChunk;
  for (int64_t c = chunks - 1; c >= 0; --c) {
    const int64_t from = c * kScanChunk, end = from + kScanChunk, to = end < row.tokens ? end : row.tokens;
    for (int64_t i = 0; i < (to - from) * all; ++i) s.db[i] = s.dc[i] = 0.f;
    vectors([&](int64_t begin, int64_t count, float* g, float* da) {
      for (int64_t n = 0; n < states; ++n) load_lanes(kept + (c * states + n) * d + begin, count, s.h + n * kLanes);
      chunk_backward(row, from, to, begin, count, dy, s, g, da, out);
    });
    for (int64_t i = 0; i < (to - from) * states; ++i) {
      out.db[from * states + i] = sum_of(s.db + i * kLanes);
      out.dc[from * states + i] = sum_of(s.dc + i * kLanes);
    }
  }
  vectors([&](int64_t begin, int64_t count, const float* g, const float* da) {
    for (int64_t n = 0; n < states; ++n) {
      store_lanes(g + n * kLanes, count, dh + n * d + begin);
      store_lanes(da + n * kLanes, count, out.da + n * d + begin);
    }
  });
}

constexpr ScanKernels kScan = {scan_forward_loop, scan_backward_loop};

}  // namespace
}  // namespace moiety
