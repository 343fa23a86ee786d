#pragma once
// What scan.cpp asks of one instruction set (internal to kernels/).
#include "moiety/kernels/scan.h"

namespace moiety {

constexpr int64_t kScanLanes = 16;

struct ScanKernels {
  void (*forward)(const ScanRow& row, int64_t first, int64_t last, float* h, float* y, float* kept);
  void (*backward)(const ScanRow& row, int64_t first, int64_t last, const float* dy, const float* kept, float* dh,
                   const ScanGradients& out, float* scratch);
};

const ScanKernels& scan_kernels_avx2();
const ScanKernels& scan_kernels_avx512();

}  // namespace moiety
