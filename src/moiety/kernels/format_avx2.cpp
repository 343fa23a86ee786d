#if defined(__x86_64__)
#include "moiety/kernels/format_loops.h"

namespace moiety {
const Decoder* decoders_avx2() {
  return kDecoders;
}
}  // namespace moiety
#endif
