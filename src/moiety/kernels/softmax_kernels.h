#pragma once
// What softmax.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/softmax.h"

namespace moiety {

template <class T>
struct SoftmaxOf {
  SoftmaxSums (*forward)(const Logits& logits, float* scores, float sink, T* to);
  void (*backward)(const Logits& logits, const float* scores, const float* dp, float log_sum, float delta, T* p, T* ds);
  float (*dot)(const T* a, const T* b, int64_t n);
  void (*scale)(const float* x, float factor, T* out, int64_t n);
};

struct SoftmaxKernels {
  SoftmaxOf<float> f32;
  SoftmaxOf<uint16_t> bf16;
};

const SoftmaxKernels& softmax_kernels_avx2();
const SoftmaxKernels& softmax_kernels_avx512();

}  // namespace moiety
