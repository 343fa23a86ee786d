#pragma once
// The processes of one run, as `torchrun --no-python moiety train ...` starts them, joined by Gloo.
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/moe/exchange.h"

namespace moiety {

class Ranks : public Exchange {
 public:
  /// Joins the processes that torchrun's environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); null when
  /// there is one process only. Throws Error when the environment is incomplete or the others do not come.
  static std::unique_ptr<Ranks> from_environment();

  /// Some of the processes as a group of their own, called by all of its members with the same list, which holds this
  /// one; places in the list are ranks in the group.
  virtual std::unique_ptr<Ranks> part(const std::vector<int64_t>& members) = 0;
  /// Every tensor becomes the sum over the processes. All processes call it with the same shapes in the same order.
  virtual void sum(const std::vector<torch::Tensor>& tensors) = 0;
  /// Returns when all processes have come here.
  virtual void barrier() = 0;
};

}  // namespace moiety
