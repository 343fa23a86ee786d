#pragma once
// What token.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/token.h"

namespace moiety {

template <class T>
struct TokenOf {
  void (*norm)(const T* x, const float* weight, float offset, float eps, T* out, int64_t n);
  void (*norm_backward)(const T* x, const float* weight, float offset, float eps, const T* dy, T* dx, float* dw,
                        int64_t n);
  void (*rotate)(const T* x, const float* c, const float* s, int64_t half, bool interleaved, T* out, int64_t n);
};

struct TokenKernels {
  TokenOf<float> f32;
  TokenOf<uint16_t> bf16;
  void (*silu)(float* g, const float* u, int64_t n);
  void (*gelu)(float* g, const float* u, int64_t n);
  void (*clamped)(float* g, const float* u, float alpha, float limit, int64_t n);
  void (*rows)(const float* w, int64_t rows, int64_t n, const float* x, float* y);
  void (*attend)(const AttendRow& a, float* scratch, float* out);
};

/// Positions that are widened at a time: what they take stays in the first cache.
[[gnu::always_inline]] inline int64_t attend_tile(int64_t size) {
  constexpr int64_t kNumbers = 4096;
  return size < kNumbers / 16 ? kNumbers / size : 16;
}

const TokenKernels& token_kernels_avx2();
const TokenKernels& token_kernels_avx512();

}  // namespace moiety
