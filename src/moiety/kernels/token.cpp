#include "moiety/kernels/token.h"

#include <algorithm>

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/token_loops.h"

namespace moiety {
namespace {

const TokenKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512:
      return token_kernels_avx512();
    case Isa::Avx2:
      return token_kernels_avx2();
    default:
      break;
  }
#endif
  return kToken;
}

}  // namespace

void rms_norm(const float* x, const float* weight, float offset, float eps, float* out, int64_t n) {
  kernels().f32.norm(x, weight, offset, eps, out, n);
}

void rms_norm(const uint16_t* x, const float* weight, float offset, float eps, uint16_t* out, int64_t n) {
  kernels().bf16.norm(x, weight, offset, eps, out, n);
}

void rms_norm_backward(const float* x, const float* weight, float offset, float eps, const float* dy, float* dx,
                       float* dw, int64_t n) {
  kernels().f32.norm_backward(x, weight, offset, eps, dy, dx, dw, n);
}

void rms_norm_backward(const uint16_t* x, const float* weight, float offset, float eps, const uint16_t* dy,
                       uint16_t* dx, float* dw, int64_t n) {
  kernels().bf16.norm_backward(x, weight, offset, eps, dy, dx, dw, n);
}

void rotate_head(const float* x, const float* cosine, const float* sine, int64_t half, bool interleaved, float* out,
                 int64_t n) {
  kernels().f32.rotate(x, cosine, sine, half, interleaved, out, n);
}

void rotate_head(const uint16_t* x, const float* cosine, const float* sine, int64_t half, bool interleaved,
                 uint16_t* out, int64_t n) {
  kernels().bf16.rotate(x, cosine, sine, half, interleaved, out, n);
}

void silu_times(float* g, const float* u, int64_t n) {
  kernels().silu(g, u, n);
}

void gelu_tanh_times(float* g, const float* u, int64_t n) {
  kernels().gelu(g, u, n);
}

void clamped_times(float* g, const float* u, float alpha, float limit, int64_t n) {
  kernels().clamped(g, u, alpha, limit, n);
}

void rows_times(const float* w, int64_t rows, int64_t n, const float* x, float* y) {
  kernels().rows(w, rows, n, x, y);
}

int64_t attend_scratch(const AttendRow& a) {
  const auto tile = [](Format format, int64_t size) { return format == Format::F32 ? 0 : attend_tile(size) * size; };
  return a.heads * (a.length + 1) + std::max(tile(a.k_format, a.size), tile(a.v_format, a.v_size));
}

void attend_row(const AttendRow& a, float* scratch, float* out) {
  kernels().attend(a, scratch, out);
}

}  // namespace moiety
