#include "open_model.h"

#include <chrono>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/memory.h"
#include "moiety/moe/router.h"

namespace moiety::cli {

OpenModel open_causal(const Common& common, bool tokenizer) {
  const auto start = std::chrono::steady_clock::now();
  keep_freed_memory();  // every token asks for the same large blocks again
  OpenModel open;
  open.checkpoint = Checkpoint::open(common.model);
  check(!is_encoder(open.checkpoint->config()),
        "{} is an encoder ({}), which predicts no next token: use `moiety embed`", common.model,
        open.checkpoint->config().value("model_type", "unknown type"));
  if (tokenizer) open.tokenizer = Tokenizer::load(*open.checkpoint);
  open.model = load_causal(*open.checkpoint, {common.dtype, torch::Device(common.device)});
  open.model->eval();
  if (common.active_experts > 0) set_active_experts(*open.model, common.active_experts);
  log::debug("{} opened in {:.2f} s", common.model,
             std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return open;
}

}  // namespace moiety::cli
