#include "moiety/nn/parameters.h"

#include <set>

namespace moiety {

int64_t parameter_count(const torch::nn::Module& module) {
  int64_t count = 0;
  std::set<const void*> seen;
  for (const auto& p : module.parameters())
    if (seen.insert(p.unsafeGetTensorImpl()).second) count += p.numel();
  return count;
}

}  // namespace moiety
