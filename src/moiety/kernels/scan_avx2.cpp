#if defined(__x86_64__)
#include "moiety/kernels/scan_loops.h"

namespace moiety {

const ScanKernels& scan_kernels_avx2() {
  return kScan;
}

}  // namespace moiety
#endif
