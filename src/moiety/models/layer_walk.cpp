#include "moiety/models/layer_walk.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {

LayerWalk::LayerWalk(Decoder& model, const std::vector<std::vector<int64_t>>& windows) : model_(model) {
  const torch::NoGradGuard frozen;
  check(!windows.empty(), "there is no window of tokens to run");
  const auto parameters = model.parameters();
  const auto device = parameters.empty() ? torch::Device(torch::kCPU) : parameters.front().device();
  for (const auto& window : windows) {
    check(!window.empty(), "a window has no tokens");
    const auto ids = torch::tensor(window, torch::kInt64).unsqueeze(0).to(device);
    hidden_.push_back(model.embedded(ids));
    auto& context = contexts_[ids.size(1)];
    if (!context)
      context = std::make_unique<AttentionContext>(torch::arange(ids.size(1), ids.options()).unsqueeze(0), 0,
                                                   torch::Tensor(), torch::Tensor());
  }
  passes_.resize(hidden_.size());
  ran_.assign(hidden_.size(), false);
}

const AttentionContext& LayerWalk::context(int64_t window) const {
  return *contexts_.at(hidden(window).size(1));
}

Pass& LayerWalk::pass(int64_t window) {
  Pass& pass = passes_[static_cast<size_t>(window)];
  pass.batch = 1;
  pass.block = pass.slot = block_;
  pass.round = 0;
  return pass;
}

void LayerWalk::run(int64_t window, Trace* trace) {
  const torch::NoGradGuard frozen;
  check(!done(), "all blocks have run");
  const auto w = static_cast<size_t>(window);
  check(!ran_[w], "window {} has been through block {} already", window, block_);
  Pass& pass = this->pass(window);
  pass.trace = trace;
  hidden_[w] = layer().forward(hidden_[w], context(window), pass);
  pass.trace = nullptr;
  ran_[w] = true;
}

void LayerWalk::next() {
  check(std::all_of(ran_.begin(), ran_.end(), [](bool ran) { return ran; }), "block {} has not seen all windows yet",
        block_);
  ran_.assign(ran_.size(), false);
  ++block_;
  if (done())
    for (Pass& pass : passes_) pass.finish();
}

}  // namespace moiety
