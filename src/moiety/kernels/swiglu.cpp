#include "moiety/kernels/swiglu.h"

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/swiglu_loops.h"

namespace moiety {
namespace {

const SwigluKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512:
      return swiglu_kernels_avx512();
    case Isa::Avx2:
      return swiglu_kernels_avx2();
    default:
      break;
  }
#endif
  return kSwiglu;
}

}  // namespace

float swiglu_backward(const float* g, const float* u, const float* t, float share, float* h, float* dg, float* du,
                      int64_t n) {
  return kernels().f32.backward(g, u, t, share, h, dg, du, n);
}

float swiglu_backward(const uint16_t* g, const uint16_t* u, const uint16_t* t, float share, uint16_t* h, uint16_t* dg,
                      uint16_t* du, int64_t n) {
  return kernels().bf16.backward(g, u, t, share, h, dg, du, n);
}

void weighted_sum(const float* const* rows, const float* weights, int64_t count, float* out, int64_t n) {
  kernels().f32.sum(rows, weights, count, out, n);
}

void weighted_sum(const uint16_t* const* rows, const float* weights, int64_t count, uint16_t* out, int64_t n) {
  kernels().bf16.sum(rows, weights, count, out, n);
}

}  // namespace moiety
