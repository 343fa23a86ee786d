#include "open_model.h"

#include <algorithm>
#include <charconv>
#include <chrono>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/memory.h"
#include "moiety/base/text.h"
#include "moiety/io/edge_experts.h"
#include "moiety/models/vision.h"
#include "moiety/moe/router.h"

namespace moiety::cli {

std::vector<AdapterChoice> adapters_of(const Common& common) {
  std::vector<AdapterChoice> adapters;
  for (const auto& folder : common.adapters) adapters.push_back({folder, 1.0});
  for (const auto& scaled : common.scaled_adapters) {
    const size_t colon = scaled.rfind(':');
    double strength = 0.0;
    const char* end = scaled.data() + scaled.size();
    const char* begin = colon == std::string::npos ? end : scaled.data() + colon + 1;
    const auto [rest, error] = std::from_chars(begin, end, strength);
    check(begin != end && error == std::errc() && rest == end,
          "--adapter-scaled {}: FOLDER:STRENGTH is wanted, as {}:0.5", shown(scaled), shown(scaled.substr(0, colon)));
    adapters.push_back({scaled.substr(0, colon), strength});
  }
  return adapters;
}

std::shared_ptr<const Checkpoint> open_checkpoint(const Common& common) {
  return with_adapters(Checkpoint::open(common.model), adapters_of(common));
}

OpenModel open_causal(const Common& common, bool tokenizer, const OffloadArguments& offload) {
  const auto start = std::chrono::steady_clock::now();
  if (offload.on())
    check(common.device == "cpu", "experts on disk are computed on the CPU: use --device cpu");
  else
    check(offload.memory.empty(),
          "--memory decides which experts stay on disk, and --offload none keeps all in memory: "
          "give one of them");
  const OffloadOptions options = offload.on() ? offload.options() : OffloadOptions();
  // Every token asks for the same large blocks again; where memory is scarce they go back in between.
  if (!offload.on()) keep_freed_memory();
  OpenModel open;
  open.checkpoint = open_checkpoint(common);
  check(!is_encoder(open.checkpoint->config()),
        "{} is an encoder ({}), which predicts no next token: use `moiety embed`", common.model,
        open.checkpoint->config().value("model_type", "unknown type"));
  check(!is_vision(open.checkpoint->config()), "{} classifies images: use `moiety eval --images`", common.model);
  if (tokenizer) open.tokenizer = Tokenizer::load(*open.checkpoint);
  // Experts that stay on disk are not decoded.
  const auto loaded = offload.on() ? edge_outline(open.checkpoint) : open.checkpoint;
  open.model = load_causal(
      *loaded, {.dtype = common.dtype, .device = torch::Device(common.device), .leave_experts = offload.on()});
  open.model->eval();
  if (common.active_experts > 0) set_active_experts(*open.model, common.active_experts);
  if (offload.on()) open.offload = Offload::attach(*open.model, *open.checkpoint, options);
  log::debug("{} opened in {:.2f} s", common.model,
             std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return open;
}

int64_t OpenModel::start(OffloadWork work) const {
  if (!offload) return work.chunk;
  work.context = std::min(work.context, model->context_length());
  offload->start(work);
  return offload->plan().chunk;
}

}  // namespace moiety::cli
