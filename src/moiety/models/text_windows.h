#pragma once
// Texts in windows that do not overlap, batch by batch: how statistics over a model read them.
#include <torch/types.h>

#include <functional>
#include <vector>

#include "moiety/models/model.h"

namespace moiety {

struct WindowOptions {
  int64_t context = 512;  ///< tokens of one window
  int64_t batch_size = 8;
  int64_t bos = -1;  ///< put before every window; -1: none
};

struct WindowBatch {
  torch::Tensor ids;              ///< [B, T] int64, 0 behind the end of a short window
  torch::Tensor mask;             ///< [B, T] bool: real tokens
  torch::Tensor text;             ///< [B, T] bool: those of the text itself, without BOS
  int64_t of = 0;                 ///< which text
  int64_t done = 0, windows = 0;  ///< windows read when this batch is through, and in all
};

/// Calls `each` with every batch but the first `skip` ones, in order. Error: a context outside 1 to `longest`, one
/// without room behind BOS, a batch size below 1, no token.
void each_window(const std::vector<std::vector<int64_t>>& texts, const WindowOptions& options, int64_t longest,
                 const std::function<void(const WindowBatch&)>& each, int64_t skip = 0);

/// Runs the model over one batch without a head or a gradient, on its own device; `pass` brings a trace or edits.
void read_window(CausalModel& model, const WindowBatch& batch, Pass& pass);

}  // namespace moiety
