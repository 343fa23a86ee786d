#if defined(__x86_64__)
#include "moiety/kernels/swiglu_loops.h"

namespace moiety {

const SwigluKernels& swiglu_kernels_avx2() {
  return kSwiglu;
}

}  // namespace moiety
#endif
