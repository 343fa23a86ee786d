#include "moiety/kernels/softmax.h"

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/softmax_loops.h"

namespace moiety {
namespace {

const SoftmaxKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512:
      return softmax_kernels_avx512();
    case Isa::Avx2:
      return softmax_kernels_avx2();
    default:
      break;
  }
#endif
  return kSoftmax;
}

}  // namespace

SoftmaxSums softmax_row(const Logits& logits, float* scores, float sink, float* to) {
  return kernels().f32.forward(logits, scores, sink, to);
}

SoftmaxSums softmax_row(const Logits& logits, float* scores, float sink, uint16_t* to) {
  return kernels().bf16.forward(logits, scores, sink, to);
}

void softmax_backward(const Logits& logits, const float* scores, const float* dp, float log_sum, float delta, float* p,
                      float* ds) {
  kernels().f32.backward(logits, scores, dp, log_sum, delta, p, ds);
}

void softmax_backward(const Logits& logits, const float* scores, const float* dp, float log_sum, float delta,
                      uint16_t* p, uint16_t* ds) {
  kernels().bf16.backward(logits, scores, dp, log_sum, delta, p, ds);
}

float row_dot(const float* a, const float* b, int64_t n) {
  return kernels().f32.dot(a, b, n);
}

float row_dot(const uint16_t* a, const uint16_t* b, int64_t n) {
  return kernels().bf16.dot(a, b, n);
}

void scale_row(const float* x, float factor, float* out, int64_t n) {
  kernels().f32.scale(x, factor, out, n);
}

void scale_row(const float* x, float factor, uint16_t* out, int64_t n) {
  kernels().bf16.scale(x, factor, out, n);
}

}  // namespace moiety
