#pragma once
// What token.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/token.h"

namespace moiety {

struct TokenKernels {
  void (*norm)(const float* x, const float* weight, float offset, float eps, float* out, int64_t n);
  void (*rotate)(const float* x, const float* c, const float* s, int64_t half, bool interleaved, float* out, int64_t n);
  void (*silu)(float* g, const float* u, int64_t n);
  void (*gelu)(float* g, const float* u, int64_t n);
  void (*rows)(const float* w, int64_t rows, int64_t n, const float* x, float* y);
  void (*attend)(const AttendRow& a, float* scratch, float* out);
};

const TokenKernels& token_kernels_avx2();
const TokenKernels& token_kernels_avx512();

}  // namespace moiety
