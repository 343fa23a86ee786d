#pragma once
// What matmul.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/matmul.h"

namespace moiety {

template <class Left, class Right, class Out>
using Matmul = void (*)(int64_t m, int64_t n, int64_t k, const MatrixView<Left>& a, const MatrixView<Right>& b,
                        Out* out, int64_t stride, bool add);

struct MatmulKernels {
  Matmul<float, float, float> f32;
  Matmul<uint16_t, uint16_t, uint16_t> bf16;
  Matmul<uint16_t, uint16_t, float> bf16_to_f32;
  Matmul<uint16_t, float, uint16_t> bf16_by_f32;
  Matmul<uint16_t, float, float> bf16_by_f32_to_f32;
};

const MatmulKernels& matmul_kernels_avx2();
const MatmulKernels& matmul_kernels_avx512();

}  // namespace moiety
