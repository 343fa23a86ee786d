#include "moiety/kernels/scan.h"

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/scan_loops.h"

namespace moiety {
namespace {

const ScanKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512:
      return scan_kernels_avx512();
    case Isa::Avx2:
      return scan_kernels_avx2();
    default:
      break;
  }
#endif
  return kScan;
}

}  // namespace

void scan(const ScanRow& row, int64_t first, int64_t last, float* h, float* y, float* kept) {
  kernels().forward(row, first, last, h, y, kept);
}

int64_t scan_scratch(int64_t states) {
  return kScanLanes * states * (4 * kScanChunk + 1 + 2 * kScanGroup / kScanLanes);
}

void scan_backward(const ScanRow& row, int64_t first, int64_t last, const float* dy, const float* kept, float* dh,
                   const ScanGradients& out, float* scratch) {
  kernels().backward(row, first, last, dy, kept, dh, out, scratch);
}

}  // namespace moiety
