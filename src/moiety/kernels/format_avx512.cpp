#if defined(__x86_64__)
#include "moiety/kernels/format_vectors.h"

namespace moiety {
const Decoder* decoders_avx512() {
  return kVectorDecoders.each;
}
}  // namespace moiety
#endif
