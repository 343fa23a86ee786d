#include "moiety/train/router_load.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <cmath>

namespace moiety {

nlohmann::json RouterLoad::report(bool shares) const {
  nlohmann::json out = nlohmann::json::object();
  for (const auto& [site, c] : sites_) {
    std::string name = std::to_string(site.block);
    if (site.round != 0) name += fmt::format(".{}", site.round);
    if (site.site != "ffn") name += " " + site.site;
    nlohmann::json entry = {{"evenness", c.evenness()},
                            {"imbalance", c.imbalance()},
                            {"unused", c.unused()},
                            {"indecision", c.indecision()},
                            {"per_token", c.experts_per_token()}};
    if (shares) {
      nlohmann::json list = nlohmann::json::array();
      const auto share = c.share();
      for (int64_t e = 0; e < c.experts; ++e) list.push_back(std::round(share[e].item<double>() * 1e5) / 1e5);
      entry["share"] = list;
    }
    out[name] = entry;
  }
  return out;
}

}  // namespace moiety
