#include "open_model.h"

#include <algorithm>
#include <chrono>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/memory.h"
#include "moiety/io/edge_experts.h"
#include "moiety/models/vision.h"
#include "moiety/moe/router.h"

namespace moiety::cli {

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
  open.checkpoint = Checkpoint::open(common.model);
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
