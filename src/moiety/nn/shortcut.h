#pragma once
// Where no gradient is asked for, modules take shorter ways than the composite of torch operations that a graph is
// built from: kernels that round a little differently.
#include <torch/types.h>

#include <initializer_list>

namespace moiety {

/// While it lives, modules of this thread compute as if a graph were built. For a pass whose values have to equal those
/// of a later pass that builds one.
class WithoutShortcuts {
 public:
  WithoutShortcuts();
  ~WithoutShortcuts();
  WithoutShortcuts(const WithoutShortcuts&) = delete;
  WithoutShortcuts& operator=(const WithoutShortcuts&) = delete;

 private:
  bool before_;
};

/// Whether a module may take a shorter way: none of the tensors that are defined would be part of a graph.
bool may_shorten(std::initializer_list<torch::Tensor> tensors);

}  // namespace moiety
