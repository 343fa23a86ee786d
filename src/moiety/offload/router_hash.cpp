#include "moiety/offload/router_hash.h"

#include <map>
#include <regex>
#include <span>

#include "moiety/base/error.h"
#include "moiety/io/sha256.h"

namespace moiety {

std::string router_hash(const Checkpoint& checkpoint) {
  static const std::regex form(
      "(?:^|.*\\.)layers\\.([0-9]{1,9})\\.(?:mlp|block_sparse_moe)\\.(?:gate|router|router\\.layer)\\.weight");
  std::map<int64_t, std::string> routers;
  for (const TensorInfo& t : checkpoint.tensors()) {
    std::smatch m;
    if (std::regex_match(t.name, m, form)) routers.emplace(std::stoll(m[1]), t.name);
  }
  check(!routers.empty(), "{} has no expert layers: nothing is routed in it", checkpoint.path().string());
  Sha256 hash;
  for (const auto& [layer, name] : routers) {
    const auto values = checkpoint.get(name).to_float();
    hash.update(std::as_bytes(std::span(values)));
  }
  return hash.hex();
}

}  // namespace moiety
