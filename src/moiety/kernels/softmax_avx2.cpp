#if defined(__x86_64__)
#include "moiety/kernels/softmax_loops.h"

namespace moiety {

const SoftmaxKernels& softmax_kernels_avx2() {
  return kSoftmax;
}

}  // namespace moiety
#endif
