#pragma once
// Modules that change with training outside of the gradient: schedules of K or of a temperature, balance biases.
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace moiety {

/// A module of a model that also derives from this is found by the trainer (dynamic_cast) and called once per optimizer
/// step, whatever the number of micro-batches; never in evaluation and never when activations are recomputed (see
/// Pass::recomputing). What it changes has to be a registered buffer or a function of `step`: buffers are saved with
/// the training state, so that a resumed run goes on as if it had not stopped.
class Scheduled {
 public:
  virtual ~Scheduled() = default;
  /// Before the first forward pass of step `step` = 0 ... steps - 1. Also called once when a run resumes.
  virtual void before_step(int64_t step, int64_t steps) {}
  /// What the step's forward passes have counted and after_step() reads: several processes add theirs up in place
  /// first.
  virtual std::vector<torch::Tensor> counts() { return {}; }
  /// After the optimizer has changed the parameters.
  virtual void after_step() {}
  /// Around every evaluation during training: what is measured may differ from what trains.
  virtual void before_evaluation() {}
  virtual void after_evaluation() {}
};

}  // namespace moiety
