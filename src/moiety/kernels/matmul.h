#pragma once
// Products of matrices on one thread, for the many small and unequal ones of a mixture: an operand may be transposed,
// its rows may be gathered by an index while they are packed, and no code is made at run time for a new shape.
// Elements are f32, or bf16 as its bits; sums are f32 and are rounded once.
#include <cstdint>

namespace moiety {

/// Element (i, j) is data[i * stride + j], or data[j * stride + i] of a transposed matrix. `index`, where given, takes
/// the place of what the stride is multiplied with: data[index[i] * stride + j].
template <class T>
struct MatrixView {
  const T* data;
  int64_t stride;
  bool transposed = false;
  const int64_t* index = nullptr;
  const T* line(int64_t i) const { return data + (index != nullptr ? index[i] : i) * stride; }
};

/// The tile that AVX-512 computes in. Blocks of these sizes leave no part of one idle.
constexpr int64_t kMatmulRows = 14, kMatmulColumns = 32;

/// out [m, n], its rows `stride` elements apart, = a [m, k] b [k, n]; added to what is there for `add`.
void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<float>& a, const MatrixView<float>& b, float* out,
            int64_t stride, bool add = false);
void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<uint16_t>& b,
            uint16_t* out, int64_t stride, bool add = false);
/// Sums are not rounded.
void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<uint16_t>& b, float* out,
            int64_t stride, bool add = false);
/// b is rounded to bf16 while it is packed: f32 weights under bf16 activations need no second copy.
void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<float>& b, uint16_t* out,
            int64_t stride, bool add = false);
void matmul(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<float>& b, float* out,
            int64_t stride, bool add = false);

/// Whether matmul() reaches the speed of a tuned library on this machine; elsewhere it is a plain loop.
bool matmul_is_fast();

}  // namespace moiety
