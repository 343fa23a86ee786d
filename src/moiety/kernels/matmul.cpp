#include "moiety/kernels/matmul.h"

#include <vector>

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/half.h"
#include "moiety/kernels/matmul_kernels.h"

namespace moiety {
namespace {

float load(float x) {
  return x;
}
float load(uint16_t x) {
  return bf16_to_float(x);
}
void store(float x, float& to) {
  to = x;
}
void store(float x, uint16_t& to) {
  to = float_to_bf16(x);
}

template <class T>
T element(const MatrixView<T>& v, int64_t i, int64_t j) {
  return v.transposed ? v.line(j)[i] : v.line(i)[j];
}

// As `T`, the type that is computed in, has it.
template <class T, class Source>
float rounded(Source x) {
  if constexpr (sizeof(T) < sizeof(Source))
    return bf16_to_float(float_to_bf16(x));
  else
    return load(x);
}

template <class T, class Right, class Out>
void plain(int64_t m, int64_t n, int64_t k, const MatrixView<T>& a, const MatrixView<Right>& b, Out* out,
           int64_t stride, bool add) {
  if (m <= 0 || n <= 0) return;
  std::vector<float> right(static_cast<size_t>(k * n)), sums(static_cast<size_t>(n));
  for (int64_t p = 0; p < k; ++p)
    for (int64_t j = 0; j < n; ++j) right[static_cast<size_t>(p * n + j)] = rounded<T>(element(b, p, j));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) sums[static_cast<size_t>(j)] = add ? load(out[i * stride + j]) : 0.f;
    for (int64_t p = 0; p < k; ++p) {
      const float left = load(element(a, i, p));
      const float* row = right.data() + p * n;
      for (int64_t j = 0; j < n; ++j) sums[static_cast<size_t>(j)] += left * row[j];
    }
    for (int64_t j = 0; j < n; ++j) store(sums[static_cast<size_t>(j)], out[i * stride + j]);
  }
}

constexpr MatmulKernels kPlain = {plain, plain, plain, plain, plain};

const MatmulKernels& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::Avx512) return matmul_kernels_avx512();
  if (isa() == Isa::Avx2) return matmul_kernels_avx2();
#endif
  return kPlain;
}

}  // namespace

void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<float>& a, const MatrixView<float>& b, float* out,
            int64_t stride, bool add) {
  kernels().f32(m, n, k, a, b, out, stride, add);
}

void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<uint16_t>& b,
            uint16_t* out, int64_t stride, bool add) {
  kernels().bf16(m, n, k, a, b, out, stride, add);
}

void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<uint16_t>& b, float* out,
            int64_t stride, bool add) {
  kernels().bf16_to_f32(m, n, k, a, b, out, stride, add);
}

void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<float>& b, uint16_t* out,
            int64_t stride, bool add) {
  kernels().bf16_by_f32(m, n, k, a, b, out, stride, add);
}

void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<float>& b, float* out,
            int64_t stride, bool add) {
  kernels().bf16_by_f32_to_f32(m, n, k, a, b, out, stride, add);
}

bool matmul_is_fast() {
  return isa() >= Isa::Avx2;
}

}  // namespace moiety
