#include "moiety/base/memory.h"

#include <cstdlib>  // defines __GLIBC__

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace moiety {

void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_MAX, 0);         // large blocks come from the heap, too
  mallopt(M_TRIM_THRESHOLD, -1);  // which does not shrink
  mallopt(M_TOP_PAD, 16 << 20);   // and grows in large steps
#endif
}

}  // namespace moiety
