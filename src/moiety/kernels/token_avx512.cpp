#if defined(__x86_64__)
#include "moiety/kernels/token_loops.h"

namespace moiety {

const TokenKernels& token_kernels_avx512() {
  return kToken;
}

}  // namespace moiety
#endif
