#pragma once
// What swiglu.cpp asks of one instruction set (internal to kernels/).
#include <cstdint>

namespace moiety {

template <class T>
struct SwigluOf {
  float (*backward)(const T* g, const T* u, const T* t, float share, T* h, T* dg, T* du, int64_t n);
  void (*sum)(const T* const* rows, const float* weights, int64_t count, T* out, int64_t n);
};

struct SwigluKernels {
  SwigluOf<float> f32;
  SwigluOf<uint16_t> bf16;
};

const SwigluKernels& swiglu_kernels_avx2();
const SwigluKernels& swiglu_kernels_avx512();

}  // namespace moiety
