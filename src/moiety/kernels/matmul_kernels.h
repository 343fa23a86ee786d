#pragma once
// What matmul.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/matmul.h"

namespace moiety {

struct MatmulKernels {
  void (*f32)(int64_t m, int64_t n, int64_t k, const MatrixView<float>& a, const MatrixView<float>& b, float* out,
              int64_t stride, bool add);
  void (*bf16)(int64_t m, int64_t n, int64_t k, const MatrixView<uint16_t>& a, const MatrixView<uint16_t>& b,
               uint16_t* out, int64_t stride, bool add);
};

const MatmulKernels& matmul_kernels_avx2();
const MatmulKernels& matmul_kernels_avx512();

}  // namespace moiety
