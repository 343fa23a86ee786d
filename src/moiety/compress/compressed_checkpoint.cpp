#include "moiety/compress/compressed_checkpoint.h"

#include <algorithm>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/io/overlay.h"
#include "moiety/models/decoder_config.h"
#include "moiety/moe/compressed_experts.h"
#include "moiety/nn/part.h"

namespace moiety {
namespace {

using nlohmann::json;

// What stands before "layers.0".
std::string prefix_of(const Checkpoint& checkpoint) {
  for (const TensorInfo& t : checkpoint.tensors())
    if (const auto at = t.name.find("embed_tokens.weight"); at != std::string::npos) return t.name.substr(0, at);
  fail("{}: no tensor named '...embed_tokens.weight': this does not look like a decoder", checkpoint.path().string());
}

}  // namespace

std::shared_ptr<const Checkpoint> with_compressed_experts(std::shared_ptr<const Checkpoint> base, int64_t n_ce) {
  check(base->gguf() == nullptr,
        "{}: a GGUF file has no place for the vectors of compressed experts; convert it to a "
        "directory first",
        base->path().string());
  json config = base->config();
  check(!config.value("use_ce", false), "{} has compressed experts already", base->path().string());
  const DecoderConfig c = parse_decoder_config(config);
  for (const PartEntry& entry : parse_parts(config, static_cast<int64_t>(c.layers.size())))
    check(entry.site != "ffn", "{}: its feed-forward layers are a part already ({})", base->path().string(),
          entry.slug);
  const bool mixture = std::any_of(c.layers.begin(), c.layers.end(), [](const LayerConfig& l) { return l.mixture; });
  check(mixture, "{} is dense: experts can be compressed where the family has a mixture", base->path().string());
  config["use_ce"] = true;
  config["n_ce"] = auxiliary_experts(n_ce, c.moe.router.top_k);
  const int64_t width = std::max(c.hidden, c.moe.width);
  const std::string prefix = prefix_of(*base);
  std::vector<OverlayTensor> tensors;
  for (size_t l = 0; l < c.layers.size(); ++l)
    if (c.layers[l].mixture)
      tensors.push_back(overlay_of(fmt::format("{}layers.{}.mlp.ces", prefix, l), {c.moe.experts, 3, width},
                                   std::vector<float>(static_cast<size_t>(c.moe.experts * 3 * width), 1.f)));
  return overlay(std::move(base), std::move(config), std::move(tensors));
}

}  // namespace moiety
